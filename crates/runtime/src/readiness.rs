//! Whether a process may be sent work: named conditions, all of which must hold.
//!
//! Liveness is no condition: `/healthz/live` answers as long as the process can answer at all, so
//! that a lost gateway or an expired certificate never gets a healthy process restarted.

use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use parking_lot::RwLock;
use tokio::sync::watch;

/// The conditions of one process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conditions: RwLock<Vec<Entry>>,
    ready: watch::Sender<bool>,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    /// Why it does not hold.
    unmet: Option<String>,
}

/// One condition, set by whoever knows. Starts as not met.
#[derive(Debug, Clone)]
pub struct Condition {
    readiness: Readiness,
    index: usize,
}

/// One condition, as `/healthz/ready` shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ConditionState {
    /// Its name.
    pub name: &'static str,
    /// Whether it holds.
    pub met: bool,
    /// Why not; empty if it does.
    pub reason: String,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Ready, until a condition is added.
    pub fn new() -> Self {
        Self(Arc::new(Inner { conditions: RwLock::default(), ready: watch::Sender::new(true) }))
    }

    /// Adds a condition that does not hold yet; `reason` says what it waits for.
    pub fn condition(&self, name: &'static str, reason: impl Into<String>) -> Condition {
        let index = {
            let mut conditions = self.0.conditions.write();
            conditions.push(Entry { name, unmet: Some(reason.into()) });
            conditions.len() - 1
        };
        self.recount();
        Condition { readiness: self.clone(), index }
    }

    /// Whether all conditions hold.
    pub fn is_ready(&self) -> bool {
        *self.0.ready.borrow()
    }

    /// Waits until all conditions hold.
    pub async fn ready(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.0.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// All conditions, in the order in which they were added.
    pub fn states(&self) -> Vec<ConditionState> {
        let conditions = self.0.conditions.read();
        conditions
            .iter()
            .map(|entry| ConditionState {
                name: entry.name,
                met: entry.unmet.is_none(),
                reason: entry.unmet.clone().unwrap_or_default(),
            })
            .collect()
    }

    /// `/healthz/ready` (200 or 503, with the conditions as JSON) and `/healthz/live`.
    pub fn router(&self) -> Router {
        let readiness = self.clone();
        Router::new()
            .route("/healthz/ready", get(async move || readiness.response()))
            .route("/healthz/live", get(async || "live\n"))
    }

    /// What `/healthz/ready` answers now.
    pub fn response(&self) -> Response {
        let status = if self.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (status, Json(self.states())).into_response()
    }

    fn recount(&self) {
        // The lock is held while sending, so that two recounts cannot swap their results.
        let conditions = self.0.conditions.read();
        let ready = conditions.iter().all(|entry| entry.unmet.is_none());
        self.0.ready.send_if_modified(|old| std::mem::replace(old, ready) != ready);
    }
}

impl Condition {
    /// The condition holds.
    pub fn met(&self) {
        self.set(None);
    }

    /// The condition does not hold, for `reason`, which a person reads.
    pub fn unmet(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()));
    }

    fn set(&self, unmet: Option<String>) {
        let name = {
            let mut conditions = self.readiness.0.conditions.write();
            let Some(entry) = conditions.get_mut(self.index) else { return };
            if entry.unmet == unmet {
                return;
            }
            entry.unmet.clone_from(&unmet);
            entry.name
        };
        match unmet {
            None => tracing::info!(condition = name, "met"),
            Some(reason) => tracing::info!(condition = name, reason, "not met"),
        }
        self.readiness.recount();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_conditions_must_hold() {
        let readiness = Readiness::new();
        let certificate = readiness.condition("certificate", "none yet");
        let session = readiness.condition("session", "no gateway answered");
        certificate.met();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.response().status(), StatusCode::SERVICE_UNAVAILABLE);
        let waiting = readiness.clone();
        let waiting = tokio::spawn(async move { waiting.ready().await });
        session.met();
        waiting.await.unwrap();
        assert_eq!(readiness.response().status(), StatusCode::OK);
        session.unmet("gateway 127.1.0.1:15012 is gone");
        assert_eq!(readiness.states()[1].reason, "gateway 127.1.0.1:15012 is gone");
        assert!(!readiness.is_ready());
    }
}
