//! Byte streams between two sidecars of one cluster: either side first, half-close, resets.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod common;

use std::time::Duration;

use common::{Cluster, HOST, Sidecar, app, introduce, served, soon};
use isthmus_model::service::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn pair(protocol: Protocol, app: std::net::SocketAddr) -> (Sidecar, Sidecar) {
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(7000, protocol, app)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(7000, protocol)]);
    (server, client)
}

async fn connect(client: &Sidecar) -> TcpStream {
    let mut stream = TcpStream::connect(client.proxy).await.unwrap();
    stream.write_all(format!("CONNECT {HOST}:7000 HTTP/1.1\r\nHost: {HOST}:7000\r\n\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(stream.read_u8()).await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    stream
}

#[tokio::test]
async fn what_is_sent_comes_back_after_a_half_close() {
    // Answers only once the client has ended its direction.
    let app = app(|mut stream| async move {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).await.is_ok() {
            all.reverse();
            let _ = stream.write_all(&all).await;
        }
    })
    .await;
    let (_server, client) = pair(Protocol::Tcp, app).await;
    let mut stream = connect(&client).await;
    let sent: Vec<u8> = (0..2_000_000u32).map(|n| (n % 241) as u8).collect();
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    soon(stream.read_to_end(&mut back)).await.unwrap();
    back.reverse();
    assert!(back == sent);
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_on_typed_and_untyped_ports() {
    for protocol in [Protocol::Tcp, Protocol::Auto] {
        let app = app(|mut stream| async move {
            let _ = stream.write_all(b"220 ready\r\n").await;
            let mut word = [0; 4];
            let _ = stream.read_exact(&mut word).await;
            let _ = stream.write_all(&word).await;
        })
        .await;
        let (_server, client) = pair(protocol, app).await;
        let mut stream = connect(&client).await;
        let mut greeting = [0; 11];
        soon(stream.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 ready\r\n", "{protocol:?}");
        stream.write_all(b"EHLO").await.unwrap();
        let mut word = [0; 4];
        soon(stream.read_exact(&mut word)).await.unwrap();
        assert_eq!(&word, b"EHLO");
    }
}

#[tokio::test]
async fn a_reset_of_the_server_is_a_reset_at_the_client() {
    let app = app(|mut stream| async move {
        let mut word = [0; 4];
        let _ = stream.read_exact(&mut word).await;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let (_server, client) = pair(Protocol::Tcp, app).await;
    let mut stream = connect(&client).await;
    stream.write_all(b"quit").await.unwrap();
    let error = soon(stream.read_u8()).await.expect_err("no clean end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_of_the_client_is_a_reset_at_the_server() {
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let app = app(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut all = Vec::new();
            let _ = tell.send(stream.read_to_end(&mut all).await.map_err(|error| error.kind())).await;
        }
    })
    .await;
    let (_server, client) = pair(Protocol::Tcp, app).await;
    let mut stream = connect(&client).await;
    stream.write_all(b"half of a").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    assert_eq!(soon(told.recv()).await, Some(Err(std::io::ErrorKind::ConnectionReset)));
}

#[tokio::test]
async fn trust_that_ends_closes_the_connection() {
    let app = app(|mut stream| async move {
        let mut word = [0; 4];
        while stream.read_exact(&mut word).await.is_ok() {
            let _ = stream.write_all(&word).await;
        }
    })
    .await;
    let (server, client) = pair(Protocol::Tcp, app).await;
    let mut stream = connect(&client).await;
    stream.write_all(b"ping").await.unwrap();
    let mut word = [0; 4];
    soon(stream.read_exact(&mut word)).await.unwrap();
    let mut trust = isthmus_identity::Trust::clone(&server.tls.trust.load());
    trust.issuers.clear();
    server.tls.trust.store(std::sync::Arc::new(trust));
    server.trust_changed.send_modify(|count| *count += 1);
    assert!(soon(stream.read_u8()).await.is_err(), "reset");
}
