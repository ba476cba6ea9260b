//! Dial tickets: asked for in batches, used once each, thrown away before they expire.
//!
//! [`TicketCache`] is pure; [`Tickets`] adds the clock and the waiting. Who asks the gateways: `super::client`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_model::ClusterId;
use isthmus_tunnel::Cid;
use isthmus_tunnel::cid::EndpointName;
use isthmus_wire::discovery as wire;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::watch;

/// Tickets asked for at once: one dial, its retries, and the tunnels that replace it soon after.
const BATCH: u32 = 4;
/// Asked again when no answer came for this long: the gateway that was asked may be gone.
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// Longest wait for a ticket: an answer takes a round trip inside the cluster.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// A refusal is believed for this long.
const REFUSAL_HOLDS: Duration = Duration::from_millis(500);
/// Tickets are not used in their last seconds: the way to the destination takes time.
const MARGIN: Duration = Duration::from_secs(8);
/// Endpoints with tickets or questions; what has expired makes room.
const ENDPOINTS_MAX: usize = 4096;

type Key = (ClusterId, EndpointName);

/// Why there is no ticket. Nothing was sent to the endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TicketError {
    /// The own gateway would not mint one.
    #[error("the gateway gives no ticket to cluster {cluster}: {reason}")]
    Refused {
        /// The destination.
        cluster: ClusterId,
        /// The gateway's word: `not_exported`, `no_link`, ...
        reason: String,
    },
    /// No gateway answered.
    #[error("no gateway answered the question for a ticket; is one of this cluster up?")]
    Unanswered,
}

impl TicketError {
    /// A fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "ticket_refused",
            Self::Unanswered => "ticket_unanswered",
        }
    }
}

/// Tickets at hand and questions asked. Reads no clock.
#[derive(Debug, Default)]
pub struct TicketCache {
    endpoints: FxHashMap<Key, Batch>,
}

#[derive(Debug, Default)]
struct Batch {
    tickets: Vec<(Cid, Instant)>,
    asked: Option<Instant>,
    refused: Option<(String, Instant)>,
}

/// What [`TicketCache::take`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// A ticket.
    Ticket(Cid),
    /// None, and the gateway said why.
    Refused(String),
    /// None: a question is open. `true` if it is to be asked now.
    Wait(bool),
}

impl TicketCache {
    /// A ticket for `key`, if one is left.
    pub fn take(&mut self, key: Key, now: Instant) -> Taken {
        if self.endpoints.len() >= ENDPOINTS_MAX && !self.endpoints.contains_key(&key) {
            self.endpoints.retain(|_, batch| batch.is_live(now));
        }
        let batch = self.endpoints.entry(key).or_default();
        batch.tickets.retain(|(_, expires)| *expires > now);
        if let Some((ticket, _)) = batch.tickets.pop() {
            return Taken::Ticket(ticket);
        }
        if let Some((reason, until)) = &batch.refused {
            if *until > now {
                return Taken::Refused(reason.clone());
            }
            batch.refused = None;
        }
        let ask = batch.asked.is_none_or(|asked| now >= asked + ASK_AGAIN);
        if ask {
            batch.asked = Some(now);
        }
        Taken::Wait(ask)
    }

    /// A gateway answered.
    pub fn told(&mut self, answer: &wire::Tickets, now: Instant) {
        let Some(key) = key_of(answer) else { return };
        // Nobody asked: tickets that come unbidden would fill the table.
        let Some(batch) = self.endpoints.get_mut(&key) else { return };
        batch.asked = None;
        if !answer.refused.is_empty() {
            batch.refused = Some((answer.refused.chars().take(64).collect(), now + REFUSAL_HOLDS));
            return;
        }
        let valid = Duration::from_secs(answer.valid_s.into()).saturating_sub(MARGIN);
        let tickets = answer.tickets.iter().filter_map(|bytes| Cid::from_slice(bytes)).take(16);
        batch.tickets.extend(tickets.map(|ticket| (ticket, now + valid)));
    }

    /// The endpoint is no more.
    pub fn forget(&mut self, key: &Key) {
        self.endpoints.remove(key);
    }
}

impl Batch {
    fn is_live(&self, now: Instant) -> bool {
        self.tickets.iter().any(|(_, expires)| *expires > now) || self.asked.is_some_and(|asked| asked + WAIT_MAX > now)
    }
}

fn key_of(answer: &wire::Tickets) -> Option<Key> {
    let cluster = ClusterId(answer.cluster_id.try_into().ok()?);
    Some((cluster, EndpointName { handle: answer.handle, incarnation: answer.incarnation.try_into().ok()? }))
}

/// Tickets, shared by all that dial.
#[derive(Debug, Clone)]
pub struct Tickets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cache: Mutex<TicketCache>,
    /// Questions that no session has taken yet; bounded by the endpoints with open questions.
    questions: Mutex<Vec<wire::TicketRequest>>,
    asked: watch::Sender<u64>,
    told: watch::Sender<u64>,
}

impl Default for Tickets {
    fn default() -> Self {
        let (asked, told) = (watch::Sender::new(0), watch::Sender::new(0));
        Self(Arc::new(Inner { cache: Mutex::default(), questions: Mutex::default(), asked, told }))
    }
}

impl Tickets {
    /// One unused ticket for `name` of `cluster`, asked for if there is none.
    ///
    /// # Errors
    /// [`TicketError`].
    pub async fn take(&self, cluster: ClusterId, name: EndpointName) -> Result<Cid, TicketError> {
        let mut told = self.0.told.subscribe();
        let deadline = tokio::time::Instant::now() + WAIT_MAX;
        loop {
            match self.0.cache.lock().take((cluster, name), Instant::now()) {
                Taken::Ticket(ticket) => return Ok(ticket),
                Taken::Refused(reason) => return Err(TicketError::Refused { cluster, reason }),
                Taken::Wait(true) => self.ask(cluster, name),
                Taken::Wait(false) => {}
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(TicketError::Unanswered);
            }
            // Woken by any answer, or when it is time to ask again.
            let _ = tokio::time::timeout(ASK_AGAIN, told.changed()).await;
        }
    }

    /// A gateway answered.
    pub fn told(&self, answer: &wire::Tickets) {
        self.0.cache.lock().told(answer, Instant::now());
        self.0.told.send_modify(|count| *count += 1);
    }

    /// The endpoint is no more.
    pub fn forget(&self, cluster: ClusterId, name: EndpointName) {
        self.0.cache.lock().forget(&(cluster, name));
    }

    /// Questions for a session to ask; each is given out once.
    pub fn questions(&self) -> Vec<wire::TicketRequest> {
        std::mem::take(&mut self.0.questions.lock())
    }

    /// Changes when there are new questions.
    pub fn asked(&self) -> watch::Receiver<u64> {
        self.0.asked.subscribe()
    }

    fn ask(&self, cluster: ClusterId, name: EndpointName) {
        let question = wire::TicketRequest {
            cluster_id: cluster.0.into(),
            handle: name.handle,
            incarnation: name.incarnation.into(),
            count: BATCH,
        };
        {
            let mut questions = self.0.questions.lock();
            if !questions.contains(&question) && questions.len() < ENDPOINTS_MAX {
                questions.push(question);
            }
        }
        self.0.asked.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: EndpointName = EndpointName { handle: 7, incarnation: 1 };
    const KEY: Key = (ClusterId(2), NAME);

    fn answer(count: u8, refused: &str) -> wire::Tickets {
        wire::Tickets {
            cluster_id: 2,
            handle: 7,
            incarnation: 1,
            tickets: (0..count).map(|n| vec![n; 20]).collect(),
            valid_s: 60,
            refused: refused.into(),
        }
    }

    #[test]
    fn each_ticket_is_used_once_and_not_after_its_time() {
        let start = Instant::now();
        let mut cache = TicketCache::default();
        assert_eq!(cache.take(KEY, start), Taken::Wait(true));
        assert_eq!(cache.take(KEY, start), Taken::Wait(false), "asked already");
        cache.told(&answer(2, ""), start);
        let first = cache.take(KEY, start);
        let second = cache.take(KEY, start);
        assert!(matches!((&first, &second), (Taken::Ticket(_), Taken::Ticket(_))) && first != second);
        assert_eq!(cache.take(KEY, start), Taken::Wait(true));
        cache.told(&answer(2, ""), start);
        assert_eq!(cache.take(KEY, start + Duration::from_secs(53)), Taken::Wait(true), "expired");
    }

    #[test]
    fn a_refusal_holds_for_a_moment_and_a_silent_gateway_is_asked_again() {
        let start = Instant::now();
        let mut cache = TicketCache::default();
        cache.take(KEY, start);
        assert_eq!(cache.take(KEY, start + ASK_AGAIN), Taken::Wait(true));
        cache.told(&answer(0, "not_exported"), start);
        assert_eq!(cache.take(KEY, start), Taken::Refused("not_exported".into()));
        assert_eq!(cache.take(KEY, start + REFUSAL_HOLDS), Taken::Wait(true));
    }

    #[test]
    fn tickets_nobody_asked_for_are_dropped() {
        let mut cache = TicketCache::default();
        cache.told(&answer(4, ""), Instant::now());
        assert!(cache.endpoints.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dial_waits_for_the_gateways_answer() {
        let tickets = Tickets::default();
        let mut asked = tickets.asked();
        let gateway = async {
            asked.changed().await.expect("a question");
            assert_eq!(tickets.questions().len(), 1);
            tickets.told(&answer(1, ""));
        };
        let (ticket, ()) = tokio::join!(tickets.take(ClusterId(2), NAME), gateway);
        ticket.expect("a ticket");
    }
}
