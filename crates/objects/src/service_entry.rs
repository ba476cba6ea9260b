//! Istio `ServiceEntry`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use isthmus_model::service::{Location, Protocol, Resolution, ServiceEntry, ServicePort, Workload};
use isthmus_model::{Host, ServiceName};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{Problem, READ_AS, Report};
use crate::scalar::{PROTOCOL_WORDS, export_to, labels, protocol, protocol_of_name};
use crate::service::{port_name, refuse_repeated};
use crate::workload::read_endpoint;

/// Reads a service entry.
pub(crate) fn read(metadata: &Metadata<'_>, mut spec: Fields<'_>, report: &mut Report) -> Option<ServiceEntry> {
    let name = metadata.parsed_name::<ServiceName>(report);
    let hosts_item = spec.need("hosts", report);
    let hosts = hosts_item.as_ref().map(|item| read_hosts(item, report)).unwrap_or_default();
    let addresses_item = spec.take("addresses");
    let addresses = addresses_item.as_ref().map(|item| read_addresses(item, report)).unwrap_or_default();
    let mut ports: Vec<ServicePort> = Vec::new();
    let port_items = spec.list("ports", report);
    for item in &port_items {
        if let Some(port) = read_port(item, report) {
            refuse_repeated(item, &ports, &port, report);
            ports.push(port);
        }
    }
    if let (Some(item), true) = (&hosts_item, port_items.is_empty()) {
        item.warn(report, READ_AS, "without ports nothing of these hosts can be called");
    }
    let locations = [("MESH_EXTERNAL", Location::MeshExternal), ("MESH_INTERNAL", Location::MeshInternal)];
    let location = spec.take("location").and_then(|item| item.word(report, &locations)).unwrap_or_default();
    let resolution_item = spec.take("resolution");
    let resolution = resolution_item.as_ref().and_then(|item| resolution_of(item, report)).unwrap_or_default();
    let endpoints_item = spec.take("endpoints");
    let items = endpoints_item.as_ref().map(|item| item.list(report)).unwrap_or_default();
    let read = items.iter().enumerate();
    let endpoints: Vec<Workload> = read
        .filter_map(|(n, item)| {
            let owner = name.as_ref().map_or("unnamed", ServiceName::as_str);
            let endpoint = read_endpoint(item, &metadata.namespace, owner, n, report)?;
            check_endpoint(item, &endpoint, resolution, &ports, report);
            Some(endpoint)
        })
        .collect();
    let selector_item = spec.take("workloadSelector");
    let workload_selector = selector_item.as_ref().map(|item| read_selector(item, report)).unwrap_or_default();
    let export_to = export_to(&mut spec, report);
    let names = spec.list("subjectAltNames", report);
    let subject_alt_names = names.iter().filter_map(|item| item.text(report)).map(str::to_owned).collect();
    let entry = ServiceEntry {
        namespace: metadata.namespace.clone(),
        name: name.clone().or_else(|| "unnamed".parse().ok())?,
        hosts,
        addresses,
        ports,
        location,
        resolution,
        endpoints,
        workload_selector,
        export_to,
        subject_alt_names,
    };
    let places = Places {
        hosts: hosts_item,
        addresses: addresses_item,
        endpoints: endpoints_item,
        selector: selector_item,
        resolution: resolution_item,
    };
    check(&entry, items.len(), &places, &spec, report);
    spec.finish(report);
    name.map(|_| entry)
}

/// Fields that must fit together.
struct Places<'a> {
    hosts: Option<Item<'a>>,
    addresses: Option<Item<'a>>,
    endpoints: Option<Item<'a>>,
    selector: Option<Item<'a>>,
    resolution: Option<Item<'a>>,
}

fn check(entry: &ServiceEntry, endpoints: usize, places: &Places<'_>, spec: &Fields<'_>, report: &mut Report) {
    let dns = matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
    if let (Some(item), true) = (&places.selector, endpoints > 0) {
        item.impossible(report, "stands beside endpoints", "keep workloadSelector or endpoints, not both");
    }
    if let (Some(item), true, Resolution::None) = (&places.endpoints, endpoints > 0, entry.resolution) {
        item.impossible(
            report,
            "stands beside resolution NONE",
            "set resolution to STATIC or DNS, or remove the endpoints",
        );
    }
    if entry.resolution == Resolution::DnsRoundRobin
        && endpoints > 1
        && let Some(item) = &places.endpoints
    {
        item.impossible(report, "is too many for DNS_ROUND_ROBIN", "list one endpoint, or use resolution DNS");
    }
    if entry.resolution == Resolution::Static && endpoints == 0 && places.selector.is_none() {
        spec.missing("endpoints", report, "resolution STATIC needs endpoints or a workloadSelector");
    }
    if let (Some(item), true) = (&places.selector, dns) {
        item.warn(report, READ_AS, "the workloads that are selected serve the hosts; DNS is not asked");
    }
    if dns
        && endpoints == 0
        && let Some(item) = &places.hosts
        && entry.hosts.iter().any(Host::is_wildcard)
    {
        item.impossible(
            report,
            "has a wildcard, which DNS cannot resolve",
            "name the hosts, list endpoints, or use resolution NONE",
        );
    }
    if dns
        && let Some(item) = &places.addresses
        && entry.addresses.iter().any(|net| net.prefix_len() < net.max_prefix_len())
    {
        item.impossible(report, "has a CIDR range", "ranges need resolution NONE or STATIC; list single addresses");
    }
    let unaddressed = entry.resolution == Resolution::None && entry.addresses.is_empty();
    if unaddressed
        && entry.ports.iter().any(|port| port.protocol == Protocol::Tcp)
        && let Some(item) = places.resolution.as_ref().or(places.hosts.as_ref())
    {
        item.warn(
            report,
            READ_AS,
            "a TCP port without addresses and with resolution NONE matches no connection; add addresses",
        );
    }
}

fn read_hosts(item: &Item<'_>, report: &mut Report) -> Vec<Host> {
    let mut hosts: Vec<Host> = Vec::new();
    let items = item.list(report);
    if items.is_empty() {
        item.impossible(report, "names no host", "add at least one host");
    }
    for item in items {
        if item.text(report) == Some("*") {
            item.impossible(report, "would catch every host", "name a domain, like *.example.com");
            continue;
        }
        let Some(host) = item.parsed::<Host>(report, "write a DNS name, like api.example.com") else { continue };
        if hosts.contains(&host) {
            item.refuse(report, Problem::Duplicate, format!("host {host} is there twice"), "remove one of them");
        }
        hosts.push(host);
    }
    hosts
}

fn read_addresses(item: &Item<'_>, report: &mut Report) -> Vec<IpNet> {
    let items = item.list(report);
    let address = |item: &Item<'_>| {
        let text = item.text(report)?;
        let net = text.parse::<IpAddr>().map(IpNet::from).ok().or_else(|| text.parse::<IpNet>().ok());
        match net {
            Some(net) if net.prefix_len() == 0 => {
                item.impossible(report, "covers every address", "name the ranges that the hosts have");
                None
            }
            Some(net) => Some(net.trunc()),
            None => {
                item.impossible(
                    report,
                    "is neither an IP address nor a CIDR range",
                    "write it like 10.0.0.7 or 10.0.0.0/24",
                );
                None
            }
        }
    };
    items.iter().filter_map(address).collect()
}

fn read_port(item: &Item<'_>, report: &mut Report) -> Option<ServicePort> {
    let mut fields = item.fields(report)?;
    let number = fields.need("number", report).and_then(|item| item.port(report));
    let name = fields.need("name", report).map(|item| port_name(&item, report)).unwrap_or_default();
    let said = fields.take("protocol");
    let said = said.filter(|item| item.text(report).is_some_and(|text| !text.is_empty()));
    let spoken = match said {
        None => protocol_of_name(&name),
        Some(item) => {
            let known = item.text(report).and_then(protocol);
            if known.flatten().is_none() {
                item.impossible(report, "is not a protocol that is carried", format!("use {PROTOCOL_WORDS}"));
            }
            known.flatten()
        }
    };
    let target = fields.take("targetPort").and_then(|item| item.port(report));
    fields.finish(report);
    let number = number?;
    Some(ServicePort { number, name, protocol: spoken.unwrap_or_default(), target: target.unwrap_or(number) })
}

fn resolution_of(item: &Item<'_>, report: &mut Report) -> Option<Resolution> {
    if item.text(report)? == "DYNAMIC_DNS" {
        item.refuse(
            report,
            Problem::NotSupported,
            "resolution DYNAMIC_DNS is not supported yet",
            "name the hosts and use DNS, or use NONE",
        );
        return None;
    }
    let words = [
        ("NONE", Resolution::None),
        ("STATIC", Resolution::Static),
        ("DNS", Resolution::Dns),
        ("DNS_ROUND_ROBIN", Resolution::DnsRoundRobin),
    ];
    item.word(report, &words)
}

fn read_selector(item: &Item<'_>, report: &mut Report) -> isthmus_model::service::Labels {
    let Some(mut fields) = item.fields(report) else { return Default::default() };
    let selector = fields.take("labels").map(|item| labels(&item, report)).unwrap_or_default();
    if selector.is_empty() {
        item.warn(report, READ_AS, "a workloadSelector without labels selects nothing");
    }
    fields.finish(report);
    selector
}

fn check_endpoint(
    item: &Item<'_>,
    endpoint: &Workload,
    resolution: Resolution,
    ports: &[ServicePort],
    report: &mut Report,
) {
    if resolution == Resolution::Static && endpoint.address.parse::<IpAddr>().is_err() {
        let message = format!("address {:?} is a name, which resolution STATIC does not look up", endpoint.address);
        item.refuse(report, Problem::Impossible, message, "write an IP address or use resolution DNS");
    }
    let names: BTreeSet<&str> = ports.iter().map(|port| port.name.as_str()).collect();
    for name in endpoint.ports.keys().filter(|name| !names.contains(name.as_str())) {
        let message = format!("port {name:?} is not a port of the service entry");
        item.refuse(report, Problem::Impossible, message, "use a name that stands in spec.ports");
    }
}
