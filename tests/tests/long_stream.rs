//! A TCP stream across clusters outlives its gateways.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use isthmus_lab::{dns, mesh::APP_PORT};
use isthmus_tests::{TWO_CLOUDS, ms};

#[test]
fn a_tcp_stream_survives_ten_seconds_without_gateways() {
    TWO_CLOUDS("long stream", env!("CARGO_BIN_EXE_isthmus-sample")).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        let shopper = story.workload("aws-eu/shopper");
        let (proxy, host, capture) = (shopper.proxy(), shopper.host.clone(), shopper.capture);
        let mut stream = host.run(|| open(proxy, capture))??;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        echo(&mut stream, b"before")?;
        for cluster in ["aws-eu", "gcp-us"] {
            story.mesh.gateway(cluster, 0)?.kill();
        }
        stream.write_all(b"meanwhile")?;
        std::thread::sleep(Duration::from_secs(10));
        for cluster in ["aws-eu", "gcp-us"] {
            story.mesh.restart_gateway(cluster, 0)?;
        }
        let mut meanwhile = [0; 9];
        stream.read_exact(&mut meanwhile)?;
        assert_eq!(&meanwhile, b"meanwhile");
        echo(&mut stream, b"after")?;
        Ok(())
    });
}

/// A connection to cart's echo: by its virtual address, or by CONNECT.
fn open(proxy: SocketAddr, capture: isthmus_lab::mesh::Capture) -> anyhow::Result<TcpStream> {
    const HOST: &str = "cart.shop.svc.clusterset.local";
    let port = APP_PORT + 1;
    if capture == isthmus_lab::mesh::Capture::Transparent {
        let address = dns::lookup(SocketAddr::from(([10, 0, 0, 1], 53)), HOST)?;
        return Ok(TcpStream::connect((address, port))?);
    }
    let mut stream = TcpStream::connect_timeout(&proxy, ms(1000))?;
    write!(stream, "CONNECT {HOST}:{port} HTTP/1.1\r\nhost: {HOST}:{port}\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    anyhow::ensure!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    Ok(stream)
}

fn echo(stream: &mut TcpStream, text: &[u8]) -> anyhow::Result<()> {
    stream.write_all(text)?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back)?;
    anyhow::ensure!(back == text, "sent {text:?}, got {back:?}");
    Ok(())
}
