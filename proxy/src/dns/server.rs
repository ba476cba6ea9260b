//! The DNS server's loops: UDP and TCP, bounded, on loopback.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use isthmus_runtime::BindError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::message::{Question, Reply, Transport, Verdict, code_name, encode, read};
use super::upstream::Upstreams;
use super::zone::{self, Lookup};
use crate::discovery::Mesh;
use crate::metrics::Metrics;

/// Questions being answered at most, four times what may be under way to upstreams: the mesh's own
/// names still have room when no upstream answers. Beyond, packets are dropped; askers repeat them.
const IN_FLIGHT_MAX: usize = 512;
/// TCP connections at most: few resolvers use one, and each for a moment.
const CONNECTIONS_MAX: usize = 64;
/// How long a TCP connection may be silent.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest question: a name of 255 bytes and an OPT record with cookies are below 512; clients may pad.
const QUESTION_MAX: usize = 4096;
/// Pause after a failed accept or receive: out of descriptors, most likely.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Where the DNS server listens for a sidecar on `listen`: there if that is loopback, else on
/// 127.0.0.1 and ::1, where captured questions arrive. Never where others could use it to amplify.
pub fn addresses(listen: IpAddr, port: u16) -> Vec<SocketAddr> {
    if listen.is_loopback() {
        return vec![SocketAddr::new(listen, port)];
    }
    vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
}

/// The workload's DNS server.
#[derive(Debug)]
pub struct DnsServer {
    sockets: Vec<(Arc<UdpSocket>, TcpListener)>,
    resolver: Arc<Resolver>,
}

#[derive(Debug)]
struct Resolver {
    mesh: Mesh,
    upstreams: Upstreams,
    metrics: Metrics,
}

impl DnsServer {
    /// Opens UDP and TCP on all of `addresses`; names outside the mesh go to `upstream`, or to the
    /// resolvers of `/etc/resolv.conf` if that is empty.
    ///
    /// # Errors
    /// [`BindError`] for the first address; a further one that this host does not have is left out.
    pub async fn bind(
        addresses: &[SocketAddr],
        upstream: &[SocketAddr],
        mesh: Mesh,
        metrics: Metrics,
    ) -> Result<Self, BindError> {
        let mut sockets = Vec::new();
        for address in addresses {
            match bind_both(*address).await {
                Ok(pair) => sockets.push(pair),
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && !sockets.is_empty() => {
                    tracing::debug!(%address, "no such address here: DNS does not listen on it");
                }
                Err(source) => return Err(BindError { name: "DNS", address: *address, source }),
            }
        }
        let own: Vec<_> = sockets.iter().filter_map(|(udp, _)| udp.local_addr().ok()).collect();
        let resolver = Arc::new(Resolver { mesh, upstreams: Upstreams::new(upstream, &own), metrics });
        Ok(Self { sockets, resolver })
    }

    /// The addresses that were bound.
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|(udp, _)| udp.local_addr().ok()).collect()
    }

    /// Answers until `shutdown` fires. On return no task of this server is left.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut loops = JoinSet::new();
        for (udp, tcp) in self.sockets {
            loops.spawn(serve_udp(udp, Arc::clone(&self.resolver), shutdown.clone()));
            loops.spawn(serve_tcp(tcp, Arc::clone(&self.resolver), shutdown.clone()));
        }
        while loops.join_next().await.is_some() {}
    }
}

async fn bind_both(address: SocketAddr) -> io::Result<(Arc<UdpSocket>, TcpListener)> {
    let tcp = TcpListener::bind(address).await?;
    let udp = UdpSocket::bind(tcp.local_addr()?).await?;
    Ok((Arc::new(udp), tcp))
}

async fn serve_udp(socket: Arc<UdpSocket>, resolver: Arc<Resolver>, shutdown: CancellationToken) {
    let mut answering = JoinSet::new();
    let mut buffer = vec![0; QUESTION_MAX];
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = answering.join_next() => resolver.metrics.dns_in_flight(answering.len()),
            received = socket.recv_from(&mut buffer) => match received {
                Ok(_) if answering.len() >= IN_FLIGHT_MAX => resolver.metrics.dns_answered("other", "DROPPED"),
                Ok((length, from)) => {
                    let packet = buffer[..length].to_vec();
                    answering.spawn(answer_packet(Arc::clone(&resolver), Arc::clone(&socket), packet, from));
                    resolver.metrics.dns_in_flight(answering.len());
                }
                // An ICMP error of an earlier answer, most likely: the asker is gone.
                Err(error) => {
                    tracing::debug!(%error, "DNS receive failed");
                    sleep(ERROR_PAUSE).await;
                }
            }
        }
    }
    answering.shutdown().await;
}

async fn answer_packet(resolver: Arc<Resolver>, socket: Arc<UdpSocket>, packet: Vec<u8>, from: SocketAddr) {
    if let Some(answer) = resolver.answer(&packet, Transport::Udp).await {
        // Lost like any packet: the asker repeats the question.
        let _ = socket.send_to(&answer, from).await;
    }
}

async fn serve_tcp(listener: TcpListener, resolver: Arc<Resolver>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => { connections.spawn(converse(stream, Arc::clone(&resolver))); }
                Err(error) => {
                    tracing::warn!(%error, "DNS accept failed");
                    sleep(ERROR_PAUSE).await;
                }
            }
        }
    }
    connections.shutdown().await;
}

/// Answers one question after the other until the asker leaves, is silent, or sends no question.
async fn converse(mut stream: TcpStream, resolver: Arc<Resolver>) -> Option<()> {
    loop {
        let packet = timeout(IDLE_TIMEOUT, read_framed(&mut stream)).await.ok()?.ok()?;
        let answer = resolver.answer(&packet, Transport::Tcp).await?;
        let length = u16::try_from(answer.len()).ok()?;
        let framed = [&length.to_be_bytes(), &answer[..]].concat();
        timeout(IDLE_TIMEOUT, stream.write_all(&framed)).await.ok()?.ok()?;
    }
}

async fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > QUESTION_MAX {
        return Err(io::Error::other("longer than any question"));
    }
    let mut packet = vec![0; length];
    stream.read_exact(&mut packet).await?;
    Ok(packet)
}

impl Resolver {
    /// The answer to `packet`, if it deserves one.
    async fn answer(&self, packet: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let (message, answer_max, zone) = match read(packet) {
            Verdict::Ignore => return None,
            Verdict::Refuse(message) => (*message, u16::MAX, "other"),
            Verdict::Ask(question) => {
                let zone = if zone::is_mesh_zone(question.host.as_ref()) { "mesh" } else { "other" };
                let reply = self.resolve(&question, transport).await;
                (question.reply(reply), question.answer_max(transport), zone)
            }
        };
        self.metrics.dns_answered(zone, code_name(message.metadata.response_code));
        encode(&message, answer_max)
    }

    async fn resolve(&self, question: &Question, transport: Transport) -> Reply {
        let ask = match zone::lookup(question) {
            Lookup::Reply(reply) => return *reply,
            Lookup::Forward => return self.upstreams.ask(question, transport).await,
            Lookup::Ask(ask) => ask,
        };
        let said = self.mesh.resolve_host(&ask.host).await;
        match zone::answer(question, &ask, &said) {
            Some(reply) => reply,
            None => zone::doubt(&said, self.upstreams.ask(question, transport).await),
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
