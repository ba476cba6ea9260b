//! What a gateway keeps current while it runs: one task each, all until told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_federation::member::MemberHandle;
use isthmus_identity::{ClusterAuthority, SharedIdentity};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::gateway_identity;
use crate::distribution::sidecars::Sidecars;
use crate::hub::Hub;
use crate::issue::Issuer;
use crate::join::now_unix_s;
use crate::keys::{ROTATE_EVERY, TunnelKeys};
use crate::replication::{ReplicaList, to_wire, write_state};

/// Gateways renew their own certificate this often: half of its life.
const RENEW_IDENTITY_EVERY: Duration = Duration::from_secs(12 * 3600);

pub(super) async fn watch_registry(
    hub: Arc<Hub>,
    issuer: Arc<Issuer>,
    member: MemberHandle,
    known: isthmus_runtime::readiness::Condition,
    stop: CancellationToken,
) {
    let mut registry = member.registry();
    loop {
        let current = registry.borrow_and_update().clone();
        if current.mesh.is_some() {
            known.met();
        }
        // Trust before anything that needs it: a peer that sees the new certificate first could not verify it.
        issuer.set_registry(&current);
        hub.set_registry(current);
        tokio::select! {
            () = stop.cancelled() => return,
            changed = registry.changed() => if changed.is_err() { return },
        }
    }
}

pub(super) async fn keep_addresses(hub: Arc<Hub>, path: PathBuf, stop: CancellationToken) {
    let mut generation = hub.generation();
    loop {
        generation.borrow_and_update();
        if hub.allocate_addresses(now_unix_s())
            && let Err(error) = write_state(&path, &*hub.addresses())
        {
            tracing::error!(%error, "virtual addresses are not kept; they may change at the next start");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = generation.changed() => if changed.is_err() { return },
        }
    }
}

pub(super) async fn expire_leases(hub: Arc<Hub>, stop: CancellationToken) {
    let mut generation = hub.generation();
    loop {
        generation.borrow_and_update();
        let next = hub.imports(crate::imports::ImportTable::next_timeout);
        let sleep = next.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = generation.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(sleep) => {
                hub.expire_imports(Instant::now());
            }
        }
    }
}

/// Keeps what sidecars are told of keys and replicas current.
pub(super) async fn tell_sidecars(
    sidecars: Arc<Sidecars>,
    mut keys: watch::Receiver<TunnelKeys>,
    mut replicas: watch::Receiver<ReplicaList>,
    stop: CancellationToken,
) {
    loop {
        sidecars.set_keys(keys.borrow_and_update().cids.clone());
        sidecars.set_replicas(to_wire(&replicas.borrow_and_update()));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = keys.changed() => if changed.is_err() { return },
            changed = replicas.changed() => if changed.is_err() { return },
        }
    }
}

pub(super) async fn rotate_keys(keys: watch::Sender<TunnelKeys>, path: PathBuf, stop: CancellationToken) {
    loop {
        let since = keys.borrow().since_unix_s;
        let due = Duration::from_secs((since + ROTATE_EVERY.as_secs()).saturating_sub(now_unix_s()));
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(due) => {}
        }
        let next = keys.borrow().rotated(now_unix_s());
        if let Err(error) = next.store(&path) {
            tracing::error!(%error, "tunnel keys are not rotated: they could not be kept");
            tokio::time::sleep(Duration::from_secs(60)).await;
            continue;
        }
        keys.send_replace(next);
        tracing::info!("tunnel keys rotated");
    }
}

pub(super) async fn renew_identity(
    identity: SharedIdentity,
    authority: Arc<ClusterAuthority>,
    issuer: Arc<Issuer>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RENEW_IDENTITY_EVERY) => {}
        }
        let roots = issuer.shared().load().roots.clone();
        let renewed = gateway_identity(&authority, &roots).and_then(|fresh| Ok(identity.replace(&fresh)?));
        if let Err(error) = renewed {
            tracing::error!(%error, "the gateway's own certificate was not renewed");
        }
    }
}
