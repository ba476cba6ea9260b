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
    /// Workloads that were ever started.
    started: u16,
    isthmus: PathBuf,
    sample: Program,
    capture: Capture,
    /// The root's fingerprint, which sidecars pin.
    root: String,
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
        /// Its arguments; tokens are never among them.
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
    /// No such thing in the mesh.
    #[error("the mesh has no {what} {name}")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// By which name.
        name: String,
    },
}

/// The binary under a name in the lab's directory: sidecars run under a uid of their own, which may not get to
/// where it was built (a home directory, most often).
fn reachable(binary: &Path, dir: &Path) -> Result<PathBuf, MeshError> {
    let name = dir.join("isthmus");
    // Another file system takes a copy.
    std::fs::hard_link(binary, &name)
        .or_else(|_| std::fs::copy(binary, &name).map(drop))
        .map_err(|source| MeshError::File { path: binary.to_owned(), source })?;
    Ok(name)
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
        let isthmus = reachable(&isthmus.into(), lab.dir())?;
        Ok(Self { clusters, workloads, started: 0, isthmus, sample, capture, root: String::new(), lab })
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
        let settings = place.settings(&self.cluster(cluster)?.locality);
        let mut args = vec!["init", "--mesh", MESH, "--trust-domain", MESH, "--cluster", cluster, "-o", "json"];
        args.extend(settings.iter().map(String::as_str));
        let founded = parse(&args, &self.command(&place.host, &[], &args)?)?;
        self.root = founded["root_fingerprint"].as_str().unwrap_or_default().to_owned();
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
        let settings = place.settings(&self.cluster(cluster)?.locality);
        let args: Vec<&str> = std::iter::once("join").chain(settings.iter().map(String::as_str)).collect();
        self.command(&place.host, &[("ISTHMUS_JOIN_TOKEN", token.trim())], &args)?;
        self.start_gateway(cluster, place)?;
        Ok(start.elapsed())
    }

    /// Runs only the join of a token, on a gateway's machine and into a directory that no gateway starts from: to
    /// see it refused.
    ///
    /// # Errors
    /// [`MeshError::Command`] with what it said.
    pub fn try_join(&self, token: &str, directory: &str) -> Result<String, MeshError> {
        let state = self.lab.dir().join(directory).display().to_string();
        let replicas = self.clusters.values().flat_map(|cluster| &cluster.replicas);
        let host = replicas.map(|replica| replica.place.host.clone()).next().unwrap_or(Host::here());
        self.command(&host, &[("ISTHMUS_JOIN_TOKEN", token.trim())], &["join", "--state", &state])
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
        let socket = format!("unix:{}", self.replica(cluster, 0)?.socket().display());
        self.command(&Host::here(), &[("ISTHMUS_GATEWAY", &socket)], args)
    }

    /// The same for an answer in JSON (`-o json`).
    ///
    /// # Errors
    /// As [`Mesh::cli`]; an answer that is no JSON is one too.
    pub fn json(&self, cluster: &str, args: &[&str]) -> Result<serde_json::Value, MeshError> {
        let args = [args, &["-o", "json"]].concat();
        parse(&args, &self.cli(cluster, &args)?)
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

    /// Writes objects for the whole mesh with the operator's key, through a cluster's gateway; or deletes them.
    ///
    /// # Errors
    /// As [`Mesh::cli`].
    pub fn mesh_wide(&self, cluster: &str, verb: &str, yaml: &str) -> Result<(), MeshError> {
        let path = self.lab.dir().join("mesh-wide.yaml");
        write(&path, yaml)?;
        self.cli(cluster, &[verb, "--mesh", "-f", &path.to_string_lossy()]).map(drop)
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
    fn command(&self, host: &Host, env: &[(&str, &str)], args: &[&str]) -> Result<String, MeshError> {
        let home = self.lab.dir().join(HOME);
        let mut program = Program::new("isthmus", &self.isthmus).args(args).env("HOME", &home);
        program = program.env("XDG_CONFIG_HOME", home.join("config")).env("XDG_STATE_HOME", home.join("state"));
        for (key, value) in env {
            program = program.env(key, value);
        }
        let output = program.output(host)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(MeshError::Command {
            command: args.join(" "),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

fn parse(args: &[&str], text: &str) -> Result<serde_json::Value, MeshError> {
    serde_json::from_str(text).map_err(|error| MeshError::Command {
        command: args.join(" "),
        status: "wrote no JSON".into(),
        said: format!("{error}: {text}"),
    })
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
