//! Istio `PeerAuthentication`.

use std::collections::BTreeMap;

use isthmus_model::ObjectName;
use isthmus_model::authn::{MtlsMode, PeerAuthentication};
use isthmus_model::service::Labels;

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{Problem, Report};
use crate::scalar::labels;

const MODES: [(&str, Option<MtlsMode>); 4] = [
    ("UNSET", None),
    ("DISABLE", Some(MtlsMode::Disable)),
    ("PERMISSIVE", Some(MtlsMode::Permissive)),
    ("STRICT", Some(MtlsMode::Strict)),
];

/// Reads a peer authentication; one without a `spec` inherits everything.
pub(crate) fn read(
    metadata: &Metadata<'_>,
    spec: Option<Fields<'_>>,
    report: &mut Report,
) -> Option<PeerAuthentication> {
    let name = metadata.parsed_name::<ObjectName>(report);
    let namespace = metadata.namespace.clone();
    let (mut selector, mut mode_said, mut ports) = (Labels::new(), None, BTreeMap::new());
    if let Some(mut spec) = spec {
        if let Some(item) = spec.take("selector")
            && let Some(mut fields) = item.fields(report)
        {
            selector = fields.take("matchLabels").map(|item| labels(&item, report)).unwrap_or_default();
            fields.finish(report);
        }
        mode_said = spec.take("mtls").and_then(|item| mode(&item, report));
        if let Some(item) = spec.take("portLevelMtls") {
            ports = port_modes(&item, report);
            if selector.is_empty() {
                let fix = "add spec.selector.matchLabels: ports are those of a workload";
                item.impossible(report, "has no selector beside it", fix);
            }
        }
        spec.finish(report);
    }
    Some(PeerAuthentication { namespace, name: name?, selector, mode: mode_said, ports })
}

fn mode(item: &Item<'_>, report: &mut Report) -> Option<MtlsMode> {
    let mut fields = item.fields(report)?;
    let mode = fields.take("mode").and_then(|item| item.word(report, &MODES)).flatten();
    fields.finish(report);
    mode
}

fn port_modes(item: &Item<'_>, report: &mut Report) -> BTreeMap<u16, MtlsMode> {
    let mut ports = BTreeMap::new();
    for (key, value) in item.pairs(report) {
        match key.key().trim_matches('"').parse::<u16>() {
            Ok(port) if port > 0 => {
                // UNSET inherits, which is what a port without an entry does.
                if let Some(mode) = mode(&value, report) {
                    ports.insert(port, mode);
                }
            }
            _ => {
                let message = format!("{:?} is not a port", key.key());
                value.refuse(report, Problem::Impossible, message, "use 1 to 65535");
            }
        }
    }
    ports
}
