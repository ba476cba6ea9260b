//! Kubernetes `Service` (v1).

use std::net::IpAddr;

use isthmus_model::ServiceName;
use isthmus_model::service::{Protocol, Service, ServicePort};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{Problem, READ_AS, Report};
use crate::scalar::{PROTOCOL_WORDS, check_port_name, labels, protocol, protocol_of_name};
use crate::tree::Value;

/// What the API server or kube-proxy does with a service, and the mesh does not.
const OUTSIDE: [&str; 9] = [
    "externalIPs",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "allocateLoadBalancerNodePorts",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "publishNotReadyAddresses",
    "trafficDistribution",
];

/// Reads a service.
pub(crate) fn read(metadata: &Metadata<'_>, mut spec: Fields<'_>, report: &mut Report) -> Option<Service> {
    let name = metadata.parsed_name::<ServiceName>(report);
    let address = cluster_ip(&mut spec, report);
    let kind = spec.take("type");
    if kind.as_ref().and_then(|item| item.text(report)) == Some("ExternalName") {
        let fix = "use a ServiceEntry with the host and resolution DNS";
        kind.as_ref().inspect(|item| item.not_supported(report, fix));
    } else if let Some(kind) = &kind {
        kind.word(report, &[("ClusterIP", ()), ("NodePort", ()), ("LoadBalancer", ())]);
    }
    only(&mut spec, "sessionAffinity", "None", report);
    only(&mut spec, "internalTrafficPolicy", "Cluster", report);
    spec.not_supported(&["sessionAffinityConfig", "externalName"], report);
    spec.no_effect(&OUTSIDE, "it concerns traffic from outside the mesh", report);
    spec.ignore(&["ipFamilies", "ipFamilyPolicy", "clusterIPs"]);
    let selector = spec.take("selector").map(|item| labels(&item, report)).unwrap_or_default();
    let mut ports: Vec<ServicePort> = Vec::new();
    let items = spec.list("ports", report);
    let several = items.len() > 1;
    for item in &items {
        if let Some(port) = read_port(item, several, report) {
            refuse_repeated(item, &ports, &port, report);
            ports.push(port);
        }
    }
    if items.is_empty() {
        spec.missing("ports", report, "add at least one port");
    }
    spec.finish(report);
    Some(Service {
        namespace: metadata.namespace.clone(),
        name: name?,
        selector,
        ports,
        labels: metadata.labels.clone(),
        address,
    })
}

fn cluster_ip(spec: &mut Fields<'_>, report: &mut Report) -> Option<IpAddr> {
    let item = spec.take("clusterIP")?;
    match item.text(report)? {
        "" => None,
        "None" => {
            item.not_supported(report, "remove `clusterIP: None`: headless services come later");
            None
        }
        _ => item.parsed(report, "write an IP address or leave it out"),
    }
}

/// A field of which only the default value is served.
fn only(spec: &mut Fields<'_>, name: &'static str, default: &str, report: &mut Report) {
    let Some(item) = spec.take(name) else { return };
    if item.text(report).is_some_and(|text| text != default) {
        item.not_supported(report, format!("use {default}, or leave it out"));
    }
}

fn read_port(item: &Item<'_>, name_needed: bool, report: &mut Report) -> Option<ServicePort> {
    let mut fields = item.fields(report)?;
    let name = fields.take("name").map(|item| port_name(&item, report)).unwrap_or_default();
    if name.is_empty() && name_needed {
        fields.missing("name", report, "name every port of a service that has several");
    }
    let number = fields.need("port", report).and_then(|item| item.port(report));
    let transport = fields.take("protocol");
    let udp = match transport.as_ref().and_then(|item| item.text(report)) {
        None | Some("TCP") => false,
        Some("UDP") => true,
        Some(_) => {
            transport.as_ref().inspect(|item| item.impossible(report, "is not carried", "use TCP or UDP"));
            false
        }
    };
    let said = fields.take("appProtocol").and_then(|item| app_protocol(&item, report));
    let target = fields.take("targetPort").and_then(|item| target_port(&item, number, report));
    fields.no_effect(&["nodePort"], "it concerns traffic from outside the mesh", report);
    fields.finish(report);
    let number = number?;
    let spoken = if udp { Protocol::Udp } else { said.or_else(|| protocol_of_name(&name)).unwrap_or_default() };
    Some(ServicePort { number, name, protocol: spoken, target: target.unwrap_or(number) })
}

/// A port's name as written; refused if it cannot be one.
pub(crate) fn port_name(item: &Item<'_>, report: &mut Report) -> String {
    let name = item.text(report).unwrap_or_default();
    if !name.is_empty() {
        check_port_name(item, name, report);
    }
    name.to_owned()
}

/// `appProtocol` as Istio and Kubernetes name it; a word of somebody else's leaves the port to be detected.
fn app_protocol(item: &Item<'_>, report: &mut Report) -> Option<Protocol> {
    let text = item.text(report)?;
    let known = match text {
        "kubernetes.io/h2c" => Some(Some(Protocol::Http2)),
        "kubernetes.io/ws" => Some(Some(Protocol::Http)),
        "kubernetes.io/wss" => Some(Some(Protocol::Tls)),
        _ => protocol(text),
    };
    match known {
        Some(Some(protocol)) => Some(protocol),
        Some(None) => {
            item.impossible(report, "is not carried", format!("use {PROTOCOL_WORDS}"));
            None
        }
        None => {
            item.warn(report, READ_AS, format!("appProtocol {text:?} is not known: the protocol is detected"));
            None
        }
    }
}

/// A number, or the name that a workload gives its port.
fn target_port(item: &Item<'_>, number: Option<u16>, report: &mut Report) -> Option<u16> {
    let Value::Text(name) = &item.node.value else { return item.port(report) };
    let number = number.unwrap_or_default();
    let message = format!(
        "targetPort {name:?}: workloads say where by a port of the service port's name; on others port {number} is used"
    );
    item.warn(report, READ_AS, message);
    None
}

/// Refuses a port whose name, or whose number and transport, another port of the list has.
pub(crate) fn refuse_repeated(item: &Item<'_>, ports: &[ServicePort], port: &ServicePort, report: &mut Report) {
    let udp = |port: &ServicePort| port.protocol == Protocol::Udp;
    if ports.iter().any(|have| have.number == port.number && udp(have) == udp(port)) {
        let message = format!("port {} is there twice", port.number);
        item.refuse(report, Problem::Duplicate, message, "give each port its own number");
    }
    if !port.name.is_empty() && ports.iter().any(|have| have.name == port.name) {
        let message = format!("port name {:?} is there twice", port.name);
        item.refuse(report, Problem::Duplicate, message, "give each port its own name");
    }
}
