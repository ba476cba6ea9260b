//! Single-writer key spaces: a record under a cluster's name was written by that cluster's key.

use std::collections::BTreeSet;

use isthmus_model::ClusterName;

use super::state_machine::StateMachine;
use crate::command::{SignedEntry, Writer};
use crate::der::{Der, Fingerprint};
use crate::registry::Registry;
use crate::sim::keys::ToyVerify;
use crate::verify::{Trust, Unproven, Verify};

/// Entries that were signed by somebody else than they say.
#[derive(Debug, Default)]
pub struct SingleWriter {
    forged: BTreeSet<Fingerprint>,
}

impl SingleWriter {
    /// A client forged this entry.
    pub fn forged(&mut self, entry: &[u8]) {
        self.forged.insert(Fingerprint::of(entry));
    }

    /// A client was told what became of its entry.
    ///
    /// # Errors
    /// If a forged one was taken.
    pub fn answered(&self, entry: &[u8], outcome: &Result<(), String>) -> Result<(), String> {
        match self.forged.contains(&Fingerprint::of(entry)) && outcome.is_ok() {
            true => Err("single writer: a forged entry was applied".into()),
            false => Ok(()),
        }
    }

    /// Looks who wrote each export that stands at the end.
    ///
    /// # Errors
    /// If it was not its owner.
    pub fn final_look(&self, registry: &Registry, applied: &StateMachine) -> Result<(), String> {
        for (cluster, exports) in registry.exports.iter() {
            for (key, record) in exports {
                let Some(bytes) = applied.entry(record.index) else { continue };
                let entry = SignedEntry::from_bytes(bytes).map_err(|error| error.to_string())?;
                let writer = entry.writer().map_err(|error| error.to_string())?;
                let chain = registry.clusters.get(cluster).map(|record| record.chain.clone()).unwrap_or_default();
                let signed = chain
                    .first()
                    .is_some_and(|first| ToyVerify.signature(first, &entry.signed_bytes(), entry.signature()).is_ok());
                if writer != Writer::Cluster(cluster.clone()) || !signed {
                    return Err(format!("single writer: {key} of cluster {cluster} was not written by its key"));
                }
            }
        }
        Ok(())
    }
}

/// Believes every signature: for proving that this file sees what happens then.
#[derive(Debug, Clone, Copy)]
pub struct Credulous;

impl Verify for Credulous {
    fn cluster(&self, trust: Trust<'_>, chain: &[Der]) -> Result<ClusterName, Unproven> {
        ToyVerify.cluster(trust, chain)
    }

    fn operator(&self, trust: Trust<'_>, chain: &[Der]) -> Result<String, Unproven> {
        ToyVerify.operator(trust, chain)
    }

    fn signature(&self, _certificate: &Der, _message: &[u8], _signature: &[u8]) -> Result<(), Unproven> {
        Ok(())
    }

    fn answers(&self, csr: &Der, certificate: &Der) -> Result<(), Unproven> {
        ToyVerify.answers(csr, certificate)
    }
}
