//! The sample service, called in every way it offers; and a load against it, judged by its ledger.

#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use isthmus_lab::{
    Host, Load,
    rundir::RunDir,
    sample::{Sample, SampleConfig},
};
use tokio_util::sync::CancellationToken;

/// A sample service in this process, on an address of its own; stopped on drop.
struct Running {
    config: SampleConfig,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    fn start(last_octet: u8, dir: &RunDir) -> Self {
        let config = SampleConfig {
            listen: SocketAddr::from(([127, 98, 0, last_octet], 8080)),
            service: "cart".into(),
            version: "v2".into(),
            instance: format!("cart-{last_octet}"),
            cluster: "aws-eu".into(),
            ledger: Some(dir.path().join(format!("seen-{last_octet}"))),
        };
        assert_eq!(SampleConfig::from_args(config.to_args()).unwrap(), config);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let sample = runtime.block_on(Sample::bind(config.clone())).unwrap();
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = thread::spawn(move || runtime.block_on(sample.run(token)));
        Self { config, stop, thread: Some(thread) }
    }

    fn stop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

fn dir() -> RunDir {
    RunDir::create(&std::env::temp_dir()).unwrap()
}

#[test]
fn a_steady_load_is_answered_once_each_by_the_instance_that_saw_it() {
    let dir = dir();
    let service = Running::start(1, &dir);
    let load = Load::direct(service.config.listen, "cart").rate(500).connections(8).post(100);
    let report = load.run_for(&Host::here(), Duration::from_secs(1)).unwrap();
    let mut ledger = report.ledger();
    ledger.read_seen(service.config.ledger.as_ref().unwrap()).unwrap();
    let verdict = ledger.judge("cart");
    assert!(verdict.is_flawless(), "{verdict:?}");
    assert!((480..=505).contains(&verdict.sent), "{report}");
    assert_eq!(verdict.by_cluster["aws-eu"], verdict.sent);
    assert!(!ledger.judge("another").is_honest(), "another service's answers are misrouted");
}

#[test]
fn a_pause_is_charged_to_every_request_that_was_due_in_it() {
    let dir = dir();
    let service = Running::start(2, &dir);
    // One connection and 200 ms a request, ten due a second: the n-th waits n times 100 ms.
    let load = Load::direct(service.config.listen, "cart").path("/delay/200").rate(10).connections(1);
    let report = load.run_for(&Host::here(), Duration::from_secs(1)).unwrap();
    assert!(report.failed().count() == 0, "{report}");
    assert!(report.slowest() > Duration::from_millis(900), "{report}");
}

#[test]
fn a_dead_service_fails_each_request_with_its_reason() {
    let dir = dir();
    let mut service = Running::start(3, &dir);
    let running = Load::direct(service.config.listen, "cart").rate(200).start(&Host::here()).unwrap();
    assert!(running.wait_for(Duration::from_secs(5), |outcome| outcome.result.is_ok()).is_some());
    service.stop();
    let stopped_at = running.elapsed();
    assert!(running.wait_for(Duration::from_secs(5), |outcome| outcome.result.is_err()).is_some());
    let report = running.stop().unwrap();
    assert_eq!(report.between(stopped_at + Duration::from_millis(50), Duration::MAX).answered().count(), 0);
    let (_, reason) = report.failed().last().unwrap();
    assert!(reason.to_string().contains("refused"), "{reason}");
}

#[test]
fn statuses_are_failures_and_say_what_the_body_said() {
    let dir = dir();
    let service = Running::start(4, &dir);
    let outcome = Load::direct(service.config.listen, "cart").path("/status/503").once(&Host::here()).unwrap();
    let reason = outcome.result.unwrap_err().to_string();
    assert!(reason.starts_with("status 503: {"), "{reason}");
}

#[test]
fn an_upgrade_turns_the_connection_into_bytes() {
    let dir = dir();
    let service = Running::start(5, &dir);
    let mut stream = TcpStream::connect(service.config.listen).unwrap();
    write!(stream, "GET /chat HTTP/1.1\r\nhost: cart\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 101"), "{line}");
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    stream.write_all(b"\x00\xffbytes").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    reader.read_to_end(&mut back).unwrap();
    assert_eq!(back, b"\x00\xffbytes");
}

#[test]
fn tcp_echoes_and_the_greeter_speaks_first() {
    let dir = dir();
    let service = Running::start(6, &dir);
    let ip = service.config.listen.ip();
    for (port, greeting) in
        [(service.config.echo_port(), ""), (service.config.greeting_port(), "220 cart-6.aws-eu\r\n")]
    {
        let mut stream = TcpStream::connect((ip, port)).unwrap();
        let mut first = vec![0; greeting.len()];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(first, greeting.as_bytes());
        stream.write_all(b"hello").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }
}

#[test]
fn grpc_over_http2_ends_with_a_status_in_its_trailers() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let dir = dir();
    let service = Running::start(7, &dir);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(service.config.listen).await.unwrap();
        let (mut client, driver) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(driver);
        let message = bytes::Bytes::from_static(b"\0\0\0\0\x02hi");
        let request = http::Request::post("http://cart/shop.Cart/Get").header("content-type", "application/grpc");
        let response = client.send_request(request.body(Full::new(message.clone())).unwrap()).await.unwrap();
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        assert_eq!(body.to_bytes(), message);
    });
}
