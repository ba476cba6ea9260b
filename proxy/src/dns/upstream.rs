//! Asks the resolvers that this machine would ask without us.
//!
//! Every question goes out under a random number from a socket of its own, connected to the upstream:
//! a forged answer has to guess 32 bits within the round trip.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::cache::Cache;
use super::message::{Question, Reply, Transport, UDP_ANSWER_MAX};

/// Where the system's resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Upstreams that are tried, as glibc does (MAXNS).
const UPSTREAMS_MAX: usize = 3;
/// How long one upstream may take: three of them stay below the 5 s after which a resolver asks again.
const UPSTREAM_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Questions under way at most: each holds a descriptor and a buffer of 1,232 bytes.
const IN_FLIGHT_MAX: usize = 128;

/// The resolvers outside the mesh.
#[derive(Debug)]
pub struct Upstreams {
    servers: Vec<SocketAddr>,
    /// The one that answered last is asked first.
    preferred: AtomicUsize,
    in_flight: Semaphore,
    cache: Mutex<Cache>,
}

impl Upstreams {
    /// Asks `configured`; if that is empty, the name servers of `/etc/resolv.conf`. Our own addresses
    /// among them are left out: a question must not come back to us.
    pub fn new(configured: &[SocketAddr], own: &[SocketAddr]) -> Self {
        let found = if configured.is_empty() {
            name_servers().into_iter().map(|ip| SocketAddr::new(ip, 53)).collect()
        } else {
            configured.to_vec()
        };
        let servers: Vec<_> = found.into_iter().filter(|server| !own.contains(server)).take(UPSTREAMS_MAX).collect();
        if servers.is_empty() {
            tracing::warn!("no upstream resolver: names outside the mesh answer SERVFAIL; set `dns.upstream`");
        }
        Self {
            servers,
            preferred: AtomicUsize::new(0),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            cache: Mutex::default(),
        }
    }

    /// What the upstreams say to `question`; SERVFAIL if none answers in time or too many are asked.
    pub async fn ask(&self, question: &Question, transport: Transport) -> Reply {
        if let Some(kept) = self.cache.lock().find(question, Instant::now()) {
            return kept;
        }
        // Not queued: the asker's own timeout runs, and what waits is asked again.
        let Ok(_permit) = self.in_flight.try_acquire() else { return Reply::code(ResponseCode::ServFail) };
        let first = self.preferred.load(Relaxed);
        let mut last = Reply::code(ResponseCode::ServFail);
        for turn in 0..self.servers.len() {
            let index = (first + turn) % self.servers.len();
            let asked = timeout(UPSTREAM_TIMEOUT, ask_one(self.servers[index], question, transport)).await;
            match asked {
                Ok(Ok(reply)) if matches!(reply.code, ResponseCode::ServFail | ResponseCode::Refused) => last = reply,
                Ok(Ok(reply)) => {
                    self.preferred.store(index, Relaxed);
                    self.cache.lock().store(question, &reply, Instant::now());
                    return reply;
                }
                Ok(Err(error)) => tracing::debug!(server = %self.servers[index], %error, "upstream resolver failed"),
                Err(_) => tracing::debug!(server = %self.servers[index], "upstream resolver did not answer in time"),
            }
        }
        last
    }
}

/// The name servers of `/etc/resolv.conf`; none if it cannot be read.
pub fn name_servers() -> Vec<IpAddr> {
    std::fs::read_to_string(RESOLV_CONF).map(|text| parse_resolv_conf(&text)).unwrap_or_default()
}

fn parse_resolv_conf(text: &str) -> Vec<IpAddr> {
    let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver"));
    lines
        .filter_map(|rest| {
            rest.split_whitespace().next().filter(|_| rest.starts_with(char::is_whitespace))?.parse().ok()
        })
        .take(UPSTREAMS_MAX)
        .collect()
}

async fn ask_one(server: SocketAddr, question: &Question, transport: Transport) -> io::Result<Reply> {
    let id = rand::random();
    let packet = question.forward(id).to_vec().map_err(io::Error::other)?;
    match transport {
        Transport::Udp => ask_udp(server, question, id, &packet).await,
        Transport::Tcp => ask_tcp(server, question, id, &packet).await,
    }
}

async fn ask_udp(server: SocketAddr, question: &Question, id: u16, packet: &[u8]) -> io::Result<Reply> {
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(packet).await?;
    let mut buffer = vec![0; usize::from(UDP_ANSWER_MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything else is an old or a forged answer: the right one may still come.
        if let Some(reply) = question.read_answer(&buffer[..length], id) {
            return Ok(reply);
        }
    }
}

async fn ask_tcp(server: SocketAddr, question: &Question, id: u16, packet: &[u8]) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(packet.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), packet].concat()).await?;
    let mut answer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    question.read_answer(&answer, id).ok_or_else(|| io::Error::other("the answer is to another question"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_system_reads_them() {
        let text = "# nameserver 1.1.1.1\nsearch shop.svc\n nameserver 10.0.0.2 # first\nnameserver\tfd00::53\n\
            nameservers 9.9.9.9\nnameserver x\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n";
        let expected = ["10.0.0.2", "fd00::53", "10.0.0.3"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(parse_resolv_conf(text), expected);
    }

    #[test]
    fn we_never_ask_ourselves() {
        let own = "127.0.0.1:15053".parse().unwrap();
        let other = "127.0.0.2:53".parse().unwrap();
        assert_eq!(Upstreams::new(&[own, other], &[own]).servers, [other]);
    }
}
