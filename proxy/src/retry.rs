//! Whether a failed try may be followed by another. Pure: `now` comes in.
//!
//! By default a request is tried again only where the server provably did not process it, or its method
//! is idempotent and no byte of the response was passed on. An explicit policy means what it says in Istio.

use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode};
use isthmus_model::route::RetryPolicy;

/// Tries after the first where nothing else is said (Istio's default).
const ATTEMPTS_DEFAULT: u32 = 2;
/// Tries of one request that nobody processed: enough to leave a cluster whose sidecars all died.
const UNPROCESSED_ATTEMPTS_MAX: u32 = 8;
/// Longest explicit `attempts` that is honoured: each is a full request to somebody.
const ATTEMPTS_MAX: u32 = 16;

/// Why a try failed.
#[derive(Debug, Clone, Copy)]
pub enum Failure<'a> {
    /// No connection to the endpoint.
    Connect,
    /// The endpoint's sidecar says that its workload never saw the request.
    Refused,
    /// The connection broke after the request was sent, before an answer.
    Lost,
    /// No answer within `per_try_timeout`.
    TryTimeout,
    /// An answer with this status and head.
    Status(StatusCode, &'a HeaderMap),
}

/// The state of one request's retries.
#[derive(Debug)]
pub struct Retries<'a> {
    policy: Option<&'a RetryPolicy>,
    idempotent: bool,
    attempts: u32,
    unprocessed: u32,
}

impl<'a> Retries<'a> {
    /// For a request with `method` under `policy`.
    pub fn new(policy: Option<&'a RetryPolicy>, method: &Method) -> Self {
        // RFC 9110 §9.2.2.
        let idempotent = method.is_idempotent();
        Self { policy, idempotent, attempts: 0, unprocessed: 0 }
    }

    /// Whether to try again after `failure`; counts the retry if so. The caller has made sure that the
    /// request's body can be sent again.
    pub fn again(&mut self, failure: Failure<'_>, budget: &mut Budget, now: Instant) -> bool {
        if matches!(failure, Failure::Connect | Failure::Refused) && self.attempts_max() > 0 {
            // Nobody processed it: no load on anybody, so the budget is not asked.
            self.unprocessed += 1;
            return self.unprocessed <= self.attempts_max().max(UNPROCESSED_ATTEMPTS_MAX);
        }
        let wanted = match self.policy {
            Some(policy) => matches(policy, failure),
            None => self.idempotent && matches!(failure, Failure::Lost),
        };
        if !wanted || self.attempts >= self.attempts_max() || !budget.withdraw(now) {
            return false;
        }
        self.attempts += 1;
        true
    }

    /// Retries so far.
    pub fn count(&self) -> u32 {
        self.attempts + self.unprocessed
    }

    /// The limit of one try.
    pub fn per_try_timeout(&self) -> Option<Duration> {
        self.policy.and_then(|policy| policy.per_try_timeout)
    }

    /// Whether a response with `status` could be followed by another try at all.
    pub fn judges_responses(&self) -> bool {
        self.policy.is_some_and(|policy| policy.attempts > 0)
    }

    fn attempts_max(&self) -> u32 {
        self.policy.map_or(ATTEMPTS_DEFAULT, |policy| policy.attempts.min(ATTEMPTS_MAX))
    }
}

/// Istio's default conditions, for a policy that gives only `attempts`.
const CONDITIONS_DEFAULT: [&str; 5] = ["connect-failure", "refused-stream", "unavailable", "cancelled", "503"];

fn matches(policy: &RetryPolicy, failure: Failure<'_>) -> bool {
    if policy.retry_on.is_empty() {
        return CONDITIONS_DEFAULT.iter().any(|condition| matches_one(condition, failure));
    }
    policy.retry_on.iter().any(|condition| matches_one(condition, failure))
}

/// One condition of Envoy's `x-envoy-retry-on` and `x-envoy-retry-grpc-on`.
fn matches_one(condition: &str, failure: Failure<'_>) -> bool {
    let grpc = |code: &str| match failure {
        Failure::Status(_, headers) => headers.get("grpc-status").is_some_and(|status| status == code),
        _ => false,
    };
    match (condition, failure) {
        ("5xx", Failure::Status(status, _)) => status.is_server_error(),
        ("5xx" | "reset" | "reset-before-request", Failure::Lost | Failure::TryTimeout) => {
            condition != "reset-before-request"
        }
        ("gateway-error", Failure::Status(status, _)) => matches!(status.as_u16(), 502..=504),
        ("gateway-error", Failure::Lost | Failure::TryTimeout) => true,
        ("connect-failure", Failure::Connect) | ("refused-stream", Failure::Refused) => true,
        ("retriable-4xx", Failure::Status(status, _)) => status == StatusCode::CONFLICT,
        ("cancelled", _) => grpc("1"),
        ("deadline-exceeded", _) => grpc("4"),
        ("resource-exhausted", _) => grpc("8"),
        ("internal", _) => grpc("13"),
        ("unavailable", _) => grpc("14"),
        (code, Failure::Status(status, _)) => code.parse() == Ok(status.as_u16()),
        _ => false,
    }
}

/// Bounds retries to a fifth of the requests of the last ten seconds, and at least three a second.
///
/// A burst may use up ten seconds' worth: a sidecar that dies takes all its requests at once.
#[derive(Debug)]
pub struct Budget {
    slots: [Slot; SLOTS],
    started: Instant,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    second: u64,
    requests: u32,
    retries: u32,
}

const SLOTS: usize = 10;
const RETRIES_PER_SECOND_MIN: u32 = 3;

impl Budget {
    /// Nothing was asked yet.
    pub fn new(now: Instant) -> Self {
        Self { slots: [Slot::default(); SLOTS], started: now }
    }

    /// A request began.
    pub fn deposit(&mut self, now: Instant) {
        let slot = self.slot(now);
        slot.requests = slot.requests.saturating_add(1);
    }

    fn withdraw(&mut self, now: Instant) -> bool {
        let second = self.second(now);
        let recent = self.slots.iter().filter(|slot| second - slot.second.min(second) < SLOTS as u64);
        let (requests, retries) = recent
            .fold((0u32, 0u32), |(requests, retries), slot| (requests + slot.requests / 5, retries + slot.retries));
        let rest: u32 = self.slots.iter().map(|slot| slot.requests % 5).sum::<u32>() / 5;
        if retries >= requests + rest + RETRIES_PER_SECOND_MIN * SLOTS as u32 {
            return false;
        }
        self.slot(now).retries += 1;
        true
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_secs()
    }

    fn slot(&mut self, now: Instant) -> &mut Slot {
        let second = self.second(now);
        let slot = &mut self.slots[(second % SLOTS as u64) as usize];
        if slot.second != second {
            *slot = Slot { second, ..Slot::default() };
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(attempts: u32, on: &[&str]) -> RetryPolicy {
        RetryPolicy { attempts, per_try_timeout: None, retry_on: on.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn a_post_is_sent_again_only_if_nobody_processed_it() {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        let mut post = Retries::new(None, &Method::POST);
        assert!(post.again(Failure::Connect, &mut budget, now));
        assert!(post.again(Failure::Refused, &mut budget, now));
        assert!(!post.again(Failure::Lost, &mut budget, now));
        let mut get = Retries::new(None, &Method::GET);
        assert!(get.again(Failure::Lost, &mut budget, now));
        assert!(!get.again(Failure::Status(StatusCode::SERVICE_UNAVAILABLE, &HeaderMap::new()), &mut budget, now));
    }

    #[test]
    fn an_explicit_policy_means_what_it_says() {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        let none = HeaderMap::new();
        let on_5xx = policy(2, &["5xx"]);
        let mut retries = Retries::new(Some(&on_5xx), &Method::POST);
        let failed = Failure::Status(StatusCode::BAD_GATEWAY, &none);
        assert!(retries.again(failed, &mut budget, now) && retries.again(failed, &mut budget, now));
        assert!(!retries.again(failed, &mut budget, now), "attempts are used up");

        let off = policy(0, &[]);
        assert!(!Retries::new(Some(&off), &Method::GET).again(Failure::Connect, &mut budget, now));

        let grpc = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), "14".parse().expect("valid"))]);
        let unavailable = policy(1, &["unavailable"]);
        assert!(Retries::new(Some(&unavailable), &Method::POST).again(
            Failure::Status(StatusCode::OK, &grpc),
            &mut budget,
            now
        ));
    }

    #[test]
    fn retries_stay_within_a_fifth_of_the_requests() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        for _ in 0..1000 {
            budget.deposit(start);
        }
        let spent = (0..10_000).take_while(|_| budget.withdraw(start)).count();
        assert_eq!(spent, 200 + 30);
        let later = start + Duration::from_secs(10);
        assert_eq!((0..100).take_while(|_| budget.withdraw(later)).count(), 30, "old requests do not count");
    }
}
