//! MCS `ServiceExport`, with its audience in an annotation.

use isthmus_model::service::Patterns;
use isthmus_model::{ClusterName, ServiceName};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::object::ServiceExport;
use crate::report::Report;

/// The annotation that lists the clusters that may call the service.
pub(crate) const VISIBLE_TO: &str = "isthmus.io/visible-to";

/// Reads a service export; a `spec` need not be there.
pub(crate) fn read(metadata: &Metadata<'_>, spec: Option<Fields<'_>>, report: &mut Report) -> Option<ServiceExport> {
    let name = metadata.parsed_name::<ServiceName>(report);
    if let Some(mut spec) = spec {
        let why = "labels and annotations of services stay in their cluster";
        spec.no_effect(&["exportedLabels", "exportedAnnotations"], why, report);
        spec.finish(report);
    }
    let said = metadata.annotations.iter().find(|(name, _)| name == VISIBLE_TO);
    let visible_to = match said {
        Some((_, item)) => clusters(item, report)?,
        None => Patterns::all(),
    };
    Some(ServiceExport { namespace: metadata.namespace.clone(), name: name?, visible_to })
}

/// Cluster names, prefixes ending in `*`, or `*`, separated by commas.
fn clusters(item: &Item<'_>, report: &mut Report) -> Option<Patterns> {
    let text = item.text(report)?;
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    let ok = |part: &&str| match part.strip_suffix('*') {
        Some(prefix) => prefix.is_empty() || prefix.trim_end_matches('-').parse::<ClusterName>().is_ok(),
        None => part.parse::<ClusterName>().is_ok(),
    };
    if parts.is_empty() || !parts.iter().all(ok) {
        item.impossible(
            report,
            "is not a list of clusters",
            "write names or prefixes like aws-eu,gcp-*; delete the ServiceExport to end the export",
        );
        return None;
    }
    Some(Patterns(parts.into_iter().map(str::to_owned).collect()))
}
