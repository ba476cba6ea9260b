//! Accepts TCP, does the TLS handshake beside the accept loop, and hands ready connections to tonic.
//!
//! Handshakes are bounded in number and time, so that silent clients cost a slot for seconds, not a
//! listener.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

/// A handshake that takes longer is abandoned: two round trips of the slowest path, and then some.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once: 1 ms of CPU each, so a second of one core.
const HANDSHAKES_MAX: usize = 1_024;
/// Out of descriptors, most likely: a pause lets open connections finish and give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection after its handshake.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    info: Arc<PeerInfo>,
}

/// Who is at the other end: an extension of every request on the connection.
#[derive(Debug)]
pub struct PeerInfo {
    /// The address of ours that it dialled.
    pub local: SocketAddr,
    /// Its own address.
    pub remote: SocketAddr,
    /// Its verified certificates, leaf first; empty if it showed none.
    pub chain: Vec<rustls::pki_types::CertificateDer<'static>>,
}

impl Connected for TlsConnection {
    type ConnectInfo = Arc<PeerInfo>;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.info.clone()
    }
}

/// Accepts on `listener` until `shutdown`; the configuration is asked for at every connection, so that
/// fresh certificates are used at once. The returned stream ends when the listener has.
pub fn accept(
    listener: TcpListener,
    config: impl Fn() -> Arc<rustls::ServerConfig> + Send + 'static,
    tasks: &mut JoinSet<()>,
    shutdown: CancellationToken,
) -> mpsc::Receiver<io::Result<TlsConnection>> {
    let (ready, receiver) = mpsc::channel(64);
    tasks.spawn(run(listener, config, ready, shutdown));
    receiver
}

async fn run(
    listener: TcpListener,
    config: impl Fn() -> Arc<rustls::ServerConfig> + Send + 'static,
    ready: mpsc::Sender<io::Result<TlsConnection>>,
    shutdown: CancellationToken,
) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = handshakes.join_next() => {}
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES_MAX => match accepted {
                Ok((stream, remote)) => {
                    let acceptor = TlsAcceptor::from(config());
                    let ready = ready.clone();
                    handshakes.spawn(async move {
                        if let Some(connection) = handshake(acceptor, stream, remote).await {
                            // Fails only when the server has stopped.
                            let _ = ready.send(Ok(connection)).await;
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream, remote: SocketAddr) -> Option<TlsConnection> {
    // Small messages both ways: waiting to fill a segment would cost a round trip.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().ok()?;
    match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let chain = stream.get_ref().1.peer_certificates().map(|certs| certs.to_vec()).unwrap_or_default();
            let chain = chain.into_iter().map(|cert| cert.into_owned()).collect();
            Some(TlsConnection { stream, info: Arc::new(PeerInfo { local, remote, chain }) })
        }
        Ok(Err(error)) => {
            tracing::info!(%remote, %error, "TLS handshake refused");
            None
        }
        Err(_) => {
            tracing::info!(%remote, "TLS handshake took longer than {HANDSHAKE_TIMEOUT:?}");
            None
        }
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
