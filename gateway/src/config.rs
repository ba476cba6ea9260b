//! `gateway.yaml`: as the operator wrote it, then as proven. Reads one file, opens nothing else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use isthmus_model::{ClusterName, Locality};
use isthmus_runtime::config_file;
pub use isthmus_runtime::config_file::ConfigError;
use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    state: PathBuf,
    cluster: String,
    #[serde(default)]
    identity: Option<PathBuf>,
    #[serde(default)]
    listen: Option<String>,
    #[serde(default)]
    advertise: Vec<String>,
    #[serde(default)]
    replica: u8,
    #[serde(default)]
    member: Option<String>,
    #[serde(default)]
    locality: String,
    #[serde(default)]
    objects: Option<PathBuf>,
    #[serde(default)]
    dashboard: Option<String>,
    #[serde(default)]
    socket: Option<PathBuf>,
    #[serde(default)]
    workers: Option<usize>,
    #[serde(default)]
    ports: RawPorts,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawPorts {
    tunnel: Option<u16>,
    sessions: Option<u16>,
    metrics: Option<u16>,
    health: Option<u16>,
}

/// A gateway's settings, known to fit together.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// This replica's own state: store, tables.
    pub state: PathBuf,
    /// What all replicas of the cluster share: its intermediate, ticket masters (`state/identity` by default).
    pub identity: PathBuf,
    /// The cluster's name.
    pub cluster: ClusterName,
    /// The address all ports but the dashboard's bind on.
    pub listen: IpAddr,
    /// Where other clusters reach this replica, `host:port`; empty if it can only dial out.
    pub advertise: Vec<String>,
    /// Its number, 0 for the member.
    pub replica: u8,
    /// Session address of the member, for every other replica.
    pub member: Option<SocketAddr>,
    /// Where the cluster is.
    pub locality: Locality,
    /// A directory of YAML files, read at start and on change.
    pub objects: Option<PathBuf>,
    /// Where the dashboard listens.
    pub dashboard: SocketAddr,
    /// The operator socket.
    pub socket: PathBuf,
    /// Router threads, each with a flow of its own on every link (at most 8).
    pub workers: usize,
    /// Ports.
    pub ports: Ports,
}

/// The gateway's ports.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Links, tunnels and (TCP) joins.
    pub tunnel: u16,
    /// Sidecar sessions.
    pub sessions: u16,
    /// Prometheus metrics.
    pub metrics: u16,
    /// Health.
    pub health: u16,
}

/// More flows than this bring nothing and cost a probe each.
const WORKERS_MAX: usize = 8;

impl GatewayConfig {
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
    /// As [`GatewayConfig::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        config_file::parse(text, path, prove)
    }

    /// The address of one of its ports.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.listen, port)
    }

    /// Whether this replica is the cluster's member of the federation.
    pub fn is_member(&self) -> bool {
        self.replica == 0
    }
}

fn prove(raw: RawConfig, folder: &Path, problems: &mut Vec<String>) -> Option<GatewayConfig> {
    let cluster = raw.cluster.parse::<ClusterName>().map_err(|error| problems.push(format!("cluster: {error}"))).ok();
    let listen = parsed("listen", raw.listen.as_deref(), IpAddr::V4(Ipv4Addr::UNSPECIFIED), "an IP address", problems);
    let dashboard = parsed(
        "dashboard",
        raw.dashboard.as_deref(),
        SocketAddr::from((Ipv4Addr::LOCALHOST, 15080)),
        "IP:port",
        problems,
    );
    let member = raw.member.as_deref().and_then(|text| {
        text.parse().map_err(|_| problems.push(format!("member: {text:?} is not IP:port (its port 15012)"))).ok()
    });
    if raw.replica > 0 && raw.member.is_none() {
        problems.push(format!("replica: {} needs `member: IP:15012`, the address of replica 0", raw.replica));
    }
    if raw.replica > 0 && raw.objects.is_some() {
        problems
            .push("objects: only replica 0 reads the directory; remove it here, the others hear its objects".into());
    }
    for (index, address) in raw.advertise.iter().enumerate() {
        let port = address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>()));
        if !matches!(port, Some(Ok(1..))) {
            problems.push(format!("advertise[{index}]: {address:?} is not host:port, e.g. gw.example.com:15443"));
        }
    }
    let workers = raw.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    if raw.workers == Some(0) {
        problems.push("workers: 0 forwards nothing; leave it out for one per core".into());
    }
    let state = folder.join(raw.state);
    Some(GatewayConfig {
        identity: raw.identity.map_or_else(|| state.join("identity"), |path| folder.join(path)),
        socket: raw.socket.map_or_else(|| state.join("gateway.sock"), |path| folder.join(path)),
        objects: raw.objects.map(|path| folder.join(path)),
        state,
        cluster: cluster?,
        listen,
        advertise: raw.advertise,
        replica: raw.replica,
        member,
        locality: Locality::parse(&raw.locality),
        dashboard,
        workers: workers.clamp(1, WORKERS_MAX),
        ports: Ports {
            tunnel: raw.ports.tunnel.unwrap_or(15443),
            sessions: raw.ports.sessions.unwrap_or(15012),
            metrics: raw.ports.metrics.unwrap_or(15020),
            health: raw.ports.health.unwrap_or(15021),
        },
    })
}

fn parsed<T: std::str::FromStr>(
    name: &str,
    text: Option<&str>,
    default: T,
    shape: &str,
    problems: &mut Vec<String>,
) -> T {
    let Some(text) = text else { return default };
    text.parse().unwrap_or_else(|_| {
        problems.push(format!("{name}: {text:?} is not {shape}"));
        default
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GatewayConfig, ConfigError> {
        GatewayConfig::parse(text, Path::new("/etc/isthmus/gateway.yaml"))
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let config = parse("state: data\ncluster: aws-eu\n").expect("valid");
        assert_eq!(config.state, Path::new("/etc/isthmus/data"));
        assert_eq!(config.identity, Path::new("/etc/isthmus/data/identity"));
        assert_eq!((config.ports.tunnel, config.ports.sessions), (15443, 15012));
        assert!(config.dashboard.ip().is_loopback());
    }

    #[test]
    fn all_problems_are_named_at_once() {
        let text = "state: d\ncluster: Aws\nlisten: everywhere\nreplica: 2\nadvertise: [\"gw\"]\n";
        let message = parse(text).expect_err("four problems").to_string();
        for part in ["cluster", "listen: \"everywhere\"", "replica: 2 needs", "advertise[0]: \"gw\""] {
            assert!(message.contains(part), "{part} is missing in {message}");
        }
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_name() {
        let message = parse("state: d\ncluster: a\nlissten: x\n").expect_err("unknown field").to_string();
        assert!(message.contains("lissten"), "{message}");
    }
}
