//! The TCP side of the sample service: an echo, and a server that speaks first.

use std::sync::Arc;

use tokio::{
    io::{AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::Service;

/// What a connection gets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Every byte back; the end of the input ends the output.
    Echo,
    /// A line `220 INSTANCE.CLUSTER` first, then as the echo: as SMTP or MySQL begin.
    Greeting,
}

/// Accepts for ever; dropped with its connections.
pub(super) async fn serve(listener: TcpListener, service: Arc<Service>, kind: Kind) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(answer(stream, service.clone(), kind));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(mut stream: TcpStream, service: Arc<Service>, kind: Kind) {
    let _ = stream.set_nodelay(true);
    if let Kind::Greeting = kind {
        let line = format!("220 {}.{}\r\n", service.config.instance, service.config.cluster);
        if stream.write_all(line.as_bytes()).await.is_err() {
            return;
        }
    }
    let (mut from, mut to) = stream.split();
    // An error is the client's end of the connection; there is nobody left to tell.
    let _ = copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}
