//! What the packet router must know of its own cluster: from the hub's knowledge to [`LocalTable`].

use std::sync::Arc;
use std::time::Duration;

use isthmus_model::service::Patterns;
use isthmus_tunnel::cid::EndpointName;
use isthmus_tunnel::probe::ProbeKey;
use isthmus_tunnel::route::{LocalTable, Source, Visibility};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::hub::Hub;
use crate::keys::TunnelKeys;
use crate::replication::{ReplicaAddresses, ReplicaList};
use crate::router::RouterShared;

/// Changes are gathered for this long: a table of 10,000 endpoints costs a millisecond.
const GATHER: Duration = Duration::from_millis(5);

/// The table as of now.
pub fn local_table(
    hub: &Hub,
    keys: &TunnelKeys,
    replica: u8,
    replicas: &[ReplicaAddresses],
    draining: bool,
) -> LocalTable {
    let registry = hub.registry();
    let mut table = LocalTable {
        cluster: keys.cids.cluster(),
        replica,
        keys: Arc::new(keys.cids.clone()),
        endpoints: Default::default(),
        registered: Default::default(),
        exports: Default::default(),
        sources: Vec::new(),
        siblings: replicas.iter().filter(|one| one.number != replica).map(|one| (one.number, one.udp)).collect(),
        draining,
    };
    for (key, local) in hub.locals().iter() {
        let name = EndpointName { handle: local.handle, incarnation: local.incarnation };
        table.endpoints.insert(name, local.tunnel_address);
        table.registered.insert(local.tunnel_address);
        table.exports.insert(local.handle, visibility(&hub.visible_to(key), &registry));
    }
    for record in registry.clusters.values().filter(|record| record.name != *hub.own()) {
        let tickets = keys.masters.keys_for(record.id);
        let probe = |(generation, _): (u8, [u8; 32])| {
            keys.masters.probe_key_for(record.id, generation).map(|key| ProbeKey::new(generation, key))
        };
        table.sources.push(Source { tickets, probes: keys.masters.parts().filter_map(probe).collect() });
    }
    table
}

fn visibility(visible_to: &Patterns, registry: &isthmus_federation::registry::Registry) -> Visibility {
    if visible_to.0.iter().any(|pattern| pattern == "*") {
        return Visibility::All;
    }
    let covered = registry.clusters.values().filter(|record| visible_to.cover(record.name.as_str()));
    Visibility::Only(covered.map(|record| record.id).collect())
}

/// Keeps the router's table current until `shutdown`; from `draining` on it answers probes so.
pub async fn run(
    hub: Arc<Hub>,
    mut keys: watch::Receiver<TunnelKeys>,
    router: Arc<RouterShared>,
    (replica, mut replicas): (u8, watch::Receiver<ReplicaList>),
    draining: CancellationToken,
    shutdown: CancellationToken,
) {
    let mut generation = hub.generation();
    let mut told = false;
    loop {
        generation.borrow_and_update();
        let current = keys.borrow_and_update().clone();
        let all = replicas.borrow_and_update().clone();
        router.set_local(local_table(&hub, &current, replica, &all, draining.is_cancelled()));
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = draining.cancelled(), if !told => told = true,
            Ok(()) = keys.changed() => {}
            Ok(()) = replicas.changed() => {}
            Ok(()) = generation.changed() => tokio::time::sleep(GATHER).await,
        }
    }
}
