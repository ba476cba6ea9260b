//! The `gateway.yaml` that `init` and `join` write, from their common options.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use isthmus_gateway::cluster_files::ClusterFiles;
use isthmus_gateway::config::GatewayConfig;
use isthmus_identity::state::create_dir;
use isthmus_model::ClusterName;

use crate::context;
use crate::failure::{Exit, Failure};
use crate::render;

/// Longest path of a unix socket (`sockaddr_un.sun_path`, without its final zero).
const SOCKET_PATH_MAX: usize = 107;

/// What `init` and `join` let one say about the cluster's gateway.
#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// Where the gateway keeps its state [default: /var/lib/isthmus, or $XDG_STATE_HOME/isthmus if not root]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where other clusters reach this gateway; may be repeated, leave it out if it can only dial out
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Vec<String>,
    /// Where the cluster runs
    #[arg(long, default_value = "", value_name = "REGION/ZONE")]
    pub locality: String,
    /// The address all ports bind on
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
    /// Where the dashboard listens [default: 127.0.0.1:15080, or LISTEN:15080 if that is loopback]
    #[arg(long, value_name = "IP:PORT")]
    dashboard: Option<SocketAddr>,
    /// A directory of YAML objects, read at start and on change
    #[arg(long, value_name = "DIR")]
    objects: Option<PathBuf>,
    /// The operator socket [default: /run/isthmus/gateway.sock for the default state of root, else in the state]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Settings {
    /// The state directory, absolute.
    pub fn state(&self) -> PathBuf {
        absolute(&self.state.clone().unwrap_or_else(context::default_state))
    }

    /// The operator socket, absolute.
    pub fn socket(&self, state: &Path) -> PathBuf {
        match &self.socket {
            Some(socket) => absolute(socket),
            None if self.state.is_none() => context::default_socket(),
            None => state.join("gateway.sock"),
        }
    }

    /// Whether a cluster can be founded or joined in `state`: before anything is written or consumed.
    ///
    /// # Errors
    /// A directory that holds a cluster already or cannot be written, a socket path that is too long.
    pub fn check(&self, state: &Path) -> Result<(), Failure> {
        if ClusterFiles::exist(&state.join("identity")) {
            return Err(Failure::new(Exit::Failed, format!("{} holds a cluster's identity already", state.display()))
                .fix("choose another --state, or remove that directory if its cluster is gone for good"));
        }
        let socket = self.socket(state);
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            let text = format!("the socket's path {} is longer than {SOCKET_PATH_MAX} bytes", socket.display());
            return Err(Failure::new(Exit::Usage, text).fix("choose a shorter one with --socket"));
        }
        create_dir(state)?;
        let probe = state.join(".writable");
        std::fs::write(&probe, b"")
            .and_then(|()| std::fs::remove_file(&probe))
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot write to {}", state.display())).cause(error))?;
        // What the gateway would refuse is refused here, with the same words.
        self.prove(&"unnamed".parse()?, state).map(|_| ())
    }

    /// Writes `gateway.yaml` into `state` and returns its path. An existing one is the operator's: it stays.
    ///
    /// # Errors
    /// Settings that do not fit together, a file that cannot be written.
    pub fn write(&self, cluster: &ClusterName, state: &Path) -> Result<PathBuf, Failure> {
        let path = state.join("gateway.yaml");
        let text = self.prove(cluster, state)?;
        if path.exists() {
            render::note(&format!("   {} exists and is left as it is", path.display()));
            return Ok(path);
        }
        std::fs::write(&path, text)
            .map_err(|error| Failure::new(Exit::Failed, format!("cannot write {}", path.display())).cause(error))?;
        Ok(path)
    }

    fn prove(&self, cluster: &ClusterName, state: &Path) -> Result<String, Failure> {
        let text = self.text(cluster, state);
        GatewayConfig::parse(&text, &state.join("gateway.yaml"))?;
        Ok(text)
    }

    fn text(&self, cluster: &ClusterName, state: &Path) -> String {
        // JSON strings are YAML strings, whatever is in them.
        let quoted = |text: &dyn std::fmt::Display| serde_json::Value::String(text.to_string()).to_string();
        let mut text =
            String::from("# The gateway of this cluster. Start it with: isthmus gateway --config THIS-FILE\n");
        let mut line = |name: &str, value: String, why: &str| text.push_str(&format!("# {why}\n{name}: {value}\n"));
        line("cluster", quoted(cluster), "The cluster's name, as in its certificate.");
        line("state", "\".\"".into(), "Store and identity: this directory.");
        line("locality", quoted(&self.locality), "Where it runs: region/zone. Nearer clusters are preferred.");
        let advertised: Vec<String> = self.advertise.iter().map(|address| quoted(address)).collect();
        line(
            "advertise",
            format!("[{}]", advertised.join(", ")),
            "Where other clusters reach it, UDP and TCP; [] if it only dials out.",
        );
        let listen = self.listen.unwrap_or(IpAddr::from([0, 0, 0, 0]));
        line("listen", quoted(&listen), "The address its ports bind on.");
        line("dashboard", quoted(&self.dashboard()), "The dashboard.");
        line("socket", quoted(&self.socket(state).display()), "Where `isthmus` reaches it: --gateway unix:PATH.");
        if let Some(objects) = &self.objects {
            line("objects", quoted(&absolute(objects).display()), "YAML objects, read at start and on change.");
        }
        text
    }

    fn dashboard(&self) -> SocketAddr {
        let ip = self.listen.filter(IpAddr::is_loopback).unwrap_or(IpAddr::from([127, 0, 0, 1]));
        self.dashboard.unwrap_or_else(|| SocketAddr::new(ip, 15080))
    }
}

/// Says what to type next, on standard output.
pub fn print_next(config: &Path, socket: &Path, then: &str) {
    render::line(&format!("Next:  isthmus gateway --config {}", config.display()));
    match socket == context::default_socket() {
        true => render::line(&format!("Then:  {then}")),
        false => render::line(&format!("Then:  export ISTHMUS_GATEWAY=unix:{}; {then}", socket.display())),
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            state: Some("/tmp/isthmus-none".into()),
            advertise: vec!["gw.example.com:15443".into()],
            locality: "eu-west-1/a: \"odd\"".into(),
            listen: Some(IpAddr::from([127, 1, 0, 1])),
            dashboard: None,
            objects: Some("/etc/isthmus/objects".into()),
            socket: None,
        }
    }

    #[test]
    fn what_is_written_is_what_the_gateway_reads() {
        let text = settings().text(&"aws-eu".parse().expect("valid"), Path::new("/tmp/isthmus-none"));
        let config = GatewayConfig::parse(&text, Path::new("/tmp/isthmus-none/gateway.yaml")).expect("valid");
        assert_eq!(config.cluster.as_str(), "aws-eu");
        assert_eq!(config.advertise, ["gw.example.com:15443"]);
        assert_eq!(config.listen, IpAddr::from([127, 1, 0, 1]));
        assert_eq!(config.dashboard, "127.1.0.1:15080".parse().expect("an address"));
        assert_eq!(config.socket, Path::new("/tmp/isthmus-none/gateway.sock"));
        assert_eq!(config.objects.as_deref(), Some(Path::new("/etc/isthmus/objects")));
        assert_eq!(config.locality.region, "eu-west-1");
        assert_eq!(config.state, Path::new("/tmp/isthmus-none"));
    }

    #[test]
    fn an_address_without_a_port_is_refused_before_anything_is_written() {
        let settings = Settings { advertise: vec!["gw.example.com".into()], ..settings() };
        let failure = settings.prove(&"aws-eu".parse().expect("valid"), Path::new("/tmp")).expect_err("no port");
        assert!(failure.to_string().contains("gw.example.com"), "{failure}");
    }

    #[test]
    fn a_socket_path_that_no_system_takes_is_refused() {
        let settings = Settings { socket: Some(format!("/{}", "x".repeat(120)).into()), ..settings() };
        let failure = settings.check(Path::new("/tmp/isthmus-none")).expect_err("too long");
        assert!(failure.to_string().contains("--socket"), "{failure}");
    }
}
