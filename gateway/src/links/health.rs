//! Health of endpoints over links: each cluster tells what it exports to whom, with a lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_wire::federation::{GoneEndpoint, HealthDelta, ServiceHealth};
use tokio::sync::broadcast::error::RecvError;

use super::Shared;
use crate::imports::LEASE;
use crate::locals::ServiceKey;
use crate::peers::{Class, FrameError, LinkHandle, LinkStream, read_frame, write_frame};

/// The lease is renewed three times before it would run out.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// Changes are gathered for this long: far below the 500 ms that a change may take to a sidecar elsewhere.
const GATHER: Duration = Duration::from_millis(5);
/// Services in one frame.
const FRAME_SERVICES: usize = 256;

/// Tells `link` what this cluster exports to its cluster, until the link ends.
pub(super) async fn tell(shared: Arc<Shared>, link: LinkHandle) {
    if let Err(error) = tell_all(&shared, &link).await {
        tracing::debug!(cluster = %link.cluster(), %error, "health stream ended");
    }
}

async fn tell_all(shared: &Shared, link: &LinkHandle) -> Result<(), FrameError> {
    let mut stream = link.open_stream(Class::Health).await?;
    let mut generation = shared.hub.generation();
    let mut gone = shared.hub.gone();
    let mut told: BTreeMap<ServiceKey, ServiceHealth> = BTreeMap::new();
    let mut first = true;
    let mut version = 0;
    let mut renew = tokio::time::interval(RENEW_EVERY);
    let own = shared.hub.own_id();
    loop {
        generation.borrow_and_update();
        let now = shared.hub.health_for(link.cluster());
        let frames = frames(&told, &now, first);
        for mut frame in frames {
            version += 1;
            (frame.epoch, frame.version, frame.lease_ms) = (shared.epoch, version, LEASE.as_millis() as u32);
            write_frame(&mut stream.send, &frame).await?;
        }
        (told, first) = (now, false);
        tokio::select! {
            () = link.closed() => return Ok(()),
            _ = renew.tick() => {
                let lease_ms = LEASE.as_millis() as u32;
                write_frame(&mut stream.send, &HealthDelta { epoch: shared.epoch, version, lease_ms, ..HealthDelta::default() }).await?;
            }
            event = gone.recv() => match event {
                Ok(event) if event.cluster_id == u32::from(own.0) => {
                    let gone = vec![GoneEndpoint { handle: event.handle, incarnation: event.incarnation }];
                    let lease_ms = LEASE.as_millis() as u32;
                    write_frame(&mut stream.send, &HealthDelta { epoch: shared.epoch, version, lease_ms, gone, ..HealthDelta::default() }).await?;
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
            changed = generation.changed() => match changed {
                Ok(()) => tokio::time::sleep(GATHER).await,
                Err(_) => return Ok(()),
            },
        }
    }
}

/// What is to be said after `told` for `now`: everything the first time, then what differs.
fn frames(
    told: &BTreeMap<ServiceKey, ServiceHealth>,
    now: &BTreeMap<ServiceKey, ServiceHealth>,
    first: bool,
) -> Vec<HealthDelta> {
    let mut services: Vec<ServiceHealth> = now
        .iter()
        .filter(|(key, health)| first || told.get(key) != Some(health))
        .map(|(_, health)| health.clone())
        .collect();
    let ended = told.keys().filter(|key| !now.contains_key(key));
    services.extend(ended.map(|(namespace, name)| ServiceHealth {
        namespace: namespace.to_string(),
        name: name.to_string(),
        tombstone: true,
        ..ServiceHealth::default()
    }));
    let mut frames: Vec<HealthDelta> = services
        .chunks(FRAME_SERVICES)
        .map(|chunk| HealthDelta { snapshot: first, services: chunk.to_vec(), ..HealthDelta::default() })
        .collect();
    if first {
        if frames.is_empty() {
            frames.push(HealthDelta { snapshot: true, ..HealthDelta::default() });
        }
        if let Some(last) = frames.last_mut() {
            last.last = true;
        }
    }
    frames
}

/// Hears what a peer says of its own endpoints.
pub(super) async fn hear(shared: Arc<Shared>, link: LinkHandle, mut stream: LinkStream) {
    loop {
        let frame = match read_frame::<HealthDelta>(&mut stream.recv).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(cluster = %link.cluster(), %error, "health stream ended");
                return;
            }
        };
        match shared.hub.take_health(link.cluster(), link.replica(), frame, Instant::now()) {
            Ok(taken) => taken.gone.into_iter().for_each(|process| shared.hub.tell_gone(link.id(), process)),
            Err(error) => tracing::warn!(cluster = %link.cluster(), %error, "health frame refused"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(name: &str, healthy: bool) -> (ServiceKey, ServiceHealth) {
        let key = ("shop".parse().expect("valid"), name.parse().expect("valid"));
        let endpoint = isthmus_wire::federation::EndpointHealth { handle: 1, healthy, ..Default::default() };
        let health = ServiceHealth {
            namespace: "shop".into(),
            name: name.into(),
            endpoints: vec![endpoint],
            ..Default::default()
        };
        (key, health)
    }

    #[test]
    fn the_first_word_is_a_whole_snapshot_even_if_there_is_nothing_to_say() {
        let none = frames(&BTreeMap::new(), &BTreeMap::new(), true);
        assert_eq!(none.len(), 1);
        assert!(none[0].snapshot && none[0].last);
    }

    #[test]
    fn later_words_are_differences_and_tombstones() {
        let told = BTreeMap::from([health("cart", true), health("web", true)]);
        let now = BTreeMap::from([health("cart", false)]);
        let frames = frames(&told, &now, false);
        assert_eq!(frames.len(), 1);
        let said: Vec<(&str, bool)> = frames[0].services.iter().map(|one| (one.name.as_str(), one.tombstone)).collect();
        assert_eq!(said, [("cart", false), ("web", true)]);
        assert!(super::frames(&now, &now, false).is_empty());
    }
}
