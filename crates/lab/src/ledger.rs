//! Judges a run of requests: every one sent, seen and answered exactly once, and by the right one.
//!
//! Pure: what the client sent and got ([`Outcome`]) on one side, what the backends wrote down
//! ([`Seen`]) on the other, joined by request id.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
    time::Duration,
};

use serde::Serialize;

use crate::sample::{Answer, Seen};

/// What became of one request, as its client knows it.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its unique `x-request-id`.
    pub request_id: String,
    /// When it was to be sent, since the start of the load.
    pub at: Duration,
    /// From then until the answer's last byte (or the failure).
    pub latency: Duration,
    /// The answer, or why there is none.
    pub result: Result<Answered, Failure>,
}

/// A complete answer of status 2xx from a sample service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// The id that the backend saw.
    pub request_id: String,
    /// Which service.
    pub service: String,
    /// Which instance.
    pub instance: String,
    /// In which cluster.
    pub cluster: String,
}

impl From<Answer> for Answered {
    fn from(answer: Answer) -> Self {
        let Answer { request_id, service, instance, cluster, .. } = answer;
        Self { request_id, service, instance, cluster }
    }
}

/// Why a request has no good answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Another status.
    #[error("status {status}: {body}")]
    Status {
        /// The status.
        status: u16,
        /// The start of the body.
        body: String,
    },
    /// No connection.
    #[error("connect: {0}")]
    Connect(String),
    /// The connection broke.
    #[error("broken: {0}")]
    Broken(String),
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// Not a sample service's answer.
    #[error("not an answer of the sample service: {0}")]
    Foreign(String),
}

/// Both sides of a run.
#[derive(Debug, Default)]
pub struct Ledger {
    outcomes: Vec<Outcome>,
    seen: Vec<Seen>,
}

/// What the ledger says about a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Requests sent.
    pub sent: usize,
    /// Answered well.
    pub answered: usize,
    /// Answered badly or not at all, with the reasons counted.
    pub failed: BTreeMap<String, usize>,
    /// Requests that backends saw more than once.
    pub doubled: Vec<String>,
    /// Answered well, though no backend saw them: somebody else answered.
    pub invented: Vec<String>,
    /// Answered by another service, by another instance than saw it, or with another's answer.
    pub misrouted: Vec<String>,
    /// Failed for the client although a backend saw them: not lost, but not safe to repeat.
    pub seen_but_failed: usize,
    /// Good answers by cluster.
    pub by_cluster: BTreeMap<String, usize>,
}

impl Verdict {
    /// How many failed.
    pub fn failures(&self) -> usize {
        self.failed.values().sum()
    }

    /// Whether everything was answered once by the right one.
    pub fn is_flawless(&self) -> bool {
        self.failures() == 0 && self.is_honest()
    }

    /// Whether nothing was doubled, invented or misrouted; failures are allowed.
    pub fn is_honest(&self) -> bool {
        self.doubled.is_empty() && self.invented.is_empty() && self.misrouted.is_empty()
    }
}

impl Ledger {
    /// A ledger of what a load did.
    pub fn new(outcomes: Vec<Outcome>) -> Self {
        Self { outcomes, seen: Vec::new() }
    }

    /// Adds what a backend wrote down. A last line cut short by a kill is left out.
    ///
    /// # Errors
    /// The file's, or a line (not the last) that is not a [`Seen`].
    pub fn read_seen(&mut self, path: &Path) -> io::Result<()> {
        let text = std::fs::read_to_string(path)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            self.seen.push(serde_json::from_str(line)?);
        }
        Ok(())
    }

    /// Adds one request that a backend saw.
    pub fn add_seen(&mut self, seen: Seen) {
        self.seen.push(seen);
    }

    /// Judges; good answers must come from `service`.
    pub fn judge(&self, service: &str) -> Verdict {
        let mut seen_by: HashMap<&str, Vec<&Seen>> = HashMap::new();
        for seen in &self.seen {
            seen_by.entry(&seen.request_id).or_default().push(seen);
        }
        let mut verdict = Verdict { sent: self.outcomes.len(), ..Verdict::default() };
        for outcome in &self.outcomes {
            let seen = seen_by.get(outcome.request_id.as_str()).map_or(&[][..], Vec::as_slice);
            judge_one(&mut verdict, outcome, seen, service);
        }
        verdict
    }
}

fn judge_one(verdict: &mut Verdict, outcome: &Outcome, seen: &[&Seen], service: &str) {
    let id = &outcome.request_id;
    if seen.len() > 1 {
        verdict.doubled.push(id.clone());
    }
    match &outcome.result {
        Ok(answered) => {
            verdict.answered += 1;
            *verdict.by_cluster.entry(answered.cluster.clone()).or_default() += 1;
            let by_who_saw = seen.iter().any(|seen| seen.instance == answered.instance);
            if seen.is_empty() {
                verdict.invented.push(id.clone());
            } else if !by_who_saw || answered.request_id != *id || answered.service != service {
                verdict.misrouted.push(id.clone());
            }
        }
        Err(failure) => {
            *verdict.failed.entry(failure.to_string()).or_default() += 1;
            verdict.seen_but_failed += usize::from(!seen.is_empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(id: &str, instance: &str) -> Outcome {
        let [request_id, service] = [id, "cart"].map(str::to_owned);
        let answered = Answered { request_id, service, instance: instance.into(), cluster: "a".into() };
        Outcome { request_id: id.into(), at: Duration::ZERO, latency: Duration::ZERO, result: Ok(answered) }
    }

    fn seen(id: &str, instance: &str) -> Seen {
        let [request_id, instance, service, method] = [id, instance, "cart", "GET"].map(str::to_owned);
        Seen { request_id, instance, service, method }
    }

    fn judge(outcomes: &[Outcome], seen: &[Seen]) -> Verdict {
        Ledger { outcomes: outcomes.to_vec(), seen: seen.to_vec() }.judge("cart")
    }

    #[test]
    fn a_request_seen_and_answered_once_by_the_same_instance_is_flawless() {
        let verdict = judge(&[outcome("1", "x")], &[seen("1", "x")]);
        assert!(verdict.is_flawless(), "{verdict:?}");
        assert_eq!(verdict.by_cluster["a"], 1);
    }

    #[test]
    fn each_flaw_is_found() {
        let verdict = judge(&[outcome("1", "x")], &[seen("1", "x"), seen("1", "y")]);
        assert_eq!(verdict.doubled, ["1"]);
        assert_eq!(judge(&[outcome("1", "x")], &[]).invented, ["1"]);
        assert_eq!(judge(&[outcome("1", "x")], &[seen("1", "y")]).misrouted, ["1"]);

        let mut swapped = outcome("1", "x");
        swapped.result.as_mut().unwrap().request_id = "2".into();
        assert_eq!(judge(&[swapped], &[seen("1", "x")]).misrouted, ["1"]);

        let failed = Outcome { result: Err(Failure::Timeout), ..outcome("1", "x") };
        let verdict = judge(&[failed], &[seen("1", "x")]);
        assert_eq!((verdict.failures(), verdict.seen_but_failed, verdict.is_honest()), (1, 1, true));
    }

    #[test]
    fn a_line_cut_short_by_a_kill_is_left_out_and_a_broken_one_is_an_error() {
        let path = std::env::temp_dir().join(format!("ledger-test-{}", std::process::id()));
        let line = serde_json::to_string(&seen("1", "x")).unwrap();
        std::fs::write(&path, format!("{line}\n{}", &line[..9])).unwrap();
        let mut ledger = Ledger::default();
        ledger.read_seen(&path).unwrap();
        assert_eq!(ledger.seen.len(), 1);
        std::fs::write(&path, format!("{}\n{line}\n", &line[..9])).unwrap();
        assert!(ledger.read_seen(&path).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
