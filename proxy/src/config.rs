//! `proxy.yaml`: as the operator wrote it, then as proven. Reads one file, opens nothing else.
//!
//! Every problem of a file is named in one go, with its path, its value and what to do.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use isthmus_model::{Locality, Namespace, ServiceAccount, ServiceName, WorkloadName};
use isthmus_runtime::config_file;
pub use isthmus_runtime::config_file::ConfigError;
use serde::Deserialize;

/// How the workload's connections come to the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureMode {
    /// By packet filter rules of the network namespace; needs `CAP_NET_ADMIN`.
    Transparent,
    /// The workload names the sidecar as its HTTP proxy (`curl -x`).
    #[default]
    Explicit,
    /// Not at all: the sidecar only serves others.
    None,
}

/// What happens to connections that leave the mesh (Istio `outboundTrafficPolicy.mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundPolicy {
    /// They pass, untouched.
    #[default]
    AllowAny,
    /// Only hosts of the registry.
    RegistryOnly,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; the access log in Istio's default format.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    state: PathBuf,
    gateways: Vec<String>,
    root_fingerprint: String,
    #[serde(default)]
    token_file: Option<PathBuf>,
    workload: RawWorkload,
    #[serde(default)]
    listen: Option<String>,
    #[serde(default)]
    advertise: Option<String>,
    #[serde(default)]
    locality: String,
    #[serde(default)]
    ports: RawPorts,
    #[serde(default)]
    capture: CaptureMode,
    #[serde(default)]
    dns: RawDns,
    #[serde(default)]
    outbound_traffic_policy: OutboundPolicy,
    #[serde(default)]
    log: RawLog,
    #[serde(default)]
    drain_timeout: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkload {
    namespace: String,
    name: String,
    #[serde(default)]
    service_account: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    ports: BTreeMap<String, u16>,
    #[serde(default)]
    address: Option<String>,
    #[serde(default)]
    weight: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawPorts {
    admin: Option<u16>,
    outbound: Option<u16>,
    inbound: Option<u16>,
    mtls: Option<u16>,
    metrics: Option<u16>,
    health: Option<u16>,
    dns: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawDns {
    enabled: Option<bool>,
    upstream: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLog {
    level: Option<String>,
    format: LogFormat,
    access: Option<bool>,
}

/// A sidecar's settings, known to fit together.
#[derive(Debug, Clone)]
pub struct Config {
    /// Key, certificate and registration lie here.
    pub state: PathBuf,
    /// Session addresses of the cluster's gateways, `host:port`.
    pub gateways: Vec<String>,
    /// The root that the first contact must show (`sha256:<hex>`).
    pub root_fingerprint: String,
    /// The one-time token of the first start.
    pub token_file: Option<PathBuf>,
    /// The workload beside us.
    pub workload: WorkloadConfig,
    /// The address all ports but the admin's bind on.
    pub listen: IpAddr,
    /// The address that others of the cluster reach us on; `None` means the one that faces the gateway.
    pub advertise: Option<IpAddr>,
    /// Where the workload runs.
    pub locality: Locality,
    /// Ports.
    pub ports: Ports,
    /// How connections come to us.
    pub capture: CaptureMode,
    /// The DNS server.
    pub dns: DnsConfig,
    /// What may leave the mesh.
    pub outbound: OutboundPolicy,
    /// Logging.
    pub log: LogConfig,
    /// How long open streams may go on after SIGTERM.
    pub drain_timeout: Duration,
}

/// The workload that a sidecar stands beside.
#[derive(Debug, Clone)]
pub struct WorkloadConfig {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name, unique in the namespace.
    pub name: WorkloadName,
    /// Whom it runs as.
    pub account: ServiceAccount,
    /// Labels, matched by selectors and subsets.
    pub labels: BTreeMap<String, String>,
    /// Port numbers by name.
    pub ports: BTreeMap<String, u16>,
    /// Where it listens.
    pub address: IpAddr,
    /// Relative weight.
    pub weight: u32,
}

/// The sidecar's ports.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Admin, on loopback only.
    pub admin: u16,
    /// Connections of the workload: captured, or as an HTTP proxy.
    pub outbound: u16,
    /// Captured plaintext to the workload.
    pub inbound: u16,
    /// mTLS over TCP, and the tunnel's UDP.
    pub mtls: u16,
    /// Prometheus metrics.
    pub metrics: u16,
    /// Health.
    pub health: u16,
    /// DNS.
    pub dns: u16,
}

/// The DNS server's settings.
#[derive(Debug, Clone)]
pub struct DnsConfig {
    /// Whether it runs.
    pub enabled: bool,
    /// Who is asked for names outside the mesh; empty means `/etc/resolv.conf`.
    pub upstream: Vec<SocketAddr>,
}

/// Logging settings.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// A `tracing` filter, e.g. `info` or `isthmus_proxy=debug`.
    pub level: String,
    /// How lines are written.
    pub format: LogFormat,
    /// Whether every request is logged.
    pub access: bool,
}

/// The gateway's session port (DESIGN of ports: 15012).
const SESSION_PORT: u16 = 15012;
/// Longest life of a stream after SIGTERM unless said otherwise.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);

impl Config {
    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`ConfigError`], with every problem of the file in one go.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&config_file::read(path)?, path)
    }

    /// Checks `text`; relative paths in it start at the file's folder.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        config_file::parse(text, path, prove)
    }

    /// The address of one of its ports; never for the admin port, which is on loopback.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.listen, port)
    }
}

fn prove(raw: RawConfig, folder: &Path, problems: &mut Vec<String>) -> Option<Config> {
    let workload = prove_workload(raw.workload, problems);
    let listen = parsed("listen", raw.listen.as_deref(), problems).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let advertise = parsed("advertise", raw.advertise.as_deref(), problems);
    let gateways = prove_gateways(&raw.gateways, problems);
    prove_fingerprint(&raw.root_fingerprint, problems);
    let ports = prove_ports(&raw.ports, problems);
    let upstream = raw.dns.upstream.iter().enumerate().filter_map(|(index, text)| {
        let with_port =
            if text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()) { format!("{text}:53") } else { text.clone() };
        with_port
            .parse()
            .map_err(|_| {
                problems.push(format!("dns.upstream[{index}]: {text:?} is not IP or IP:port, e.g. 10.0.0.2:53"))
            })
            .ok()
    });
    let upstream = upstream.collect();
    let drain_timeout = raw.drain_timeout.as_deref().map_or(Some(DRAIN_TIMEOUT), |text| {
        let parsed = parse_seconds(text);
        if parsed.is_none() {
            problems.push(format!("drain_timeout: {text:?} is not a duration such as 30s or 5m"));
        }
        parsed
    });
    Some(Config {
        state: folder.join(raw.state),
        gateways,
        root_fingerprint: raw.root_fingerprint,
        token_file: raw.token_file.map(|path| folder.join(path)),
        workload: workload?,
        listen,
        advertise,
        locality: Locality::parse(&raw.locality),
        ports,
        capture: raw.capture,
        dns: DnsConfig { enabled: raw.dns.enabled.unwrap_or(true), upstream },
        outbound: raw.outbound_traffic_policy,
        log: LogConfig {
            level: raw.log.level.unwrap_or_else(|| "info".into()),
            format: raw.log.format,
            access: raw.log.access.unwrap_or(true),
        },
        drain_timeout: drain_timeout?,
    })
}

fn prove_workload(raw: RawWorkload, problems: &mut Vec<String>) -> Option<WorkloadConfig> {
    let mut named = |path: &str, result: Result<(), String>| {
        if let Err(error) = result {
            problems.push(format!("{path}: {error}"));
        }
    };
    let namespace = raw.namespace.parse::<Namespace>();
    named("workload.namespace", namespace.as_ref().map(drop).map_err(ToString::to_string));
    let name = raw.name.parse::<WorkloadName>();
    named("workload.name", name.as_ref().map(drop).map_err(ToString::to_string));
    let account = raw.service_account.as_deref().unwrap_or("default").parse::<ServiceName>();
    named("workload.service_account", account.as_ref().map(drop).map_err(ToString::to_string));
    for (port, number) in &raw.ports {
        let zero = *number == 0;
        named(
            &format!("workload.ports.{port}"),
            if zero { Err("0 is not a port; use 1-65535".into()) } else { Ok(()) },
        );
    }
    let address = raw.address.as_deref().unwrap_or("127.0.0.1").parse::<IpAddr>();
    let text = raw.address.as_deref().unwrap_or_default();
    named("workload.address", address.as_ref().map(drop).map_err(|_| format!("{text:?} is not an IP address")));
    if raw.weight == Some(0) {
        named("workload.weight", Err("0 would get no request; leave it out for 1".into()));
    }
    let namespace = namespace.ok()?;
    Some(WorkloadConfig {
        account: ServiceAccount { namespace: namespace.clone(), name: account.ok()? },
        namespace,
        name: name.ok()?,
        labels: raw.labels,
        ports: raw.ports,
        address: address.ok()?,
        weight: raw.weight.unwrap_or(1),
    })
}

fn prove_gateways(written: &[String], problems: &mut Vec<String>) -> Vec<String> {
    if written.is_empty() {
        problems.push("gateways: none is named; give at least one host or host:port".into());
    }
    let mut gateways = Vec::with_capacity(written.len());
    for (index, text) in written.iter().enumerate() {
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse::<u16>().ok()),
            _ => (text.as_str(), Some(SESSION_PORT)),
        };
        match port.filter(|port| *port > 0 && !host.is_empty()) {
            Some(port) => gateways.push(format!("{host}:{port}")),
            None => {
                problems.push(format!("gateways[{index}]: {text:?} is not host or host:port, e.g. gw.example:15012"))
            }
        }
    }
    gateways
}

fn prove_fingerprint(text: &str, problems: &mut Vec<String>) {
    let hex = text.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        problems.push(format!(
            "root_fingerprint: {text:?} is not sha256: and 64 hexadecimal digits; `isthmus status` shows the mesh's"
        ));
    }
}

fn prove_ports(raw: &RawPorts, problems: &mut Vec<String>) -> Ports {
    let ports = Ports {
        admin: raw.admin.unwrap_or(15000),
        outbound: raw.outbound.unwrap_or(15001),
        inbound: raw.inbound.unwrap_or(15006),
        mtls: raw.mtls.unwrap_or(15008),
        metrics: raw.metrics.unwrap_or(15020),
        health: raw.health.unwrap_or(15021),
        dns: raw.dns.unwrap_or(15053),
    };
    let named = [
        ("admin", ports.admin),
        ("outbound", ports.outbound),
        ("inbound", ports.inbound),
        ("mtls", ports.mtls),
        ("metrics", ports.metrics),
        ("health", ports.health),
        ("dns", ports.dns),
    ];
    for (index, (name, port)) in named.iter().enumerate() {
        if let Some((other, _)) = named[..index].iter().find(|(_, taken)| taken == port && *port != 0) {
            problems.push(format!("ports.{name}: {port} is also ports.{other}; give each its own"));
        }
    }
    ports
}

fn parsed(name: &str, text: Option<&str>, problems: &mut Vec<String>) -> Option<IpAddr> {
    let text = text?;
    text.parse().map_err(|_| problems.push(format!("{name}: {text:?} is not an IP address"))).ok()
}

fn parse_seconds(text: &str) -> Option<Duration> {
    let (digits, scale) = match text.strip_suffix('m') {
        Some(digits) => (digits, 60),
        None => (text.strip_suffix('s')?, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(scale).filter(|seconds| *seconds <= 86_400).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "state: data\ngateways: [127.1.0.1, \"gw.example:15099\"]\nroot_fingerprint: sha256:\
        0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\nworkload:\n  namespace: shop\n  name: cart-1\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/isthmus/proxy.yaml"))
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let config = parse(GOOD).expect("valid");
        assert_eq!(config.state, Path::new("/etc/isthmus/data"));
        assert_eq!(config.gateways, ["127.1.0.1:15012", "gw.example:15099"]);
        assert_eq!((config.ports.outbound, config.ports.mtls, config.ports.dns), (15001, 15008, 15053));
        assert_eq!(config.workload.account.to_string(), "ns/shop/sa/default");
        assert_eq!(config.workload.address, IpAddr::V4(Ipv4Addr::LOCALHOST));
        assert_eq!((config.capture, config.outbound), (CaptureMode::Explicit, OutboundPolicy::AllowAny));
    }

    #[test]
    fn all_problems_are_named_at_once() {
        let text = "state: d\ngateways: [\"gw:x\"]\nroot_fingerprint: abc\nlisten: everywhere\n\
            workload: {namespace: Shop, name: a_b, address: here, weight: 0}\nports: {dns: 15001}\ndrain_timeout: soon\n";
        let message = parse(text).expect_err("many problems").to_string();
        for part in [
            "gateways[0]: \"gw:x\"",
            "root_fingerprint: \"abc\"",
            "listen: \"everywhere\"",
            "workload.namespace",
            "workload.name",
            "workload.address: \"here\"",
            "workload.weight",
            "ports.dns: 15001 is also ports.outbound",
            "drain_timeout: \"soon\"",
        ] {
            assert!(message.contains(part), "{part} is missing in {message}");
        }
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_name() {
        let message = parse(&format!("{GOOD}lissten: x\n")).expect_err("unknown field").to_string();
        assert!(message.contains("lissten"), "{message}");
    }
}
