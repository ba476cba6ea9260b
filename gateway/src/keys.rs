//! The cluster's connection-ID keys and ticket masters: on disk (0600), shared by all replicas, rotated.

use std::path::Path;
use std::time::Duration;

use isthmus_identity::state::{StateError, read_private, write_private};
use isthmus_model::ClusterId;
use isthmus_tunnel::cid::CidKeys;
use isthmus_tunnel::ticket::TicketMasters;
use serde::{Deserialize, Serialize};

/// A generation lives two of these: the one it mints in and the next.
pub const ROTATE_EVERY: Duration = Duration::from_secs(12 * 3600);

/// Both kinds of keys.
#[derive(Clone)]
pub struct TunnelKeys {
    /// For connection IDs of own endpoints.
    pub cids: CidKeys,
    /// From which sources' ticket keys derive.
    pub masters: TicketMasters,
    /// When the current generation began, Unix seconds.
    pub since_unix_s: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    cluster_id: u16,
    cid_current: u8,
    cids: Vec<(u8, [u8; 16])>,
    master_current: u8,
    masters: Vec<(u8, [u8; 32])>,
    since_unix_s: u64,
}

impl TunnelKeys {
    /// New keys for `cluster`.
    pub fn generate(cluster: ClusterId, now_unix_s: u64) -> Self {
        Self {
            cids: CidKeys::new(cluster, 0, rand::random()),
            masters: TicketMasters::new(cluster, rand::random()),
            since_unix_s: now_unix_s,
        }
    }

    /// Reads the keys at `path`; makes and keeps new ones if there are none.
    ///
    /// # Errors
    /// [`StateError`]: unreadable, exposed or broken.
    pub fn load_or_create(path: &Path, cluster: ClusterId, now_unix_s: u64) -> Result<Self, StateError> {
        let Some(bytes) = read_private(path)? else {
            let keys = Self::generate(cluster, now_unix_s);
            keys.store(path)?;
            return Ok(keys);
        };
        let broken = |what: String| StateError::Content {
            path: path.to_owned(),
            what: format!(
                "{what}; restore it from a backup, or remove it: tunnels to this cluster are then dialled anew"
            ),
        };
        let keys = Self::from_json(&bytes).map_err(broken)?;
        match keys.cids.cluster() {
            id if id == cluster => Ok(keys),
            other => Err(broken(format!("it is of cluster number {other}, this is {cluster}"))),
        }
    }

    /// Reads what [`TunnelKeys::to_json`] wrote.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let cluster = ClusterId(stored.cluster_id);
        let cids = CidKeys::from_parts(cluster, stored.cid_current, stored.cids);
        let masters = TicketMasters::from_parts(cluster, stored.master_current, stored.masters);
        match (cids, masters) {
            (Some(cids), Some(masters)) => Ok(Self { cids, masters, since_unix_s: stored.since_unix_s }),
            _ => Err("its current generation is missing".into()),
        }
    }

    /// The keys as they lie on disk: secret.
    pub fn to_json(&self) -> Vec<u8> {
        let stored = Stored {
            cluster_id: self.cids.cluster().0,
            cid_current: self.cids.current(),
            cids: self.cids.parts().collect(),
            master_current: self.masters.current(),
            masters: self.masters.parts().collect(),
            since_unix_s: self.since_unix_s,
        };
        // Numbers and bytes into memory: cannot fail.
        serde_json::to_vec(&stored).unwrap_or_default()
    }

    /// Writes the keys to `path`.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn store(&self, path: &Path) -> Result<(), StateError> {
        write_private(path, &self.to_json())
    }

    /// The next generation; the current one lives on as the last.
    #[must_use]
    pub fn rotated(&self, now_unix_s: u64) -> Self {
        Self {
            cids: self.cids.rotated(rand::random()),
            masters: self.masters.rotated(rand::random()),
            since_unix_s: now_unix_s,
        }
    }
}
