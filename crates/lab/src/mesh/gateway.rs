//! A gateway replica of a mesh in a lab: its machine, its files, its process.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use super::{Mesh, MeshError, READY_WITHIN, unknown, write};
use crate::{Host, Mode, Probe, Process, Program, relay::PORT};

/// Where a replica runs and what it is started from.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) host: Host,
    state: PathBuf,
    number: usize,
    dashboard: SocketAddr,
}

/// A running replica.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) place: Place,
    pub(super) process: Process,
}

impl Place {
    /// Where other clusters reach it.
    fn advertise(&self) -> String {
        SocketAddr::new(self.host.public().unwrap_or(self.host.local()), PORT).to_string()
    }

    /// What `init` and `join` are told about it.
    pub(super) fn settings(&self, locality: &str) -> Vec<String> {
        let flags = [
            ("--state", self.state.display().to_string()),
            ("--advertise", self.advertise()),
            ("--locality", locality.to_owned()),
            ("--listen", self.host.listen().to_string()),
            ("--dashboard", self.dashboard.to_string()),
            ("--socket", self.socket().display().to_string()),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    fn config(&self) -> PathBuf {
        self.state.join("gateway.yaml")
    }

    fn socket(&self) -> PathBuf {
        self.state.join("gateway.sock")
    }
}

impl Replica {
    pub(super) fn socket(&self) -> PathBuf {
        self.place.socket()
    }

    pub(super) fn dashboard(&self) -> SocketAddr {
        self.place.dashboard
    }

    /// Where sidecars find it.
    pub(super) fn session(&self) -> SocketAddr {
        SocketAddr::new(self.place.host.local(), SESSION_PORT)
    }

    pub(super) fn probe(&self) -> Probe {
        Probe::http(self.place.host.local(), HEALTH_PORT, "/healthz/ready")
    }
}

impl Mesh {
    /// A machine and a directory for the next replica of a cluster.
    pub(super) fn place(&mut self, cluster: &str) -> Result<Place, MeshError> {
        let number = self.replicas(cluster);
        let host = self.lab_mut().add_gateway(cluster, &format!("{cluster}/gateway-{number}"))?;
        let state = self.lab().dir().join(format!("{cluster}-gateway-{number}"));
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let dashboard = SocketAddr::new(if host.netns().is_some() { loopback } else { host.local() }, DASHBOARD_PORT);
        Ok(Place { host, state, number, dashboard })
    }

    /// Starts a replica; the first from what `init` or `join` wrote, the others from that of the first.
    pub(super) fn start_gateway(&mut self, cluster: &str, place: Place) -> Result<(), MeshError> {
        // The first starts from what `init` or `join` wrote.
        if place.number > 0 {
            self.write_replica(cluster, &place)?;
        }
        let config = place.config();
        let name = format!("{cluster}-gateway-{}", place.number);
        let program = Program::new(name, &self.isthmus).arg("gateway").arg("--config").arg(config);
        let process = program.env("HOME", self.lab().dir().join("home")).start(&place.host, &self.logs())?;
        let mut replica = Replica { place, process };
        let probe = replica.probe();
        replica.process.wait_ready(&probe, READY_WITHIN)?;
        let entry = self.clusters.get_mut(cluster).ok_or_else(|| unknown("cluster", cluster))?;
        entry.replicas.push(replica);
        Ok(())
    }

    fn write_replica(&self, cluster: &str, place: &Place) -> Result<(), MeshError> {
        let first = self.replica(cluster, 0)?;
        super::make_dir(&place.state)?;
        let shared = first.place.state.join("identity");
        let lines = [
            format!("state: {}", place.state.display()),
            format!("identity: {}", shared.display()),
            format!("cluster: {cluster}"),
            format!("replica: {}", place.number),
            format!("member: {}", first.session()),
            format!("locality: {:?}", self.cluster(cluster)?.locality),
            format!("advertise: [{:?}]", place.advertise()),
            format!("listen: {}", place.host.listen()),
            format!("dashboard: \"{}\"", place.dashboard),
            format!("socket: {}", place.socket().display()),
        ];
        write(&place.config(), &(lines.join("\n") + "\n"))
    }
}

impl Mode {
    /// Whether machines have a loopback of their own.
    pub(super) fn is_isolated(self) -> bool {
        self == Self::Namespaces
    }
}

const SESSION_PORT: u16 = 15012;
const HEALTH_PORT: u16 = 15021;
const DASHBOARD_PORT: u16 = 15080;
