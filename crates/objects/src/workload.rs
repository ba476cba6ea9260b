//! Istio `WorkloadEntry`, alone and as an endpoint of a `ServiceEntry`.

use std::collections::BTreeMap;

use isthmus_model::service::Workload;
use isthmus_model::{Locality, Namespace, ServiceAccount, WorkloadName};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{NO_EFFECT, Problem, Report};
use crate::scalar::{address, check_port_name, labels};

/// Reads a `WorkloadEntry`.
pub(crate) fn read(metadata: &Metadata<'_>, spec: Fields<'_>, report: &mut Report) -> Option<Workload> {
    let name = metadata.parsed_name::<WorkloadName>(report);
    read_fields(spec, &metadata.namespace, name, report)
}

/// Reads endpoint `number` of the `ServiceEntry` `owner`.
pub(crate) fn read_endpoint(
    item: &Item<'_>,
    namespace: &Namespace,
    owner: &str,
    number: usize,
    report: &mut Report,
) -> Option<Workload> {
    // Only tells endpoints of one entry apart; a long name is cut to stay a label.
    let name = format!("{}-{number}", owner.get(..52).unwrap_or(owner)).parse().ok();
    let fields = item.fields(report)?;
    read_fields(fields, namespace, name, report)
}

fn read_fields(
    mut spec: Fields<'_>,
    namespace: &Namespace,
    name: Option<WorkloadName>,
    report: &mut Report,
) -> Option<Workload> {
    let network = spec.take("network");
    let address_item = spec.take("address");
    if let Some(network) = network.filter(|item| item.text(report).is_some_and(|text| !text.is_empty())) {
        if address_item.is_some() {
            network.warn(
                report,
                NO_EFFECT,
                "field network has no effect: what another cluster has is reached by its exports",
            );
        } else {
            network.not_supported(
                report,
                "give the endpoint an address, or export the service in the cluster that has it",
            );
        }
    } else if address_item.is_none() {
        spec.missing("address", report, "add an IP address or host name");
    }
    let address = address_item.and_then(|item| address(&item, report));
    let ports = spec.take("ports").map(|item| port_map(&item, report)).unwrap_or_default();
    let labels = spec.take("labels").map(|item| labels(&item, report)).unwrap_or_default();
    let locality = spec.take("locality").and_then(|item| locality(&item, report)).unwrap_or_default();
    let weight = spec.take("weight").and_then(|item| item.number(report, 0..=1_000_000)).unwrap_or(1).max(1);
    let fix = "write the name of a service account";
    let account = spec.take("serviceAccount").filter(|item| item.node.value != crate::tree::Value::Text(String::new()));
    let account = match account {
        Some(item) => item.text(report).and_then(|text| account_of(&item, namespace, text, fix, report)),
        None => format!("ns/{namespace}/sa/default").parse().ok(),
    };
    spec.finish(report);
    let (address, account, name) = (address?, account?, name?);
    Some(Workload { namespace: namespace.clone(), name, address, ports, labels, locality, weight, account })
}

fn account_of(
    item: &Item<'_>,
    namespace: &Namespace,
    name: &str,
    fix: &str,
    report: &mut Report,
) -> Option<ServiceAccount> {
    let account = format!("ns/{namespace}/sa/{name}").parse::<ServiceAccount>();
    account.map_err(|error| item.refuse(report, Problem::Impossible, error.to_string(), fix)).ok()
}

fn locality(item: &Item<'_>, report: &mut Report) -> Option<Locality> {
    let text = item.text(report)?;
    let parts: Vec<&str> = text.split('/').collect();
    if parts.len() > 3 || text.contains(|c: char| c.is_whitespace() || c == '*') {
        item.impossible(report, "is not a locality", "write region/zone/subzone");
        return None;
    }
    Some(Locality::parse(text))
}

/// Port name -> number.
fn port_map(item: &Item<'_>, report: &mut Report) -> BTreeMap<String, u16> {
    let mut ports = BTreeMap::new();
    for (key, value) in item.pairs(report) {
        check_port_name(&value, &key.key(), report);
        if let Some(port) = value.port(report) {
            ports.insert(key.key(), port);
        }
    }
    ports
}
