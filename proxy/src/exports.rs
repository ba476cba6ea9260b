//! What this workload serves, to whom: the receiving sidecar's own check of every request and stream. Pure.

use std::net::{IpAddr, SocketAddr};

use isthmus_model::service::{Patterns, Protocol};
use isthmus_model::{ClusterName, Host};
use isthmus_tunnel::ResetCode;
use isthmus_wire::discovery as wire;
use rustc_hash::FxHashMap;

/// Ports served, by service and port. Replaced whole.
#[derive(Debug, Clone, Default)]
pub struct Exports {
    ports: FxHashMap<(Host, u16), Served>,
    /// The version of the message it came with.
    pub version: u64,
}

/// One port of one service, served by this workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The workload's own port.
    pub target_port: u16,
    /// How it speaks.
    pub protocol: Protocol,
    /// Clusters that may call it.
    pub visible_to: Patterns,
}

/// Why an Exports message was not taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("exports: {host}:{port}: {reason}")]
pub struct BadExports {
    host: String,
    port: u32,
    reason: &'static str,
}

impl Exports {
    /// Reads what a gateway told. `own_ports` are the sidecar's: none of them is ever exposed.
    ///
    /// # Errors
    /// [`BadExports`] for the first entry that cannot be; the last good table stays.
    pub fn read(message: &wire::Exports, own_ports: &[u16]) -> Result<Self, BadExports> {
        let mut ports = FxHashMap::default();
        for entry in &message.ports {
            let bad = |reason| BadExports { host: entry.host.chars().take(253).collect(), port: entry.port, reason };
            let host: Host = entry.host.parse().map_err(|_| bad("not a host"))?;
            let number = |value: u32| u16::try_from(value).ok().filter(|port| *port > 0);
            let port = number(entry.port).ok_or_else(|| bad("not a port"))?;
            let target_port = number(entry.target_port).ok_or_else(|| bad("its target is not a port"))?;
            if own_ports.contains(&target_port) {
                return Err(bad("its target is a port of the sidecar"));
            }
            let protocol = protocol(&entry.protocol).ok_or_else(|| bad("its protocol is not known here"))?;
            let visible_to = Patterns(entry.visible_to.clone());
            ports.insert((host, port), Served { target_port, protocol, visible_to });
        }
        Ok(Self { ports, version: message.version })
    }

    /// What `cluster` reaches as (`host`, `port`).
    ///
    /// # Errors
    /// [`ResetCode::NotExported`]: no such service here, or not for that cluster. Which of the two is not told.
    pub fn admit(&self, host: &Host, port: u16, cluster: &ClusterName) -> Result<&Served, ResetCode> {
        let served = self.ports.get(&(host.clone(), port)).ok_or(ResetCode::NotExported)?;
        if served.visible_to.cover(cluster.as_str()) { Ok(served) } else { Err(ResetCode::NotExported) }
    }

    /// The workload's ports that are served, each once.
    pub fn target_ports(&self) -> Vec<u16> {
        let mut ports: Vec<u16> = self.ports.values().map(|served| served.target_port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// All entries, for people.
    pub fn entries(&self) -> impl Iterator<Item = (&Host, u16, &Served)> {
        self.ports.iter().map(|((host, port), served)| (host, *port, served))
    }
}

/// The workload's port as an address.
pub fn app_address(workload: IpAddr, served: &Served) -> SocketAddr {
    SocketAddr::new(workload, served.target_port)
}

fn protocol(text: &str) -> Option<Protocol> {
    if text.is_empty() {
        return Some(Protocol::Auto);
    }
    serde_json::from_value(serde_json::Value::String(text.to_ascii_uppercase())).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host: &str, port: u32, target_port: u32, visible_to: &[&str]) -> wire::ServedPort {
        let visible_to = visible_to.iter().map(ToString::to_string).collect();
        wire::ServedPort { host: host.into(), port, target_port, protocol: "HTTP".into(), visible_to }
    }

    fn read(ports: Vec<wire::ServedPort>) -> Result<Exports, BadExports> {
        Exports::read(&wire::Exports { version: 1, ports }, &[15000, 15001])
    }

    #[test]
    fn only_what_is_exported_to_the_callers_cluster_is_reached() {
        let host: Host = "cart.shop.svc.clusterset.local".parse().expect("valid");
        let cluster = |name: &str| name.parse::<ClusterName>().expect("valid");
        let exports = read(vec![port(host.as_str(), 80, 8080, &["aws-eu", "onprem*"])]).expect("valid");
        assert_eq!(exports.admit(&host, 80, &cluster("aws-eu")).map(|served| served.target_port), Ok(8080));
        assert!(exports.admit(&host, 80, &cluster("onprem-2")).is_ok());
        assert_eq!(exports.admit(&host, 80, &cluster("gcp-us")), Err(ResetCode::NotExported));
        assert_eq!(exports.admit(&host, 8080, &cluster("aws-eu")), Err(ResetCode::NotExported));
        assert_eq!(exports.target_ports(), [8080]);
    }

    #[test]
    fn the_sidecars_own_ports_are_never_exposed_and_bad_entries_refuse_the_message() {
        for bad in [
            port("cart.example", 80, 15000, &["*"]),
            port("cart.example", 80, 0, &["*"]),
            port("cart.example", 70_000, 80, &["*"]),
            port("", 80, 80, &["*"]),
        ] {
            assert!(read(vec![bad.clone()]).is_err(), "{bad:?}");
        }
        let mut odd = port("cart.example", 80, 80, &["*"]);
        odd.protocol = "SCTP".into();
        assert!(read(vec![odd]).is_err());
    }
}
