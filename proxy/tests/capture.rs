//! Capture in a real network namespace: what the workload dials reaches the sidecar with its original
//! destination, and the sidecar's own packets, though both are root, pass.
//!
//! Alone in its file: entering a group changes the whole process.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use isthmus_proxy::capture::{Capture, CaptureError, GROUP, Redirect, Rules, enter_group, original_dst};
use nix::sched::{CloneFlags, unshare};

const WAIT: Duration = Duration::from_secs(5);

/// Runs `ip` in the namespace of the calling thread.
fn ip(args: &str) -> io::Result<()> {
    let output = Command::new("ip").args(args.split(' ')).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr))))
}

/// Puts the calling thread in a fresh namespace with an address and a default route, joined to a second
/// namespace, in which a thread runs whatever it is sent.
fn namespaces() -> io::Result<mpsc::Sender<Box<dyn FnOnce() + Send>>> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    ip("link set lo up")?;
    ip("link add eth0 type veth peer name eth1")?;
    let (jobs, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
    let (ready, is_ready) = mpsc::channel();
    thread::spawn(move || {
        let _ = ready.send(unshare(CloneFlags::CLONE_NEWNET).map(|()| nix::unistd::gettid()));
        queue.into_iter().for_each(|job| job());
    });
    let other = is_ready.recv().map_err(io::Error::other)??;
    ip(&format!("link set eth1 netns {other}"))?;
    ip("addr add 10.77.0.2/24 dev eth0")?;
    ip("addr add fd77::2/64 dev eth0 nodad")?;
    ip("link set eth0 up")?;
    ip("route add default via 10.77.0.1")?;
    ip("-6 route add default via fd77::1")?;
    let (ready, is_ready) = mpsc::channel();
    let setup = move || {
        let set = [
            "link set lo up",
            "addr add 10.77.0.1/24 dev eth1",
            "addr add fd77::1/64 dev eth1 nodad",
            "link set eth1 up",
        ];
        let _ = ready.send(set.into_iter().try_for_each(ip));
    };
    jobs.send(Box::new(setup)).expect("its thread lives");
    is_ready.recv().map_err(io::Error::other)??;
    Ok(jobs)
}

/// Leaves the sidecar's group in the calling thread only: what it opens is the workload's, as root.
fn become_workload() {
    // SAFETY: a system call without pointers; unlike libc's wrapper it changes only this thread.
    let result = unsafe { libc::syscall(libc::SYS_setresgid, -1i64, 0i64, -1i64) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

fn as_workload<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = thread::spawn(|| {
        become_workload();
        job()
    });
    thread.join().expect("the workload's part holds")
}

fn connect(address: &str) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address.parse::<SocketAddr>().map_err(io::Error::other)?, WAIT)
}

/// The destination that the next accepted connection was made for.
fn accept(listener: &TcpListener) -> Option<SocketAddr> {
    listener.set_nonblocking(true).expect("a socket");
    let deadline = std::time::Instant::now() + WAIT;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(std::time::Instant::now() < deadline, "nothing was captured within {WAIT:?}");
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    };
    let local = stream.local_addr().expect("connected");
    original_dst(&stream, local).expect("readable")
}

fn is_captured(listener: &TcpListener, address: &str) -> bool {
    let text = address.to_owned();
    let dialled = as_workload(move || connect(&text).map(drop));
    dialled.is_ok() && accept(listener) == Some(address.parse().expect("an address"))
}

#[test]
fn what_the_workload_dials_reaches_the_sidecar_and_the_sidecars_own_packets_pass() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: making network namespaces needs root");
        return;
    }
    let peer = match namespaces() {
        Ok(peer) => peer,
        Err(error) => {
            eprintln!("SKIPPED: no network namespaces here ({error})");
            return;
        }
    };
    enter_group(GROUP).expect("root may");
    let outbound = TcpListener::bind("[::]:15001").expect("free in a new namespace");
    let inbound = TcpListener::bind("0.0.0.0:15006").expect("free");
    let mtls = TcpListener::bind("0.0.0.0:15008").expect("free");
    let dns = UdpSocket::bind("127.0.0.1:15053").expect("free");
    let workload = TcpListener::bind("0.0.0.0:8080").expect("free");
    let redirect = Redirect { listen: [0, 0, 0, 0].into(), outbound: 15001, inbound: 15006, dns: Some(15053) };
    let mut rules = Rules::new(redirect, vec![15008, 15020, 15021]);
    rules.exclude_outbound_ports = vec![9999.into()];
    rules.exclude_outbound_ranges = vec!["198.51.100.0/24".parse().expect("a range")];
    let capture = match Capture::apply(&rules) {
        Ok(capture) => capture,
        Err(CaptureError::Missing) => {
            eprintln!("SKIPPED: nft is not installed");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    // Twice is as good as once: the rules of a killed sidecar are replaced.
    let again = Capture::apply(&rules).expect("idempotent");

    assert!(is_captured(&outbound, "240.240.0.7:80"), "a virtual address of the mesh");
    assert!(is_captured(&outbound, "10.77.0.1:443"), "a neighbour");
    assert!(is_captured(&outbound, "[fd00:1::7]:80"), "IPv6");

    // The sidecar's own connections reach the neighbour, on the very address that is captured otherwise.
    let (ready, is_ready) = mpsc::channel();
    peer.send(Box::new(move || {
        let listener = TcpListener::bind("10.77.0.1:443").expect("free");
        ready.send(()).expect("heard");
        let (mut stream, _) = listener.accept().expect("dialled");
        stream.write_all(b"neighbour").expect("sent");
    }))
    .expect("runs");
    is_ready.recv_timeout(WAIT).expect("listens");
    let mut heard = String::new();
    let mut stream = connect("10.77.0.1:443").expect("reachable");
    stream.set_read_timeout(Some(WAIT)).expect("a socket");
    stream.read_to_string(&mut heard).expect("the neighbour answers, not our own port");
    assert_eq!(heard, "neighbour");

    // The workload's calls to itself, and what is excluded, stay out of it.
    as_workload(|| connect("127.0.0.1:8080").map(drop)).expect("its own port");
    as_workload(|| connect("10.77.0.2:8080").map(drop)).expect("its own port by its address");
    assert!(workload.accept().is_ok() && workload.accept().is_ok());
    assert!(as_workload(|| connect("10.77.0.1:9999").map(drop)).is_err(), "excluded: nobody listens there");
    outbound.set_nonblocking(true).expect("a socket");
    assert!(outbound.accept().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock), "nothing else came");

    // A question to any name server is answered by the sidecar, and the answer comes from who was asked.
    let asked = thread::spawn(|| {
        become_workload();
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(WAIT))?;
        socket.connect("192.0.2.53:53")?;
        socket.send(b"question")?;
        let mut answer = [0; 16];
        let length = socket.recv(&mut answer)?;
        io::Result::Ok(answer[..length].to_vec())
    });
    dns.set_read_timeout(Some(WAIT)).expect("a socket");
    let mut question = [0; 16];
    let (length, from) = dns.recv_from(&mut question).expect("captured");
    assert_eq!(&question[..length], b"question");
    dns.send_to(b"answer", from).expect("sent");
    assert_eq!(asked.join().expect("runs").expect("answered"), b"answer");

    // From outside: plaintext to the workload is captured, the sidecar's own ports are not.
    let (done, is_done) = mpsc::channel();
    peer.send(Box::new(move || {
        let dialled = ["10.77.0.2:8080", "10.77.0.2:15008"].map(|address| connect(address).map(drop).is_ok());
        done.send(dialled).expect("heard");
    }))
    .expect("runs");
    assert_eq!(is_done.recv_timeout(2 * WAIT).expect("dialled"), [true, true]);
    assert_eq!(accept(&inbound), "10.77.0.2:8080".parse().ok());
    assert_eq!(accept(&mtls), None, "dialled as it is");

    again.remove().expect("was there");
    let left = Command::new("nft").args(["list", "tables"]).output().expect("nft runs").stdout;
    assert_eq!(String::from_utf8_lossy(&left), "", "nothing is left");
    // Removed twice: not an error either.
    drop(capture);
}
