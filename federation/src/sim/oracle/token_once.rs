//! A join token admits one: of all that race with it, exactly one request is taken.

use std::collections::{BTreeMap, BTreeSet};

use crate::der::Fingerprint;
use crate::registry::Registry;

/// Requests by entry, and those told that they won, by token.
#[derive(Debug, Default)]
pub struct TokenOnce {
    tried: BTreeMap<Fingerprint, String>,
    won: BTreeMap<String, BTreeSet<Fingerprint>>,
}

impl TokenOnce {
    /// A joiner uses a token.
    pub fn tried(&mut self, entry: &[u8], token: &str) {
        self.tried.insert(Fingerprint::of(entry), token.to_owned());
    }

    /// It was told what became of it.
    ///
    /// # Errors
    /// If another one was told the same.
    pub fn answered(&mut self, entry: &[u8], outcome: &Result<(), String>) -> Result<(), String> {
        let print = Fingerprint::of(entry);
        let Some(token) = self.tried.get(&print).filter(|_| outcome.is_ok()) else { return Ok(()) };
        let winners = self.won.entry(token.clone()).or_default();
        winners.insert(print);
        match winners.len() {
            1 => Ok(()),
            many => Err(format!("token once: {many} requests were admitted by token {token}")),
        }
    }

    /// No two members may carry the same number or name, and every winner's token is spent.
    ///
    /// # Errors
    /// What contradicts that.
    pub fn final_look(&self, registry: &Registry) -> Result<(), String> {
        let numbers: BTreeSet<_> = registry.clusters.values().map(|record| record.id).collect();
        if numbers.len() != registry.clusters.len() {
            return Err("token once: two clusters have one number".into());
        }
        for token in self.won.keys() {
            let open = registry.tokens.get(token).is_some_and(|t| t.state == crate::registry::TokenState::Open);
            if open {
                return Err(format!("token once: {token} admitted a cluster and is still open"));
            }
        }
        Ok(())
    }
}
