//! What the workers count. Each writes its own; readers add them up.

use std::sync::atomic::{AtomicU64, Ordering};

use isthmus_tunnel::route::DropReason;
use isthmus_tunnel::socket::{BUFFER_WANTED, UdpPort};

const REASONS: usize = DropReason::ALL.len();

/// Counters of one worker, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCounters {
    pub(super) datagrams: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) sends: AtomicU64,
    pub(super) to_local: AtomicU64,
    pub(super) to_links: AtomicU64,
    pub(super) to_control: AtomicU64,
    pub(super) probes: AtomicU64,
    pub(super) egress_full: AtomicU64,
    pub(super) too_big: AtomicU64,
    pub(super) send_failed: AtomicU64,
    pub(super) queue_full: AtomicU64,
    pub(super) dropped: [AtomicU64; REASONS],
}

impl WorkerCounters {
    pub(super) fn drop_for(&self, reason: DropReason) {
        self.dropped[reason as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// All workers together, since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouterStats {
    /// Datagrams received.
    pub datagrams: u64,
    /// Their payload bytes.
    pub bytes: u64,
    /// Receive batches; datagrams divided by this says what GRO brings.
    pub batches: u64,
    /// Send calls; forwarded datagrams divided by this says what GSO brings.
    pub sends: u64,
    /// Forwarded to sidecars of this cluster or to another replica.
    pub to_local: u64,
    /// Forwarded over links.
    pub to_links: u64,
    /// Handed to control connections.
    pub to_control: u64,
    /// Probes answered.
    pub probes: u64,
    /// Lost because a send buffer was full.
    pub egress_full: u64,
    /// Lost because larger than the path: MTU discovery, mostly.
    pub too_big: u64,
    /// Lost for other errors of the system (no route, for one).
    pub send_failed: u64,
    /// Control datagrams and events lost because their queue was full.
    pub queue_full: u64,
    /// Dropped, by reason.
    pub dropped: Vec<(DropReason, u64)>,
    /// The smallest receive buffer, and what it should be.
    pub receive_buffer: (usize, usize),
    /// Whether segmentation offload works in both directions.
    pub offload: bool,
}

pub(super) fn sum(workers: &[WorkerCounters], ports: &[UdpPort]) -> RouterStats {
    let total = |counter: fn(&WorkerCounters) -> &AtomicU64| -> u64 {
        workers.iter().map(|worker| counter(worker).load(Ordering::Relaxed)).sum()
    };
    let dropped = |reason: DropReason| -> u64 {
        workers.iter().map(|worker| worker.dropped[reason as usize].load(Ordering::Relaxed)).sum()
    };
    RouterStats {
        datagrams: total(|w| &w.datagrams),
        bytes: total(|w| &w.bytes),
        batches: total(|w| &w.batches),
        sends: total(|w| &w.sends),
        to_local: total(|w| &w.to_local),
        to_links: total(|w| &w.to_links),
        to_control: total(|w| &w.to_control),
        probes: total(|w| &w.probes),
        egress_full: total(|w| &w.egress_full),
        too_big: total(|w| &w.too_big),
        send_failed: total(|w| &w.send_failed),
        queue_full: total(|w| &w.queue_full),
        dropped: DropReason::ALL.into_iter().map(|reason| (reason, dropped(reason))).collect(),
        receive_buffer: (ports.iter().map(|port| port.buffers().0).min().unwrap_or(0), BUFFER_WANTED),
        offload: ports.iter().all(|port| port.gso_segments() > 1 && port.gro_segments() > 1),
    }
}
