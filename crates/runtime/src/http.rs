//! A small HTTP/1.1 server for pages about a process: bounded, and gone when its token fires.
//!
//! Not for traffic of the mesh: no TLS, no HTTP/2, and at most [`CONNECTIONS_MAX`] connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Open connections per server: scrapers, probes and a few people; more waits in the backlog.
pub const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to send a request's head; it also ends idle connections.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause after a failed accept: out of descriptors, most likely, and closing some takes a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long answers in progress may go on once the server ends. Pages take milliseconds; event
/// streams have no end and are cut.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a server could not open its port.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {name}; {}", advice(source))]
pub struct BindError {
    /// What the port is for.
    pub name: &'static str,
    /// Where it should have listened.
    pub address: SocketAddr,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process has this port: end it, or choose another in the config",
        io::ErrorKind::AddrNotAvailable => "this host does not have that address: check `listen` in the config",
        io::ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one",
        _ => "check the address in the config",
    }
}

/// One listening port and what it serves.
#[derive(Debug)]
pub struct HttpServer {
    name: &'static str,
    listener: TcpListener,
    router: Router,
    connections_max: usize,
}

impl HttpServer {
    /// Opens `address` for `router`; `name` says what for, in errors and logs.
    ///
    /// # Errors
    /// [`BindError`], which says what to do.
    pub async fn bind(name: &'static str, address: SocketAddr, router: Router) -> Result<Self, BindError> {
        let listener = TcpListener::bind(address).await.map_err(|source| BindError { name, address, source })?;
        Ok(Self { name, listener, router, connections_max: CONNECTIONS_MAX })
    }

    /// Allows `connections_max` open connections instead of [`CONNECTIONS_MAX`].
    #[must_use]
    pub fn connections_max(mut self, connections_max: usize) -> Self {
        self.connections_max = connections_max.max(1);
        self
    }

    /// The address that was bound, with its real port if 0 was asked for.
    ///
    /// # Errors
    /// What the system says; not seen on a socket that is bound.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` fires. On return the port is closed and no task of this server is left.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { name, listener, router, connections_max } = self;
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < connections_max => match accepted {
                    Ok((stream, _)) => { connections.spawn(serve(stream, router.clone(), shutdown.clone())); }
                    Err(error) => {
                        tracing::warn!(server = name, %error, "accept failed");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
        // Before draining: whoever asks now must see us refuse, not wait.
        drop(listener);
        let drained = timeout(DRAIN_TIMEOUT, async { while connections.join_next().await.is_some() {} });
        if drained.await.is_err() {
            connections.shutdown().await;
        }
    }
}

async fn serve(stream: TcpStream, router: Router, shutdown: CancellationToken) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    // Errors are the client's (gone, slow, not HTTP) and told to nobody: a port scan must not fill logs.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(address: SocketAddr) -> io::Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    async fn server(router: Router) -> HttpServer {
        HttpServer::bind("test", SocketAddr::from(([127, 0, 0, 1], 0)), router).await.unwrap()
    }

    #[tokio::test]
    async fn it_serves_until_its_token_fires_and_then_refuses() {
        let server = server(Router::new().route("/", get(async || "here"))).await;
        let (address, shutdown) = (server.local_addr().unwrap(), CancellationToken::new());
        let running = tokio::spawn(server.run(shutdown.clone()));
        assert!(ask(address).await.unwrap().ends_with("here"));
        // An idle connection must not hold the end up.
        let _idle = TcpStream::connect(address).await.unwrap();
        shutdown.cancel();
        timeout(Duration::from_secs(5), running).await.expect("ends").unwrap();
        assert!(ask(address).await.is_err());
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_wait_for_their_turn() {
        let server = server(Router::new().route("/", get(async || "here"))).await.connections_max(1);
        let (address, shutdown) = (server.local_addr().unwrap(), CancellationToken::new());
        let running = tokio::spawn(server.run(shutdown.clone()));
        let first = TcpStream::connect(address).await.unwrap();
        let mut second = Box::pin(ask(address));
        assert!(timeout(Duration::from_millis(100), second.as_mut()).await.is_err(), "the only place is taken");
        drop(first);
        let answer = timeout(Duration::from_secs(5), second).await.expect("served").unwrap();
        assert!(answer.ends_with("here"));
        shutdown.cancel();
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_what_to_do() {
        let first = server(Router::new()).await;
        let address = first.local_addr().unwrap();
        let error = HttpServer::bind("metrics", address, Router::new()).await.expect_err("taken").to_string();
        assert!(error.contains(&address.to_string()) && error.contains("another process"), "{error}");
    }
}
