//! The network that a lab promises, looked at with ordinary sockets, in both modes.

#![allow(clippy::unwrap_used)]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use isthmus_lab::{Forward, Host, Lab, Mode, PathConfig};

const PORT: u16 = 15443;

/// Runs `story` in every mode that this machine allows, and says which it left out.
fn in_each_mode(story: impl Fn(Lab)) {
    if let (Mode::Loopback, reason) = Mode::detect() {
        println!("SKIPPED: namespaces: {}", reason.unwrap_or_default());
    } else {
        story(Lab::new(Mode::Namespaces, 1).unwrap());
    }
    // Loopback addresses are the machine's: one lab at a time.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    story(Lab::new(Mode::Loopback, 1).unwrap());
}

fn two_gateways(lab: &mut Lab) -> (Host, Host) {
    for cluster in ["a", "b"] {
        lab.add_cluster(cluster).unwrap();
    }
    (lab.add_gateway("a", "gw-a").unwrap(), lab.add_gateway("b", "gw-b").unwrap())
}

fn udp(host: &Host) -> UdpSocket {
    let socket = host.run(|| UdpSocket::bind((host.listen(), PORT))).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

fn public(host: &Host) -> SocketAddr {
    SocketAddr::new(host.public().unwrap(), PORT)
}

/// Sends one datagram there and its echo back; gives the round trip and the address seen there.
fn round_trip(from: &UdpSocket, to: &UdpSocket, address: SocketAddr) -> Option<(Duration, SocketAddr)> {
    let mut buffer = [0; 64];
    let start = Instant::now();
    from.send_to(b"there", address).unwrap();
    let (len, seen) = to.recv_from(&mut buffer).ok()?;
    to.send_to(&buffer[..len], seen).unwrap();
    let (_, replier) = from.recv_from(&mut buffer).ok()?;
    assert_eq!(replier, address, "the reply comes from where the question went");
    Some((start.elapsed(), seen))
}

#[test]
fn gateways_see_each_other_by_public_addresses_at_the_distance_that_was_set() {
    in_each_mode(|mut lab| {
        let (a, b) = two_gateways(&mut lab);
        lab.wan().set("a", "b", PathConfig::delay(Duration::from_millis(20))).unwrap();
        let (from, to) = (udp(&a), udp(&b));
        let mut best = Duration::MAX;
        for _ in 0..10 {
            let (took, seen) = round_trip(&from, &to, public(&b)).expect("an answer");
            assert_eq!(seen, public(&a), "in {:?}", lab.mode());
            best = best.min(took);
        }
        assert!(best >= Duration::from_millis(40), "{best:?} in {:?}", lab.mode());
        assert!(best < Duration::from_millis(45), "{best:?} in {:?}", lab.mode());
    });
}

#[test]
fn a_partition_is_one_way_and_heals() {
    in_each_mode(|mut lab| {
        let (a, b) = two_gateways(&mut lab);
        let (from, to) = (udp(&a), udp(&b));
        assert!(round_trip(&from, &to, public(&b)).is_some(), "before, in {:?}", lab.mode());
        lab.wan().block("b", "a").unwrap();
        assert!(round_trip(&from, &to, public(&b)).is_none());
        assert!(lab.wan().stats("b", "a").unwrap().blocked > 0);
        assert_eq!(lab.wan().stats("a", "b").unwrap().blocked, 0, "the question still arrives");
        lab.wan().heal("a").unwrap();
        assert!(round_trip(&from, &to, public(&b)).is_some());
    });
}

#[test]
fn tcp_crosses_with_its_delay_and_ends_with_its_stream() {
    in_each_mode(|mut lab| {
        let (a, b) = two_gateways(&mut lab);
        lab.wan().set("a", "b", PathConfig::delay(Duration::from_millis(10))).unwrap();
        let listener = b.run(|| TcpListener::bind((b.listen(), PORT))).unwrap().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let start = Instant::now();
        let mut client = a
            .run(|| {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.bind(&SocketAddr::new(a.listen(), 0).into()).unwrap();
                socket.connect(&public(&b).into()).unwrap();
                TcpStream::from(socket)
            })
            .unwrap();
        let sent: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        client.write_all(&sent).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        client.read_to_end(&mut back).unwrap();
        assert!(back == sent, "{} of {} bytes back", back.len(), sent.len());
        assert!(start.elapsed() >= Duration::from_millis(40), "two round trips at least");
        server.join().unwrap();
    });
}

#[test]
fn clusters_overlap_and_workloads_reach_their_own_cluster_only() {
    let (Mode::Namespaces, _) = Mode::detect() else {
        println!("SKIPPED: no network namespaces here");
        return;
    };
    let mut lab = Lab::new(Mode::Namespaces, 1).unwrap();
    let (a, b) = two_gateways(&mut lab);
    let (in_a, in_b) = (lab.add_workload("a", "w").unwrap(), lab.add_workload("b", "w").unwrap());
    assert_eq!(in_a.local(), in_b.local(), "the same private address in both");
    let (gateway, workload, foreign) = (udp(&a), udp(&in_a), udp(&b));
    assert!(round_trip(&workload, &gateway, SocketAddr::new(a.local(), PORT)).is_some());
    workload.send_to(b"no way", public(&b)).unwrap();
    foreign.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(foreign.recv_from(&mut [0; 16]).is_err(), "the WAN carries no private address");

    lab.set_plugged(&a, false).unwrap();
    assert!(round_trip(&workload, &gateway, SocketAddr::new(a.local(), PORT)).is_none());
    lab.set_plugged(&a, true).unwrap();
    let again = Instant::now();
    while round_trip(&workload, &gateway, SocketAddr::new(a.local(), PORT)).is_none() {
        assert!(again.elapsed() < Duration::from_secs(10), "back after the cable is");
    }
}

#[test]
fn nothing_of_a_lab_is_seen_in_the_namespace_of_its_maker() {
    let (Mode::Namespaces, _) = Mode::detect() else {
        println!("SKIPPED: no network namespaces here");
        return;
    };
    let devices = || std::fs::read_to_string("/proc/net/dev").unwrap().lines().count();
    let before = devices();
    let mut lab = Lab::new(Mode::Namespaces, 1).unwrap();
    two_gateways(&mut lab);
    let dir = lab.dir().to_owned();
    assert_eq!(devices(), before);
    drop(lab);
    assert!(!dir.exists());
}

#[test]
fn a_door_leads_from_outside_to_a_port_inside() {
    in_each_mode(|mut lab| {
        lab.add_cluster("a").unwrap();
        let host = lab.add_workload("a", "w").unwrap();
        let inside = host.run(|| TcpListener::bind((host.listen(), 8080))).unwrap().unwrap();
        let target = SocketAddr::new(host.local(), 8080);
        let door = Forward::open(SocketAddr::from(([127, 0, 0, 1], 0)), &host, target).unwrap();
        let mut client = TcpStream::connect(door.address()).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let (mut server, _) = inside.accept().unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let address = door.address();
        drop(door);
        assert!(TcpStream::connect(address).is_err());
    });
}

/// Runs a command on a host; `None` (and a word) if it is not installed.
fn command(host: &Host, program: &str, args: &[&str]) -> Option<String> {
    let output = host.run(|| Command::new(program).args(args).output()).unwrap();
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("SKIPPED: {program} is not installed");
            None
        }
        output => Some(String::from_utf8_lossy(&output.unwrap().stdout).into_owned()),
    }
}

#[test]
fn ping_agrees_on_delay_and_loss() {
    let (Mode::Namespaces, _) = Mode::detect() else {
        println!("SKIPPED: no network namespaces here");
        return;
    };
    let mut lab = Lab::new(Mode::Namespaces, 7).unwrap();
    let (a, b) = two_gateways(&mut lab);
    lab.wan().set("a", "b", PathConfig::delay(Duration::from_millis(25))).unwrap();
    lab.wan().change("a", "b", |path| path.loss = 0.2).unwrap();
    let target = b.public().unwrap().to_string();
    let args = ["-n", "-q", "-i", "0.005", "-c", "400", "-W", "1", &target];
    let Some(report) = command(&a, "ping", &args) else { return };
    let number = |after: &str, until: char| -> f64 {
        let rest = report.split(after).nth(1).unwrap_or_else(|| panic!("{after:?} in {report}"));
        rest.split(until).next().unwrap().trim().parse().unwrap()
    };
    let (min, loss) = (number("min/avg/max/mdev = ", '/'), number("received, ", '%'));
    assert!((50.0..51.5).contains(&min), "{report}");
    // 20 % of 400 with standard deviation 2 %.
    assert!((12.0..28.0).contains(&loss), "{report}");
}

/// Sends UDP by iperf3 and gives what its receiver counted; `None` if it is not installed.
fn iperf3(from: &Host, to: &Host, logs: &std::path::Path, rate: &str) -> Option<serde_json::Value> {
    command(to, "iperf3", &["--version"])?;
    let server = isthmus_lab::Program::new("iperf3", "/usr/bin/env").args(["iperf3", "-s", "-1", "--forceflush"]);
    let mut server = server.start(to, logs).unwrap();
    // Not by a probe: `-1` would take it for the one client.
    server.wait_log("listening", 1, Duration::from_secs(5)).unwrap();
    let target = to.public().unwrap().to_string();
    let report =
        command(from, "iperf3", &["-c", &target, "-u", "-b", rate, "-t", "3", "-l", "1400", "-w", "4M", "-J"])?;
    let mut report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(server.wait(Duration::from_secs(5)).is_ok());
    let received = report["end"]["sum_received"].take();
    Some(if received.is_null() { report["end"]["sum"].take() } else { received })
}

#[test]
fn iperf3_agrees_on_rate_and_an_unshaped_path_loses_nothing_of_its_own() {
    let (Mode::Namespaces, _) = Mode::detect() else {
        println!("SKIPPED: no network namespaces here");
        return;
    };
    let mut lab = Lab::new(Mode::Namespaces, 7).unwrap();
    let (a, b) = two_gateways(&mut lab);
    let dir = lab.dir().to_owned();
    lab.wan().set("a", "b", PathConfig::delay(Duration::from_millis(5))).unwrap();
    let Some(clean) = iperf3(&a, &b, &dir, "40M") else { return };
    assert!(clean["lost_percent"].as_f64().unwrap() < 0.05, "{clean}");

    // 30 Mbit/s of payload into 20 Mbit/s: the bottleneck decides.
    let narrow = PathConfig::delay(Duration::from_millis(5)).rate(20_000_000, 256 * 1024);
    lab.wan().set("a", "b", narrow).unwrap();
    std::fs::remove_file(dir.join("iperf3.log")).unwrap();
    let rated = iperf3(&a, &b, &dir, "30M").unwrap();
    let megabits = rated["bits_per_second"].as_f64().unwrap() / 1e6;
    let expected = 20.0 * 1400.0 / 1428.0;
    assert!((expected * 0.93..expected * 1.05).contains(&megabits), "{megabits} Mbit/s: {rated}");
}
