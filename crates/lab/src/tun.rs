//! Moves IP packets between clusters: one TUN device in each cluster's namespace, one thread.
//!
//! The thread sleeps until a packet arrives or is due (no spinning; timers to about 100 us, with
//! real-time priority where that is permitted). It forwards only between *public* prefixes: a
//! packet from or to a cluster's private addresses is dropped and counted, as on the internet.
//! What happens to a packet is decided by [`crate::shaper`].

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    os::unix::fs::OpenOptionsExt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};

use crate::{LabError, Netns, Wan, shaper::Fate, timetable::Timetable, wan::ClusterNumber};

/// The emulator's thread and its devices. Dropping it takes the WAN down.
#[derive(Debug)]
pub struct TunWan {
    shared: Arc<Shared>,
    attach: Mutex<mpsc::Sender<Port>>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread counts, apart from the paths' own statistics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TunStats {
    /// Packets from or to an address that the WAN does not carry.
    pub unroutable: u64,
    /// Packets that a device did not take, or that found the emulator full.
    pub refused: u64,
    /// Packets delivered more than [`LATE`] after they were due.
    pub late: u64,
}

#[derive(Debug)]
struct Shared {
    wake: EventFd,
    stop: AtomicBool,
    unroutable: AtomicU64,
    refused: AtomicU64,
    late: AtomicU64,
}

struct Port {
    cluster: ClusterNumber,
    device: File,
}

impl TunWan {
    /// Starts the emulator without clusters.
    ///
    /// # Errors
    /// [`LabError::Io`].
    pub fn start(wan: Wan) -> Result<Self, LabError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| LabError::io("make an event descriptor")(errno.into()))?;
        let zero = AtomicU64::default;
        let shared =
            Arc::new(Shared { wake, stop: AtomicBool::new(false), unroutable: zero(), refused: zero(), late: zero() });
        let (attach, attached) = mpsc::channel();
        let emulator = Emulator {
            wan,
            shared: shared.clone(),
            attached,
            ports: Vec::new(),
            by_cluster: HashMap::new(),
            flights: Timetable::default(),
        };
        let thread = thread::Builder::new()
            .name("lab-wan".into())
            .spawn(move || emulator.run())
            .map_err(LabError::io("start the WAN's thread"))?;
        Ok(Self { shared, attach: Mutex::new(attach), thread: Some(thread) })
    }

    /// Makes the device [`DEVICE`] in a cluster's namespace and joins it to the WAN. The caller
    /// routes [`PUBLIC`] into it.
    ///
    /// # Errors
    /// [`LabError::Kernel`] without `/dev/net/tun` or the right to use it.
    pub fn attach(&self, cluster: ClusterNumber, netns: &Netns) -> Result<(), LabError> {
        let device = netns.run(open_tun)?.map_err(LabError::kernel("make a TUN device from /dev/net/tun"))?;
        netns.queue_len(DEVICE, DEVICE_PACKETS)?;
        netns.up(DEVICE)?;
        let sender = self.attach.lock().unwrap_or_else(PoisonError::into_inner);
        // The thread ends only in `drop`, so somebody receives.
        let _ = sender.send(Port { cluster, device });
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    /// What was counted so far.
    pub fn stats(&self) -> TunStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TunStats {
            unroutable: read(&self.shared.unroutable),
            refused: read(&self.shared.refused),
            late: read(&self.shared.late),
        }
    }
}

impl Drop for TunWan {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The public prefix of a cluster, of the benchmarking range (RFC 2544): `198.18.N.0/24`.
pub fn public_address(cluster: ClusterNumber, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, cluster, host)
}

/// Which cluster has a public address.
fn cluster_of(address: IpAddr) -> Option<ClusterNumber> {
    match address {
        IpAddr::V4(v4) => match v4.octets() {
            [198, 18, cluster, _] if cluster > 0 => Some(cluster),
            _ => None,
        },
        IpAddr::V6(_) => None,
    }
}

struct Emulator {
    wan: Wan,
    shared: Arc<Shared>,
    attached: mpsc::Receiver<Port>,
    ports: Vec<Port>,
    by_cluster: HashMap<ClusterNumber, usize>,
    flights: Timetable<(usize, Box<[u8]>)>,
}

impl Emulator {
    fn run(mut self) {
        prefer_this_thread();
        let mut buffer = vec![0; PACKET_MAX];
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.deliver_due();
            let readable = self.sleep();
            // Before any packet: one that was sent after its target was attached must find it.
            self.take_ports();
            for port in readable {
                self.take_in(port, &mut buffer);
            }
        }
    }

    fn take_ports(&mut self) {
        while let Ok(port) = self.attached.try_recv() {
            self.by_cluster.insert(port.cluster, self.ports.len());
            self.ports.push(port);
        }
    }

    fn deliver_due(&mut self) {
        let now = self.wan.now();
        while let Some((due, (port, packet))) = self.flights.pop_due(now) {
            if now.saturating_sub(due) > LATE {
                self.shared.late.fetch_add(1, Ordering::Relaxed);
            }
            if (&self.ports[port].device).write(&packet).is_err() {
                self.shared.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Sleeps until a packet arrives or is due; gives the ports with packets.
    fn sleep(&self) -> Vec<usize> {
        let timeout = self.flights.next_due().map(|due| TimeSpec::from_duration(due.saturating_sub(self.wan.now())));
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.ports.iter().map(|port| PollFd::new(port.device.as_fd(), PollFlags::POLLIN)));
        // Interrupted or refused: look at the clock again, that is all a caller can do.
        let _ = ppoll(&mut fds, timeout, None);
        let is_ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        if is_ready(&fds[0]) {
            let _ = self.shared.wake.read();
        }
        fds[1..].iter().enumerate().filter(|(_, fd)| is_ready(fd)).map(|(port, _)| port).collect()
    }

    fn take_in(&mut self, port: usize, buffer: &mut [u8]) {
        for _ in 0..READS_PER_TURN {
            let Ok(len) = (&self.ports[port].device).read(buffer) else { return };
            self.offer(port, &buffer[..len]);
        }
    }

    fn offer(&mut self, port: usize, packet: &[u8]) {
        let from = self.ports[port].cluster;
        let route = read_ip(packet).and_then(|ip| {
            let to = cluster_of(ip.destination)?;
            (cluster_of(ip.source)? == from).then_some((to, ip.is_udp))
        });
        let Some((to, is_udp)) = route else {
            self.shared.unroutable.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let Some(target) = self.by_cluster.get(&to).copied() else {
            self.shared.unroutable.fetch_add(1, Ordering::Relaxed);
            return;
        };
        match self.wan.offer(from, to, self.wan.now(), packet.len(), is_udp) {
            Fate::Deliver(at) => self.fly(at, target, packet),
            Fate::Twice(first, second) => {
                self.fly(first, target, packet);
                self.fly(second, target, packet);
            }
            Fate::Drop(_) => {}
        }
    }

    fn fly(&mut self, at: Duration, target: usize, packet: &[u8]) {
        if self.flights.put(at, (target, packet.into())).is_err() {
            self.shared.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct IpHeader {
    source: IpAddr,
    destination: IpAddr,
    is_udp: bool,
}

fn read_ip(packet: &[u8]) -> Option<IpHeader> {
    const UDP: u8 = 17;
    // IPv6 is not carried: a host sends router solicitations by itself, and they go nowhere.
    if packet.first()? >> 4 != 4 {
        return None;
    }
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::from(octets))
    };
    Some(IpHeader { source: address(12)?, destination: address(16)?, is_udp: *packet.get(9)? == UDP })
}

fn open_tun() -> io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: `ifreq` is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(device) }
}

/// Timers as exact as the kernel can, and ahead of the load that is being measured. Both are
/// wishes: without the right to them the emulator works, with later packets.
pub(crate) fn prefer_this_thread() {
    const SLACK_NANOS: libc::c_ulong = 1;
    const PRIORITY: libc::c_int = 10;
    // SAFETY: both calls touch nothing but the scheduling of the calling thread (pid 0).
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NANOS);
        let priority = libc::sched_param { sched_priority: PRIORITY };
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority);
    }
}

/// The emulator's device in a cluster's namespace.
pub const DEVICE: &str = "wan0";
/// What a device keeps while the thread waits for a core: 10,000 packets are 100 ms at 1 Gbit/s. Losses
/// here would be the emulator's own, and nobody asked for them.
const DEVICE_PACKETS: u32 = 10_000;
/// Every cluster's public addresses.
pub const PUBLIC: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 0), 15);
/// Later than this is counted as late.
pub const LATE: Duration = Duration::from_micros(500);
/// Larger than any packet that a device of the lab sends.
const PACKET_MAX: usize = 65_536;
/// After so many packets of one device the others and the due ones get their turn.
const READS_PER_TURN: usize = 64;
