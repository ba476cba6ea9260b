//! A mesh of real processes in a [`Lab`], made by the same commands that a user types.
//!
//! Clusters are founded (`isthmus init`) and joined (`isthmus token create`, `isthmus join`);
//! gateways and sidecars are started from config files; services are applied and exported through
//! the CLI. Nothing here reaches into a process: what it knows, it was told on standard output.
//!
//! Blocking. The demo and the end-to-end tests share it, so that the demo shows what is tested.
//! Workloads are in `workload`, what gateways are started from in `gateway`.

mod gateway;
mod workload;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub use workload::{APP_PORT, Capture, Workload, WorkloadSpec, service_yaml};

use crate::{Host, Lab, LabError, Process, Program};
use gateway::Replica;

/// A mesh in a lab.
#[derive(Debug)]
pub struct Mesh {
    // Before the lab, so that processes end before their network does.
    clusters: BTreeMap<String, Cluster>,
    workloads: BTreeMap<String, Workload>,
    isthmus: PathBuf,
    sample: Program,
    capture: Capture,
    lab: Lab,
}

#[derive(Debug)]
struct Cluster {
    locality: String,
    replicas: Vec<Replica>,
}

/// What went wrong while a mesh was made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeshError {
    /// The lab's part.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A command of the CLI was refused.
    #[error("`isthmus {command}` {status}: {said}")]
    Command {
        /// Its arguments, without tokens.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote to standard error.
        said: String,
    },
    /// A file could not be written or read.
    #[error("cannot write or read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A token that is none.
    #[error("the workload token is not one")]
    Token(#[source] isthmus_identity::TokenError),
    /// No such thing in the mesh.
    #[error("the mesh has no {what} {name}")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// By which name.
        name: String,
    },
}

impl Mesh {
    /// A mesh without clusters. `isthmus` is the binary; `sample` is a program that takes the
    /// flags of [`crate::sample::SampleConfig`] after its own.
    ///
    /// # Errors
    /// [`MeshError::File`] in the lab's directory.
    pub fn new(lab: Lab, isthmus: impl Into<PathBuf>, sample: Program) -> Result<Self, MeshError> {
        for dir in [LOGS, HOME, LEDGERS] {
            make_dir(&lab.dir().join(dir))?;
        }
        let capture = Capture::best(lab.mode());
        let (clusters, workloads) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { clusters, workloads, isthmus: isthmus.into(), sample, capture, lab })
    }

    /// How sidecars get their workloads' connections; the best there is unless set.
    pub fn capture(&self) -> Capture {
        self.capture
    }

    /// Sets how sidecars started from now on get their workloads' connections.
    pub fn set_capture(&mut self, capture: Capture) {
        self.capture = capture;
    }

    /// The network.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The network, to change.
    pub fn lab_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }

    /// Where every process logs.
    pub fn logs(&self) -> PathBuf {
        self.lab.dir().join(LOGS)
    }

    /// Adds a cluster's network and first gateway machine, without a process: so that its paths
    /// can be set before anything talks.
    ///
    /// # Errors
    /// The lab's.
    pub fn add_cluster(&mut self, name: &str, locality: &str) -> Result<(), MeshError> {
        self.lab.add_cluster(name)?;
        self.clusters.insert(name.to_owned(), Cluster { locality: locality.to_owned(), replicas: Vec::new() });
        Ok(())
    }

    /// Founds the mesh in a cluster (`isthmus init`) and starts its gateway.
    ///
    /// # Errors
    /// [`MeshError`]; a gateway that does not get ready, with the end of its log.
    pub fn found(&mut self, cluster: &str) -> Result<(), MeshError> {
        let place = self.place(cluster)?;
        let locality = self.cluster(cluster)?.locality.clone();
        let mut args =
            vec!["init", "--mesh", MESH, "--trust-domain", MESH, "--cluster", cluster, "--locality", &locality];
        let (state, advertise) = (place.state.to_string_lossy().into_owned(), place.advertise());
        args.extend(["--state", &state, "--advertise", &advertise]);
        self.command(&place.host, None, &args)?;
        self.start_gateway(cluster, place)
    }

    /// Joins a cluster to the mesh by a token made in another (`token create`, `join`) and starts
    /// its gateway. Gives the time from the token to a ready gateway.
    ///
    /// # Errors
    /// As [`Mesh::found`].
    pub fn join(&mut self, cluster: &str, by: &str) -> Result<Duration, MeshError> {
        let start = Instant::now();
        let token = self.cli(by, &["token", "create", cluster])?;
        let place = self.place(cluster)?;
        let (state, advertise) = (place.state.to_string_lossy().into_owned(), place.advertise());
        let locality = self.cluster(cluster)?.locality.clone();
        let args = ["join", token.trim(), "--state", &state, "--advertise", &advertise, "--locality", &locality];
        self.command(&place.host, None, &args)?;
        self.start_gateway(cluster, place)?;
        Ok(start.elapsed())
    }

    /// Adds a gateway replica to a running cluster.
    ///
    /// # Errors
    /// As [`Mesh::found`].
    pub fn add_replica(&mut self, cluster: &str) -> Result<(), MeshError> {
        let place = self.place(cluster)?;
        self.start_gateway(cluster, place)
    }

    /// Runs a command of the CLI against a cluster's gateway; gives its standard output.
    ///
    /// # Errors
    /// [`MeshError::Command`] with what it said.
    pub fn cli(&self, cluster: &str, args: &[&str]) -> Result<String, MeshError> {
        let socket = self.replica(cluster, 0)?.socket();
        self.command(&Host::here(), Some(&socket), args)
    }

    /// The same for an answer in JSON (`-o json`).
    ///
    /// # Errors
    /// As [`Mesh::cli`]; an answer that is no JSON is one too.
    pub fn json(&self, cluster: &str, args: &[&str]) -> Result<serde_json::Value, MeshError> {
        let args = [args, &["-o", "json"]].concat();
        let text = self.cli(cluster, &args)?;
        serde_json::from_str(&text).map_err(|error| MeshError::Command {
            command: args.join(" "),
            status: "wrote no JSON".into(),
            said: format!("{error}: {text}"),
        })
    }

    /// Writes objects in a cluster (`isthmus apply -f`).
    ///
    /// # Errors
    /// As [`Mesh::cli`].
    pub fn apply(&self, cluster: &str, yaml: &str) -> Result<(), MeshError> {
        let path = self.lab.dir().join(format!("{cluster}.yaml"));
        write(&path, yaml)?;
        self.cli(cluster, &["apply", "-f", &path.to_string_lossy()]).map(drop)
    }

    /// A gateway's process, to kill and to start again.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn gateway(&mut self, cluster: &str, replica: usize) -> Result<&mut Process, MeshError> {
        let found = self.clusters.get_mut(cluster).and_then(|entry| entry.replicas.get_mut(replica));
        found.map(|entry| &mut entry.process).ok_or_else(|| unknown("gateway", &format!("{cluster}/{replica}")))
    }

    /// How many replicas a cluster has.
    pub fn replicas(&self, cluster: &str) -> usize {
        self.clusters.get(cluster).map_or(0, |entry| entry.replicas.len())
    }

    /// Starts a gateway again and waits until it is ready.
    ///
    /// # Errors
    /// [`MeshError::Lab`] with the end of its log.
    pub fn restart_gateway(&mut self, cluster: &str, replica: usize) -> Result<(), MeshError> {
        let probe = self.replica(cluster, replica)?.probe();
        let process = self.gateway(cluster, replica)?;
        process.restart()?;
        process.wait_ready(&probe, READY_WITHIN)?;
        Ok(())
    }

    /// Where a cluster's first gateway shows its dashboard, as seen from its machine.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn dashboard(&self, cluster: &str) -> Result<std::net::SocketAddr, MeshError> {
        Ok(self.replica(cluster, 0)?.dashboard())
    }

    /// The operator socket of a cluster's first gateway.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn socket(&self, cluster: &str) -> Result<PathBuf, MeshError> {
        Ok(self.replica(cluster, 0)?.socket())
    }

    /// The ledgers of all sample services that ever ran.
    pub fn ledgers(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.lab.dir().join(LEDGERS));
        entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    fn replica(&self, cluster: &str, number: usize) -> Result<&Replica, MeshError> {
        self.cluster(cluster)?.replicas.get(number).ok_or_else(|| unknown("gateway", &format!("{cluster}/{number}")))
    }

    fn cluster(&self, name: &str) -> Result<&Cluster, MeshError> {
        self.clusters.get(name).ok_or_else(|| unknown("cluster", name))
    }

    /// Runs the CLI somewhere, with a home of its own: it keeps operators' keys there.
    fn command(&self, host: &Host, socket: Option<&Path>, args: &[&str]) -> Result<String, MeshError> {
        let home = self.lab.dir().join(HOME);
        let mut program = Program::new("isthmus", &self.isthmus).args(args).env("HOME", &home);
        program = program.env("XDG_CONFIG_HOME", home.join("config")).env("XDG_STATE_HOME", home.join("state"));
        if let Some(socket) = socket {
            program = program.env("ISTHMUS_GATEWAY", format!("unix:{}", socket.display()));
        }
        let output = program.output(host)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(MeshError::Command {
            command: without_tokens(args),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

/// Tokens are secrets, also in the messages of a test.
fn without_tokens(args: &[&str]) -> String {
    let shown = args.iter().map(|arg| if arg.starts_with("ism1.") || arg.starts_with("isw1.") { "TOKEN" } else { arg });
    shown.collect::<Vec<_>>().join(" ")
}

fn unknown(what: &'static str, name: &str) -> MeshError {
    MeshError::Unknown { what, name: name.to_owned() }
}

fn make_dir(path: &Path) -> Result<(), MeshError> {
    std::fs::create_dir_all(path).map_err(|source| MeshError::File { path: path.to_owned(), source })
}

fn write(path: &Path, content: &str) -> Result<(), MeshError> {
    std::fs::write(path, content).map_err(|source| MeshError::File { path: path.to_owned(), source })
}

/// The mesh's name, and its trust domain.
pub const MESH: &str = "demo";
/// How long a process may take to get ready on a busy machine.
pub const READY_WITHIN: Duration = Duration::from_secs(20);
const LOGS: &str = "logs";
const HOME: &str = "home";
const LEDGERS: &str = "ledgers";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_do_not_show_in_messages() {
        assert_eq!(without_tokens(&["join", "ism1.secret", "--state", "d"]), "join TOKEN --state d");
    }
}
