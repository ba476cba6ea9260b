//! Sends one request or byte stream of the workload to a service: route, choose, carry, and try again where
//! that is safe. What arrives here is canonical (`headers::canonical`) and known to be meant for the service.

mod attempt;
mod failed;
mod http;
mod stream;

pub use failed::{Failed, answer};
pub use http::{Inquiry, to_outside, to_service};
pub use stream::{Opened, open};

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use isthmus_model::Host;
use isthmus_model::destination::EffectivePolicy;
use isthmus_model::service::Labels;
use isthmus_model::view::ServiceView;

use crate::destination::{Routed, subset_labels};
use crate::discovery::{Answer, Known};
use crate::path::DataPath;

/// Pause before the same endpoint is tried once more.
const REPEAT_PAUSE: Duration = Duration::from_millis(25);
/// Times that endpoints may be tried again after all were tried.
const REPEATS_MAX: u32 = 1;

/// A routed destination with all that is needed to use it.
struct Resolved {
    service: Arc<ServiceView>,
    host: Host,
    port: u16,
    subset: Labels,
    policy: EffectivePolicy,
    dialled: Option<IpAddr>,
}

/// Looks up what `routed` names; asks the mesh if it is another host than the one at hand.
async fn resolve(
    path: &DataPath,
    known: &Known,
    at_hand: &Arc<ServiceView>,
    routed: Routed,
    dialled: Option<IpAddr>,
) -> Result<Resolved, Failed> {
    let service = if routed.host == at_hand.host || at_hand.host.covers(&routed.host) {
        Arc::clone(at_hand)
    } else {
        match path.mesh.resolve_host(&routed.host).await {
            Answer::Known(service) => service,
            _ => return Err(Failed::NoService(routed.host)),
        }
    };
    // A host that was just asked for came with its DestinationRule.
    let latest = path.mesh.snapshot();
    let view = if latest.view.destinations.contains_key(&service.host) { &latest.view } else { &known.view };
    let subset = subset_labels(view, &service.host, routed.subset.as_deref());
    let subset = subset.ok_or_else(|| Failed::NoSubset(routed.subset.unwrap_or_default()))?;
    let rule = view.destinations.get(&service.host);
    let policy = rule.map(|rule| rule.effective(None, routed.port)).unwrap_or_default();
    Ok(Resolved { service, host: routed.host, port: routed.port, subset, policy, dialled })
}
