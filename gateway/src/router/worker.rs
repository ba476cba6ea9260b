//! One thread of the packet path: waits for its two sockets, reads batches, sends them on.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use isthmus_tunnel::cid::{CID_LEN, Cid};
use isthmus_tunnel::packet::Packet;
use isthmus_tunnel::route::{Decision, FlowSocket, Hop, LocalTable, route};
use isthmus_tunnel::ticket::TicketTime;
use quinn_udp::{RecvMeta, Transmit};

use super::batch::regroup;
use super::{ControlDatagram, Links, RouterEvent, RouterShared};

/// Buffers of one receive call, of 64 KiB each so that GRO can fill them: 2 MiB a worker.
const BATCH: usize = 32;
const BUFFER_LEN: usize = 64 * 1024;
/// How often an idle worker looks whether it should stop.
const POLL_MS: libc::c_int = 100;

/// One thread of the packet path.
pub(super) struct Worker {
    shared: Arc<RouterShared>,
    index: usize,
    buffers: Vec<u8>,
}

/// Where a run of datagrams goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Local(SocketAddr),
    Link(Hop),
}

/// The last decision that sent something on: packets of one tunnel come in trains.
#[derive(Clone, Copy)]
struct Last {
    dcid: Cid,
    next: Next,
}

impl Worker {
    pub(super) fn new(shared: Arc<RouterShared>, index: usize) -> Self {
        Self { shared, index, buffers: vec![0; BATCH * BUFFER_LEN] }
    }

    pub(super) fn run(mut self) {
        let shared = self.shared.clone();
        let index = self.index;
        let sockets = [FlowSocket::Public, FlowSocket::Dial(index as u8)];
        let mut waits = sockets.map(|socket| libc::pollfd {
            fd: shared.socket(socket, index).socket().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        while !shared.stop.load(Ordering::Relaxed) {
            // SAFETY: `waits` lives across the call and holds as many entries as said; the sockets are open.
            let ready = unsafe { libc::poll(waits.as_mut_ptr(), waits.len() as libc::nfds_t, POLL_MS) };
            if ready <= 0 {
                // Nothing came, or a signal interrupted.
                continue;
            }
            for (socket, wait) in sockets.into_iter().zip(&waits) {
                if wait.revents != 0 {
                    self.receive(socket);
                }
            }
        }
    }

    /// Reads and forwards one batch.
    fn receive(&mut self, socket: FlowSocket) {
        let shared = self.shared.clone();
        let port = shared.socket(socket, self.index);
        let mut meta = [RecvMeta::default(); BATCH];
        let received = {
            let mut chunks = self.buffers.chunks_mut(BUFFER_LEN);
            let mut slices: [IoSliceMut<'_>; BATCH] =
                std::array::from_fn(|_| IoSliceMut::new(chunks.next().expect("as many chunks as the batch has")));
            port.recv(&mut slices, &mut meta)
        };
        // An error is `WouldBlock`, or one that an earlier send left on the socket (ICMP): nothing was received.
        let Ok(count) = received else { return };
        let (local, links) = (shared.local.load(), shared.links.load());
        let now = TicketTime::from_unix_ms(unix_ms());
        let batch = Batch { shared: &shared, index: self.index, socket, local: &local, links: &links, now };
        for (meta, buffer) in meta.iter().zip(self.buffers.chunks(BUFFER_LEN)).take(count) {
            batch.forward(meta, &buffer[..meta.len]);
        }
    }
}

/// What stays the same during one batch.
struct Batch<'a> {
    shared: &'a RouterShared,
    index: usize,
    socket: FlowSocket,
    local: &'a LocalTable,
    links: &'a Links,
    now: TicketTime,
}

impl Batch<'_> {
    fn forward(&self, meta: &RecvMeta, buffer: &[u8]) {
        let counters = &self.shared.counters[self.index];
        counters.batches.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        if let Some(traffic) =
            self.links.table.addresses.get(&meta.addr).and_then(|cluster| self.links.traffic.get(cluster))
        {
            traffic.bytes_in.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            traffic.datagrams_in.fetch_add(buffer.len().div_ceil(meta.stride.max(1)) as u64, Ordering::Relaxed);
        }
        let segments_max = self.shared.public[self.index].gso_segments();
        let mut last = None;
        let decide = |datagram: &[u8]| {
            counters.datagrams.fetch_add(1, Ordering::Relaxed);
            self.decide(meta, datagram, &mut last)
        };
        regroup(buffer, meta.stride, segments_max, decide, |next, range| {
            let segments = range.len().div_ceil(meta.stride.max(1));
            self.send(next, &buffer[range], meta, segments);
        });
    }

    fn decide(&self, meta: &RecvMeta, datagram: &[u8], last: &mut Option<Last>) -> Option<Next> {
        // Short headers of one tunnel follow each other: the same ID from the same address goes the same way.
        let short = datagram.first().is_some_and(|first| first & 0x80 == 0);
        if short
            && let (Some(seen), Some(dcid)) = (*last, datagram.get(1..=CID_LEN))
            && seen.dcid.as_bytes() == dcid
        {
            return Some(seen.next);
        }
        let next = match route(self.local, &self.links.table, meta.addr, datagram, self.now) {
            Decision::Local(address) => Next::Local(address),
            Decision::Link(hop) => Next::Link(hop),
            other => {
                self.handle(other, meta, datagram);
                return None;
            }
        };
        if short && let Some(packet) = Packet::parse(datagram) {
            *last = Some(Last { dcid: packet.dcid, next });
        }
        Some(next)
    }

    /// Everything that is not forwarded.
    fn handle(&self, decision: Decision, meta: &RecvMeta, datagram: &[u8]) {
        let counters = &self.shared.counters[self.index];
        match decision {
            // Taken by the caller.
            Decision::Local(_) | Decision::Link(_) => {}
            Decision::Control => {
                counters.to_control.fetch_add(1, Ordering::Relaxed);
                let payload = Bytes::copy_from_slice(datagram);
                let control = ControlDatagram { from: meta.addr, ecn: meta.ecn, payload };
                if self.shared.control.try_send(control).is_err() {
                    counters.queue_full.fetch_add(1, Ordering::Relaxed);
                }
            }
            Decision::Reflect { answer, peer } => {
                counters.probes.fetch_add(1, Ordering::Relaxed);
                self.shared.socket(self.socket, self.index).send_small(meta.addr, &answer);
                if let Some(probe) = peer {
                    self.event(RouterEvent::Probed { from: meta.addr, socket: self.socket, probe });
                }
            }
            Decision::Answered(probe) => {
                self.event(RouterEvent::Answered { at: Instant::now(), from: meta.addr, probe });
            }
            Decision::Drop(reason) => counters.drop_for(reason),
            Decision::Refuse(reason, refusal) => {
                counters.drop_for(reason);
                self.event(RouterEvent::Refused(reason, refusal));
            }
        }
    }

    fn event(&self, event: RouterEvent) {
        if self.shared.events.try_send(event).is_err() {
            self.shared.counters[self.index].queue_full.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn send(&self, next: Next, contents: &[u8], meta: &RecvMeta, segments: usize) {
        let counters = &self.shared.counters[self.index];
        let (port, destination) = match next {
            Next::Local(address) => {
                counters.to_local.fetch_add(segments as u64, Ordering::Relaxed);
                (&self.shared.public[self.index], address)
            }
            Next::Link(hop) => {
                counters.to_links.fetch_add(segments as u64, Ordering::Relaxed);
                self.count_out(&hop, contents.len(), segments);
                (self.shared.socket(hop.socket, self.index), hop.address)
            }
        };
        let segment_size = (segments > 1).then_some(meta.stride);
        let transmit = Transmit { destination, ecn: meta.ecn, contents, segment_size, src_ip: None };
        counters.sends.fetch_add(1, Ordering::Relaxed);
        match port.try_send(&transmit) {
            Ok(()) => {}
            Err(error) if segments > 1 && error.kind() != io::ErrorKind::WouldBlock => {
                // One of them is too big, an MTU probe at the batch's end for instance, and took the others with it;
                // or the device cannot segment. One by one, only the culprit is lost.
                for contents in contents.chunks(meta.stride) {
                    let transmit = Transmit { destination, ecn: meta.ecn, contents, segment_size: None, src_ip: None };
                    counters.sends.fetch_add(1, Ordering::Relaxed);
                    self.count_failure(port.try_send(&transmit));
                }
            }
            failed => self.count_failure(failed),
        }
    }

    fn count_failure(&self, sent: io::Result<()>) {
        let Err(error) = sent else { return };
        let counters = &self.shared.counters[self.index];
        let counter = match error.raw_os_error() {
            _ if error.kind() == io::ErrorKind::WouldBlock => &counters.egress_full,
            Some(libc::EMSGSIZE) => &counters.too_big,
            _ => &counters.send_failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn count_out(&self, hop: &Hop, bytes: usize, datagrams: usize) {
        let cluster = self.links.table.addresses.get(&hop.address);
        if let Some(traffic) = cluster.and_then(|cluster| self.links.traffic.get(cluster)) {
            traffic.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
            traffic.datagrams_out.fetch_add(datagrams as u64, Ordering::Relaxed);
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
