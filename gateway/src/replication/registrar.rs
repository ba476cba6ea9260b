//! Which other replicas there are, as the member knows it: on disk, so that its own restart makes none vanish.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use isthmus_identity::state::StateError;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{ReplicaAddresses, ReplicaList, read_state, write_state};
use crate::join::{now_unix_s, refused};

/// A replica whose stream ended stays known for this long: a restart is not worth telling every sidecar.
const REPLICA_GRACE: Duration = Duration::from_secs(60);
/// Replicas of one cluster's gateway: their numbers are a byte, and each costs every sidecar a session.
const REPLICAS_MAX: usize = 16;

/// The member's knowledge of the other replicas.
pub struct Registrar {
    own: ReplicaAddresses,
    path: PathBuf,
    others: Mutex<BTreeMap<u8, Known>>,
    list: watch::Sender<ReplicaList>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    addresses: ReplicaAddresses,
    /// Since when its stream is gone, Unix seconds.
    gone_unix_s: Option<u64>,
}

impl Registrar {
    /// The member's registrar; `list` is told every change.
    ///
    /// # Errors
    /// [`StateError`] if the file cannot be read back.
    pub fn open(
        own: ReplicaAddresses,
        path: PathBuf,
        list: watch::Sender<ReplicaList>,
    ) -> Result<Arc<Self>, StateError> {
        let mut others: BTreeMap<u8, Known> = read_state(&path)?.unwrap_or_default();
        // As long as the member itself was away nobody could be heard.
        let now = now_unix_s();
        others.values_mut().for_each(|known| known.gone_unix_s = Some(now));
        let registrar = Self { own, path, others: Mutex::new(others), list };
        registrar.publish(&registrar.others.lock());
        Ok(Arc::new(registrar))
    }

    pub(super) fn here(&self, addresses: ReplicaAddresses) -> Result<(), Status> {
        let mut others = self.others.lock();
        if !others.contains_key(&addresses.number) && others.len() + 1 >= REPLICAS_MAX {
            return Err(refused("limited", format!("this cluster has {REPLICAS_MAX} gateway replicas already")));
        }
        others.insert(addresses.number, Known { addresses, gone_unix_s: None });
        self.publish(&others);
        Ok(())
    }

    pub(super) fn gone(&self, addresses: &ReplicaAddresses) {
        let mut others = self.others.lock();
        if let Some(known) = others.get_mut(&addresses.number).filter(|known| known.addresses == *addresses) {
            known.gone_unix_s = Some(now_unix_s());
        }
    }

    fn forget_gone(&self, now_unix_s: u64) {
        let mut others = self.others.lock();
        let before = others.len();
        let stays = |gone: u64| now_unix_s.saturating_sub(gone) < REPLICA_GRACE.as_secs();
        others.retain(|_, known| known.gone_unix_s.is_none_or(stays));
        if others.len() != before {
            self.publish(&others);
        }
    }

    fn publish(&self, others: &BTreeMap<u8, Known>) {
        let list: ReplicaList =
            std::iter::once(&self.own).chain(others.values().map(|known| &known.addresses)).cloned().collect();
        isthmus_runtime::watched::replace(&self.list, list);
        if let Err(error) = write_state(&self.path, others) {
            tracing::warn!(%error, "the other replicas are not kept; they are told anew after a restart");
        }
    }

    /// All replicas, itself included.
    pub(super) fn list(&self) -> watch::Receiver<ReplicaList> {
        self.list.subscribe()
    }

    /// Forgets replicas that do not come back, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(REPLICA_GRACE / 4) => self.forget_gone(now_unix_s()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::advertised;
    use super::super::tests::replica;
    use super::*;

    #[test]
    fn a_replica_that_restarts_is_not_forgotten_and_one_that_stays_away_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("replicas.json");
        let open = || {
            let list = watch::Sender::new(Vec::new());
            let known = list.subscribe();
            (Registrar::open(replica(0, "10.0.0.1"), path.clone(), list).expect("readable"), known)
        };
        let (registrar, known) = open();
        registrar.here(replica(1, "10.0.0.2")).expect("room");
        assert_eq!(known.borrow().len(), 2);
        assert_eq!(advertised(&known.borrow()), ["10.0.0.1:15443", "10.0.0.2:15443"]);

        let (registrar, known) = open();
        assert_eq!(known.borrow().len(), 2, "known after the member's restart");
        registrar.forget_gone(now_unix_s() + REPLICA_GRACE.as_secs() - 2);
        assert_eq!(known.borrow().len(), 2);
        registrar.forget_gone(now_unix_s() + REPLICA_GRACE.as_secs() + 1);
        assert_eq!(known.borrow().len(), 1);
    }
}
