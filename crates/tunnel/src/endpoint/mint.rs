//! Mints an endpoint's own connection IDs under keys that change while it runs.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use quinn::ConnectionId;
use quinn_proto::{ConnectionIdGenerator, InvalidCid};

use crate::cid::{CID_LEN, Cid, CidKeys, CidKind, EndpointName};

/// Who an endpoint is to the gateways.
#[derive(Debug)]
pub struct MintIdentity {
    /// The cluster's keys.
    pub keys: Arc<CidKeys>,
    /// The name its gateways route by.
    pub name: EndpointName,
}

/// The current identity, shared by all that mint.
#[derive(Debug)]
pub struct CidMint {
    identity: ArcSwap<MintIdentity>,
}

impl CidMint {
    /// Mints for `name`.
    pub fn new(keys: Arc<CidKeys>, name: EndpointName) -> Arc<Self> {
        Arc::new(Self { identity: ArcSwap::from_pointee(MintIdentity { keys, name }) })
    }

    /// Mints with these from the next ID on. IDs of live tunnels follow within `cid_lifetime`.
    pub fn replace(&self, keys: Arc<CidKeys>, name: EndpointName) {
        self.identity.store(Arc::new(MintIdentity { keys, name }));
    }

    /// What mints now.
    pub fn current(&self) -> arc_swap::Guard<Arc<MintIdentity>> {
        self.identity.load()
    }

    fn mint(&self) -> Cid {
        let identity = self.current();
        identity.keys.mint_endpoint(identity.name, rand::random())
    }
}

/// quinn's view of a [`CidMint`].
#[derive(Debug)]
pub(super) struct Generator {
    pub(super) mint: Arc<CidMint>,
    pub(super) lifetime: Duration,
}

impl ConnectionIdGenerator for Generator {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(self.mint.mint().as_bytes())
    }

    /// Asked for short headers of no known connection, before a stateless reset: probes and other strays get none.
    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        match Cid::from_slice(cid) {
            Some(cid) if cid.kind() == CidKind::Endpoint => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        CID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        Some(self.lifetime)
    }
}
