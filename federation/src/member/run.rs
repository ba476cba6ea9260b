//! The member's thread: takes requests, ticks, turns the driver, publishes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{Committed, MemberConfig, MemberHandle, ProposeError, QUEUE_MAX, Request, Status, Transport};
use crate::raft::driver::{Driver, Output, RequestId, SNAPSHOT_ENTRIES, Setup};
use crate::registry::Registry;
use crate::store::StoreError;
use crate::store::disk::DiskStore;
use crate::verify::Certificates;

/// A member, opened and not yet running.
pub struct Member {
    driver: Driver<DiskStore>,
    requests: Receiver<Request>,
    registry: watch::Sender<Arc<Registry>>,
    status: watch::Sender<Status>,
    transport: Arc<dyn Transport>,
    tick: Duration,
}

impl Member {
    /// Opens the store, checks it whole and replays it. Blocks for as long as that takes.
    ///
    /// # Errors
    /// [`StoreError`]: the file is damaged, another cluster's, or open elsewhere. The process must not go
    /// on as this member then; gateways without a member serve from the other replicas.
    pub fn open(config: MemberConfig, transport: Arc<dyn Transport>) -> Result<(Self, MemberHandle), StoreError> {
        let store = DiskStore::open(&config.dir, &config.mesh, config.cluster.as_str())?;
        let setup = Setup {
            mesh: config.mesh.clone(),
            id: config.cluster_id,
            init: config.init.clone(),
            seed: rand::random(),
            tick_ms: u64::try_from(config.tick.as_millis()).unwrap_or(u64::MAX),
            snapshot_entries: SNAPSHOT_ENTRIES,
            verify: Arc::new(Certificates),
        };
        let mut driver = Driver::open(setup, store)?;
        // What is committed on disk is applied before anybody reads the registry.
        driver.turn();
        let (registry, registry_watch) = watch::channel(Arc::new(driver.registry().clone()));
        let (status, status_watch) = watch::channel(driver.status());
        let (sender, requests) = mpsc::sync_channel(QUEUE_MAX);
        let tick = config.tick;
        let handle = MemberHandle {
            requests: Some(sender),
            registry: registry_watch,
            status: status_watch,
            transport: transport.clone(),
            config: Arc::new(config),
        };
        Ok((Self { driver, requests, registry, status, transport, tick }, handle))
    }

    /// Runs until `shutdown` fires; hands the lead over first, if it leads.
    ///
    /// The work happens on a thread of its own, since every turn may wait for a disk.
    pub async fn run(self, shutdown: CancellationToken) {
        let status = self.status.clone();
        // Awaited right here: on return the thread is gone and the file is closed.
        let worked = tokio::task::spawn_blocking(move || self.work(&shutdown)).await;
        if let Err(error) = worked {
            let text = format!("the member's thread ended: {error}");
            tracing::error!(%error, "the member's thread ended");
            status.send_modify(|status| status.failed = Some(text));
        }
    }

    fn work(mut self, shutdown: &CancellationToken) {
        let mut waiting = Waiting::default();
        let mut next_tick = Instant::now() + self.tick;
        let mut handing_over: Option<Instant> = None;
        loop {
            if shutdown.is_cancelled() {
                let since = *handing_over.get_or_insert_with(|| {
                    self.driver.transfer_leader();
                    Instant::now()
                });
                if !self.driver.leads() || since.elapsed() > HAND_OVER_MAX {
                    return;
                }
            }
            let wait = next_tick.saturating_duration_since(Instant::now());
            match self.requests.recv_timeout(wait) {
                Ok(request) => {
                    self.take(request, &mut waiting);
                    // Whatever else has come meanwhile shares this turn's disk write.
                    for request in self.requests.try_iter().take(QUEUE_MAX).collect::<Vec<_>>() {
                        self.take(request, &mut waiting);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Every handle is gone: nobody can ask any more, but the group still counts on this voter.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(wait),
            }
            let now = Instant::now();
            if now >= next_tick {
                self.driver.tick(unix_s());
                // After a pause (a stopped process) time starts anew: no burst of ticks, no early election.
                next_tick = (next_tick + self.tick).max(now);
            }
            self.driver.turn();
            self.driver.tidy();
            self.publish(&mut waiting);
        }
    }

    fn take(&mut self, request: Request, waiting: &mut Waiting) {
        let driver = &mut self.driver;
        // A caller that has gone away misses its answer, nothing else.
        match request {
            Request::Deliver(from, frame, reply) => drop(reply.send(driver.deliver(from, &frame))),
            Request::Propose(entry, reply) => driver.propose(waiting.proposal(reply), &entry),
            Request::ReadIndex(reply) => driver.read_index(waiting.read(reply)),
            Request::Serve(request, reply) => drop(reply.send(driver.serve_follow(&request).into_iter().collect())),
            Request::Follow(reply) => drop(reply.send(driver.follow_request())),
            Request::Followed(from, frame, reply) => drop(reply.send(driver.followed(from, frame))),
            Request::MintWorkload { hash, account, expires_unix_s, reply } => {
                drop(reply.send(driver.store_mut().mint(hash, account, expires_unix_s, unix_s())));
            }
            Request::UseWorkload { hash, reply } => drop(reply.send(driver.store_mut().redeem(hash, unix_s()))),
            Request::TransferLeader(reply) => {
                driver.transfer_leader();
                let _ = reply.send(());
            }
        }
    }

    fn publish(&mut self, waiting: &mut Waiting) {
        // Before the answers: who hears that a write is done finds it in the registry.
        let applied = self.driver.registry();
        if self.registry.borrow().index != applied.index {
            self.registry.send_replace(Arc::new(applied.clone()));
        }
        while let Some(output) = self.driver.poll_output() {
            match output {
                Output::Send(to, frame) => self.transport.send(to, frame),
                Output::Proposed(request, result) => {
                    if let Some(reply) = waiting.proposals.remove(&request) {
                        drop(reply.send(result));
                    }
                }
                Output::Read(request, result) => {
                    if let Some(reply) = waiting.reads.remove(&request) {
                        drop(reply.send(result));
                    }
                }
            }
        }
        let now = self.driver.status();
        self.status.send_if_modified(|status| {
            let changed = *status != now;
            if let (Some(why), None) = (&now.failed, &status.failed) {
                tracing::error!(%why, "the registry's member stopped; traffic goes on with what is known");
            }
            *status = now;
            changed
        });
    }
}

/// How long a leader that shuts down waits for its successor: an election and a round trip.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);

type Reply<T> = oneshot::Sender<Result<T, ProposeError>>;

/// Callers whose answers are not there yet; the driver bounds how many.
#[derive(Default)]
struct Waiting {
    last: RequestId,
    proposals: HashMap<RequestId, Reply<Committed>>,
    reads: HashMap<RequestId, Reply<u64>>,
}

impl Waiting {
    fn proposal(&mut self, reply: Reply<Committed>) -> RequestId {
        self.last += 1;
        self.proposals.insert(self.last, reply);
        self.last
    }

    fn read(&mut self, reply: Reply<u64>) -> RequestId {
        self.last += 1;
        self.reads.insert(self.last, reply);
        self.last
    }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
