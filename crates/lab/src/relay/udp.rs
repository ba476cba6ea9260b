//! Datagrams across the loopback WAN.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};

use super::{Gateways, relay_address};
use crate::{LabError, Wan, shaper::Fate, timetable::Timetable, tun::prefer_this_thread, wan::ClusterNumber};

/// The thread that relays datagrams.
#[derive(Debug)]
pub(super) struct UdpRelay {
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    open: std::sync::Mutex<mpsc::Sender<Front>>,
    thread: Option<JoinHandle<()>>,
}

impl UdpRelay {
    pub(super) fn start(wan: Wan, gateways: Gateways) -> Result<Self, LabError> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| LabError::io("make an event descriptor")(errno.into()))?;
        let (wake, stop) = (Arc::new(event), Arc::new(AtomicBool::new(false)));
        let (open, opened) = mpsc::channel();
        let carrier = Carrier {
            wan,
            gateways,
            wake: wake.clone(),
            stop: stop.clone(),
            opened,
            fronts: Vec::new(),
            by_key: HashMap::new(),
            flights: Timetable::default(),
        };
        let thread = thread::Builder::new()
            .name("lab-relay-udp".into())
            .spawn(move || carrier.run())
            .map_err(LabError::io("start the relay's thread"))?;
        Ok(Self { wake, stop, open: std::sync::Mutex::new(open), thread: Some(thread) })
    }

    /// Binds the relay of a gateway's port now, so that the caller learns if it is taken.
    pub(super) fn open(&self, local: Ipv4Addr, port: u16) -> Result<(), LabError> {
        let relay = SocketAddrV4::new(relay_address(local), port);
        let front = Front::bind(local, port).map_err(LabError::io(format!("bind the relay {relay}/udp")))?;
        let sender = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The thread ends only in `drop`, so somebody receives.
        let _ = sender.send(front);
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One socket on a relay address: what it receives is for `local:port`; what the gateway there
/// sent from that port leaves by it.
#[derive(Debug)]
struct Front {
    local: Ipv4Addr,
    port: u16,
    socket: UdpSocket,
}

impl Front {
    fn bind(local: Ipv4Addr, port: u16) -> io::Result<Self> {
        let socket = UdpSocket::bind(SocketAddrV4::new(relay_address(local), port))?;
        socket.set_nonblocking(true)?;
        let raw = socket2::SockRef::from(&socket);
        // Wishes: the system may cap them (net.core.rmem_max), and small bursts need none of it.
        let _ = raw.set_recv_buffer_size(BUFFER_BYTES);
        let _ = raw.set_send_buffer_size(BUFFER_BYTES);
        Ok(Self { local, port, socket })
    }
}

struct Carrier {
    wan: Wan,
    gateways: Gateways,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    opened: mpsc::Receiver<Front>,
    fronts: Vec<Front>,
    by_key: HashMap<(Ipv4Addr, u16), usize>,
    /// By which front, to where, what.
    flights: Timetable<(usize, SocketAddrV4, Box<[u8]>)>,
}

impl Carrier {
    fn run(mut self) {
        prefer_this_thread();
        let mut buffer = vec![0; DATAGRAM_MAX];
        while !self.stop.load(Ordering::Relaxed) {
            let now = self.wan.now();
            while let Some((_, (by, to, datagram))) = self.flights.pop_due(now) {
                // A full or closed receiver loses the datagram, as on any network.
                let _ = self.fronts[by].socket.send_to(&datagram, to);
            }
            let readable = self.sleep();
            // Before any datagram: its sender's front must be known.
            while let Ok(front) = self.opened.try_recv() {
                self.by_key.insert((front.local, front.port), self.fronts.len());
                self.fronts.push(front);
            }
            for front in readable {
                self.take_in(front, &mut buffer);
            }
        }
    }

    fn sleep(&self) -> Vec<usize> {
        let timeout = self.flights.next_due().map(|due| TimeSpec::from_duration(due.saturating_sub(self.wan.now())));
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.fronts.iter().map(|front| PollFd::new(front.socket.as_fd(), PollFlags::POLLIN)));
        let _ = ppoll(&mut fds, timeout, None);
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        if is_ready(&fds[0]) {
            let _ = self.wake.read();
        }
        fds[1..].iter().enumerate().filter(|(_, fd)| is_ready(fd)).map(|(front, _)| front).collect()
    }

    fn take_in(&mut self, front: usize, buffer: &mut [u8]) {
        for _ in 0..READS_PER_TURN {
            // A refused earlier datagram is reported here as an error too: ask again next time.
            let Ok((len, SocketAddr::V4(source))) = self.fronts[front].socket.recv_from(buffer) else { return };
            self.offer(front, source, &buffer[..len]);
        }
    }

    fn offer(&mut self, front: usize, source: SocketAddrV4, datagram: &[u8]) {
        let to = SocketAddrV4::new(self.fronts[front].local, self.fronts[front].port);
        let clusters = |a, b| -> Option<(ClusterNumber, ClusterNumber)> {
            Some((self.gateways.cluster_of(a)?, self.gateways.cluster_of(b)?))
        };
        // Only gateways are on the WAN.
        let Some((from_cluster, to_cluster)) = clusters(*source.ip(), *to.ip()) else { return };
        let Some(by) = self.front_of(source) else { return };
        let fate = self.wan.offer(from_cluster, to_cluster, self.wan.now(), datagram.len() + IP_UDP_BYTES, true);
        let copies = match fate {
            Fate::Deliver(at) => [Some(at), None],
            Fate::Twice(first, second) => [Some(first), Some(second)],
            Fate::Drop(_) => [None, None],
        };
        for at in copies.into_iter().flatten() {
            let _ = self.flights.put(at, (by, to, datagram.into()));
        }
    }

    /// The front by which a gateway's socket is seen abroad; made when it first sends.
    fn front_of(&mut self, source: SocketAddrV4) -> Option<usize> {
        let key = (*source.ip(), source.port());
        if let Some(known) = self.by_key.get(&key) {
            return Some(*known);
        }
        if self.fronts.len() >= FRONTS_MAX {
            return None;
        }
        self.fronts.push(Front::bind(key.0, key.1).ok()?);
        self.by_key.insert(key, self.fronts.len() - 1);
        Some(self.fronts.len() - 1)
    }
}

/// A link has at most 8 flows and a demo a handful of gateways, restarted a few times.
const FRONTS_MAX: usize = 2_048;
const DATAGRAM_MAX: usize = 65_536;
const READS_PER_TURN: usize = 64;
/// A 50 ms burst at 600 Mbit/s.
const BUFFER_BYTES: usize = 4 << 20;
/// Headers that a rate counts too.
const IP_UDP_BYTES: usize = 28;
