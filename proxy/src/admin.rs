//! The operator's view into a running sidecar, on loopback only.
//!
//! Pages are made of what the sidecar knows when they are asked for. The server, its checks and the
//! pages that every process has are in [`isthmus_runtime::Admin`]. No key and no token is ever here:
//! pages are built field by field from values that hold none, and certificates show what is public.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use isthmus_model::view::{Backends, ServiceView, Target, View};
use isthmus_runtime::Admin;
use serde_json::{Value, json};
use x509_parser::extensions::GeneralName;
use x509_parser::time::ASN1Time;

use crate::Config;
use crate::discovery::Mesh;

/// What is public of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Whom it names: its SPIFFE id, or its subject if it has none.
    pub subject: String,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// When it begins.
    pub not_before: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
}

impl Certificate {
    /// What is public of the certificate in `der`; `None` if it is none.
    pub fn from_der(der: &[u8]) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let uri = names.into_iter().flat_map(|names| &names.value.general_names).find_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        let time = |time: ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
        };
        Some(Self {
            subject: uri.unwrap_or_else(|| certificate.subject().to_string()),
            serial: certificate.raw_serial_as_string().replace(':', ""),
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
        })
    }
}

/// The certificates in use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Certificates {
    /// The workload's own chain, leaf first; empty before the first was issued.
    pub chain: Vec<Certificate>,
    /// The roots of the mesh.
    pub roots: Vec<Certificate>,
}

/// Where the pages come from.
pub struct Sources {
    /// The settings.
    pub config: Arc<Config>,
    /// What is known of the mesh.
    pub mesh: Mesh,
    /// The certificates in use now.
    pub certificates: Box<dyn Fn() -> Certificates + Send + Sync>,
    /// Open tunnels and pools, as their owner shows them.
    pub tunnels: Box<dyn Fn() -> Value + Send + Sync>,
}

/// Adds the sidecar's pages to those that every process has.
pub fn with_pages(admin: Admin, sources: Sources) -> Admin {
    let Sources { config, mesh, certificates, tunnels } = sources;
    let listeners = listeners(&config);
    let (known, clusters_of) = (mesh.clone(), mesh);
    admin
        .page("/config_dump", "settings, and all that is known of the mesh", move || {
            config_dump(&config, &known.snapshot(), known.wanted().len())
        })
        .page("/clusters", "endpoints of known services, by cluster", move || clusters(&clusters_of.snapshot()))
        .page("/certs", "the workload's certificate chain and the roots", move || {
            certs(&certificates(), SystemTime::now())
        })
        .page("/tunnels", "open tunnels and pools", tunnels)
        .page("/listeners", "ports and what for", move || listeners.clone())
}

fn config_dump(config: &Config, view: &View, names_asked: usize) -> Value {
    json!({
        "settings": settings(config),
        "view": {
            "version": view.version,
            "names_asked": names_asked,
            "services": sorted(&view.services),
            "virtual_services": sorted(&view.routes),
            "destination_rules": sorted(&view.destinations),
            "peer_authentication": view.peer_authentication,
            "mesh_ranges": view.mesh_ranges,
        },
    })
}

/// By name: two dumps of one state are equal.
fn sorted<K: ToString, V: serde::Serialize>(map: &rustc_hash::FxHashMap<K, V>) -> BTreeMap<String, &V> {
    map.iter().map(|(name, value)| (name.to_string(), value)).collect()
}

fn settings(config: &Config) -> Value {
    let workload = &config.workload;
    json!({
        "state": config.state,
        "gateways": config.gateways,
        "root_fingerprint": config.root_fingerprint,
        "token": config.token_file.as_ref().map(|_| "<redacted>"),
        "workload": {
            "namespace": workload.namespace,
            "name": workload.name,
            "service_account": workload.account.name,
            "labels": workload.labels,
            "ports": workload.ports,
            "address": workload.address,
            "weight": workload.weight,
        },
        "listen": config.listen,
        "advertise": config.advertise,
        "locality": config.locality,
        "capture": format!("{:?}", config.capture).to_lowercase(),
        "dns": { "enabled": config.dns.enabled, "upstream": config.dns.upstream },
        "outbound_traffic_policy": format!("{:?}", config.outbound),
        "drain_timeout_s": config.drain_timeout.as_secs(),
    })
}

fn listeners(config: &Config) -> Value {
    let ports = &config.ports;
    let at = |port| config.at(port).to_string();
    json!({
        "admin": format!("127.0.0.1:{}", ports.admin),
        "outbound": at(ports.outbound),
        "inbound": at(ports.inbound),
        "mtls": at(ports.mtls),
        "metrics": at(ports.metrics),
        "health": at(ports.health),
        "dns": if config.dns.enabled { crate::dns::addresses(config.listen, ports.dns) } else { Vec::new() },
    })
}

fn clusters(view: &View) -> Value {
    let services: BTreeMap<String, Value> =
        view.services.iter().map(|(host, service)| (host.to_string(), json!(backends(service)))).collect();
    json!(services)
}

fn backends(service: &ServiceView) -> Vec<Value> {
    let mut backends: Vec<&Backends> = service.backends.iter().collect();
    backends.sort_by(|a, b| a.cluster.cmp(&b.cluster));
    let shown = backends.into_iter().map(|backend| {
        let endpoints: Vec<Value> = backend
            .endpoints
            .iter()
            .map(|endpoint| {
                let locality = endpoint.locality.as_ref().unwrap_or(&backend.locality);
                json!({
                    "target": target(&endpoint.target),
                    "healthy": endpoint.healthy,
                    "weight": endpoint.weight,
                    "labels": endpoint.labels,
                    "locality": locality,
                })
            })
            .collect();
        json!({
            "cluster": backend.cluster,
            "freshness": backend.freshness,
            "rtt_us": backend.rtt_us,
            "ports": backend.ports,
            "accounts": backend.accounts,
            "healthy": backend.endpoints.iter().filter(|endpoint| endpoint.healthy).count(),
            "endpoints": endpoints,
        })
    });
    shown.collect()
}

fn target(target: &Target) -> String {
    match target {
        Target::Tunnel { handle, incarnation } => format!("tunnel {handle}.{incarnation}"),
        Target::Direct(address) => format!("mtls {address}"),
        Target::Plain(address) => format!("plain {address}"),
    }
}

fn certs(certificates: &Certificates, now: SystemTime) -> Value {
    let show = |certificate: &Certificate| {
        let left = certificate.not_after.duration_since(now).map(|left| left.as_secs()).ok();
        json!({
            "subject": certificate.subject,
            "serial": certificate.serial,
            "valid_from": time(certificate.not_before),
            "expiration_time": time(certificate.not_after),
            "seconds_until_expiration": left.unwrap_or_default(),
            "expired": left.is_none(),
        })
    };
    json!({
        "cert_chain": certificates.chain.iter().map(show).collect::<Vec<_>>(),
        "ca_cert": certificates.roots.iter().map(show).collect::<Vec<_>>(),
    })
}

fn time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| format!("{time:.0}")).unwrap_or_default()
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
