//! A mesh as a story tells it: first who is there, then what happens.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use isthmus_lab::{
    Host, Lab, LoadReport, Mesh, MeshError, Mode, PathConfig, Program, RunningLoad, Verdict,
    load::Load,
    mesh::{Workload, WorkloadSpec, service_yaml},
};

/// Milliseconds.
pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// How long something may take. The figure itself with `ISTHMUS_FIGURES=strict`, which wants an optimised
/// binary and a quiet machine (`bench/README.md`); else four times that, which only a defect exceeds.
pub fn within(figure: Duration) -> Duration {
    let strict = std::env::var("ISTHMUS_FIGURES").is_ok_and(|value| value == "strict");
    if strict { figure } else { figure * 4 }
}

/// Who is there when the story begins. The first cluster founds the mesh, the others join it.
#[derive(Debug)]
pub struct Story {
    name: &'static str,
    sample: &'static str,
    clusters: Vec<(&'static str, &'static str, usize)>,
    paths: Vec<(&'static str, &'static str, PathConfig)>,
    workloads: Vec<WorkloadSpec>,
    exports: Vec<(&'static str, &'static str)>,
}

/// A story whose mesh lives.
#[derive(Debug)]
pub struct Told {
    /// The mesh.
    pub mesh: Mesh,
    name: &'static str,
    // Last: the next story may begin when this mesh is gone.
    _alone: MutexGuard<'static, ()>,
}

impl Story {
    /// An empty story. `sample` is the sample service's binary: `env!("CARGO_BIN_EXE_isthmus-sample")`.
    pub fn new(name: &'static str, sample: &'static str) -> Self {
        let (clusters, paths, workloads, exports) = Default::default();
        Self { name, sample, clusters, paths, workloads, exports }
    }

    /// A cluster at a locality `region/zone`, with one gateway.
    #[must_use]
    pub fn cluster(mut self, name: &'static str, locality: &'static str) -> Self {
        self.clusters.push((name, locality, 1));
        self
    }

    /// The last cluster has this many gateway replicas.
    #[must_use]
    pub fn replicas(mut self, replicas: usize) -> Self {
        if let Some(last) = self.clusters.last_mut() {
            last.2 = replicas;
        }
        self
    }

    /// The round trip between two clusters; unset paths have none.
    #[must_use]
    pub fn rtt(self, a: &'static str, b: &'static str, rtt: Duration) -> Self {
        self.path(a, b, PathConfig::delay(rtt / 2))
    }

    /// Both directions between two clusters.
    #[must_use]
    pub fn path(mut self, a: &'static str, b: &'static str, config: PathConfig) -> Self {
        self.paths.push((a, b, config));
        self
    }

    /// A service of namespace `shop` in a cluster, with this many instances `NAME-1`, `NAME-2`, ...
    #[must_use]
    pub fn service(mut self, cluster: &'static str, service: &str, instances: usize) -> Self {
        let named =
            (1..=instances).map(|n| WorkloadSpec::service(cluster, NAMESPACE, service, &format!("{service}-{n}")));
        self.workloads.extend(named);
        self
    }

    /// The same, exported to all clusters.
    #[must_use]
    pub fn exported(mut self, cluster: &'static str, service: &'static str, instances: usize) -> Self {
        self.exports.push((cluster, service));
        self.service(cluster, service, instances)
    }

    /// A workload that only calls.
    #[must_use]
    pub fn client(mut self, cluster: &'static str, name: &str) -> Self {
        self.workloads.push(WorkloadSpec::client(cluster, NAMESPACE, name));
        self
    }

    /// Builds the mesh and tells the story; on a failure the logs' ends are printed and kept.
    pub fn tell(self, story: impl FnOnce(&mut Told) -> anyhow::Result<()>) {
        let name = self.name;
        let binary = match ready_to_run() {
            Ok(binary) => binary,
            Err(reason) => return skip(name, &reason),
        };
        let (mode, reason) = chosen_mode();
        if let Some(reason) = reason {
            println!("{name}: on loopback: {reason}");
        }
        let began = Instant::now();
        let mut told = match self.begin(mode, &binary) {
            Ok(told) => told,
            Err(error) => panic!("{name} could not begin: {error}"),
        };
        println!("{name}: the mesh stands after {:.1} s", began.elapsed().as_secs_f64());
        // A failed assertion is a panic, and wants the logs as much as an error does.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| story(&mut told)));
        match outcome {
            Ok(Ok(())) => println!("{name}: told in {:.1} s", began.elapsed().as_secs_f64()),
            Ok(Err(error)) => {
                told.keep_logs();
                panic!("{name}: {error:#}");
            }
            Err(panic) => {
                told.keep_logs();
                std::panic::resume_unwind(panic);
            }
        }
    }

    fn begin(self, mode: Mode, binary: &Path) -> Result<Told, MeshError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        // A failed story poisons the lock; the next one is as good as ever.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mesh = Mesh::new(Lab::new(mode, SEED)?, binary, Program::new("sample", self.sample))?;
        let mut told = Told { mesh, name: self.name, _alone: alone };
        if let Err(error) = self.populate(&mut told.mesh) {
            told.keep_logs();
            return Err(error);
        }
        Ok(told)
    }

    fn populate(&self, mesh: &mut Mesh) -> Result<(), MeshError> {
        for (name, locality, _) in &self.clusters {
            mesh.add_cluster(name, locality)?;
        }
        for (a, b, config) in &self.paths {
            mesh.lab().wan().set(a, b, config.clone())?;
        }
        for (number, (name, _, replicas)) in self.clusters.iter().enumerate() {
            match number {
                0 => mesh.found(name)?,
                _ => drop(mesh.join(name, self.clusters[0].0)?),
            }
            for _ in 1..*replicas {
                mesh.add_replica(name)?;
            }
        }
        for workload in &self.workloads {
            mesh.add_workload(workload)?;
        }
        for (cluster, service) in &self.exports {
            mesh.apply(cluster, &service_yaml(NAMESPACE, service))?;
            mesh.cli(cluster, &["export", &format!("svc/{service}"), "-n", NAMESPACE])?;
        }
        Ok(())
    }
}

impl Told {
    /// A workload by `cluster/name`.
    pub fn workload(&mut self, key: &str) -> &mut Workload {
        self.mesh.workload(key).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A load from a workload to an exported service, e.g. 200 a second.
    pub fn load(&mut self, from: &str, service: &str) -> anyhow::Result<Load> {
        let host = mesh_host(service);
        let deadline = Instant::now() + NAME_WITHIN;
        // A name is known as soon as its export has arrived; a story that measures this asks itself.
        loop {
            match self.workload(from).load(&host) {
                Err(MeshError::Unknown { .. }) if Instant::now() < deadline => thread::sleep(ms(20)),
                load => return Ok(load?),
            }
        }
    }

    /// Starts a load from a workload.
    pub fn start(&mut self, from: &str, load: Load) -> anyhow::Result<RunningLoad> {
        Ok(load.start(&self.host(from))?)
    }

    /// The machine of a workload.
    pub fn host(&mut self, key: &str) -> Host {
        self.workload(key).host.clone()
    }

    /// Calls until an answer comes, and gives the cluster it came from and the time it took.
    pub fn call_until_answered(
        &mut self,
        from: &str,
        service: &str,
        within: Duration,
    ) -> anyhow::Result<(String, Duration)> {
        let (start, host) = (Instant::now(), self.host(from));
        let mut last = String::from("never asked");
        while start.elapsed() < within {
            let outcome = match self.workload(from).load(&mesh_host(service)) {
                Ok(load) => load.patience(ms(1000)).once(&host)?,
                Err(error) => {
                    last = error.to_string();
                    thread::sleep(ms(20));
                    continue;
                }
            };
            match outcome.result {
                Ok(answered) => return Ok((answered.cluster, start.elapsed())),
                Err(failure) => last = failure.to_string(),
            }
            thread::sleep(ms(10));
        }
        anyhow::bail!("{service} did not answer {from} within {within:?}; the last answer: {last}")
    }

    /// Calls until the answer is a refusal, and gives the time it took.
    pub fn call_until_refused(&mut self, from: &str, service: &str, within: Duration) -> anyhow::Result<Duration> {
        let (start, host) = (Instant::now(), self.host(from));
        while start.elapsed() < within {
            let refused = match self.workload(from).load(&mesh_host(service)) {
                Ok(load) => load.patience(ms(1000)).once(&host)?.result.is_err(),
                Err(MeshError::Unknown { .. }) => true,
                Err(error) => return Err(error.into()),
            };
            if refused {
                return Ok(start.elapsed());
            }
            thread::sleep(ms(10));
        }
        anyhow::bail!("{service} still answers {from} after {within:?}")
    }

    /// Judges a load by the ledgers of all instances.
    pub fn judge(&self, report: &LoadReport, service: &str) -> anyhow::Result<Verdict> {
        let mut ledger = report.ledger();
        for path in self.mesh.ledgers() {
            ledger.read_seen(&path)?;
        }
        let verdict = ledger.judge(service);
        println!("{}: {report}; {:?}", self.name, verdict.by_cluster);
        Ok(verdict)
    }

    /// Puts a workload of a service into a running mesh.
    pub fn add_service(&mut self, cluster: &str, service: &str, name: &str) -> anyhow::Result<()> {
        self.mesh.apply(cluster, &service_yaml(NAMESPACE, service))?;
        self.mesh.add_workload(&WorkloadSpec::service(cluster, NAMESPACE, service, name))?;
        Ok(())
    }

    /// `isthmus export` in a cluster.
    pub fn export(&self, cluster: &str, service: &str) -> anyhow::Result<()> {
        Ok(self.mesh.cli(cluster, &["export", &format!("svc/{service}"), "-n", NAMESPACE]).map(drop)?)
    }

    /// `isthmus unexport` in a cluster.
    pub fn unexport(&self, cluster: &str, service: &str) -> anyhow::Result<()> {
        Ok(self.mesh.cli(cluster, &["unexport", &format!("svc/{service}"), "-n", NAMESPACE]).map(drop)?)
    }

    fn keep_logs(&mut self) {
        self.mesh.lab_mut().keep_dir();
        println!("{}: everything is kept in {}", self.name, self.mesh.lab().dir().display());
        let logs = self.mesh.logs();
        for entry in std::fs::read_dir(&logs).into_iter().flatten().flatten() {
            let path = entry.path();
            println!("---- {}\n{}", path.display(), isthmus_lab::process::tail(&path, LOG_LINES));
        }
    }
}

/// The mesh's name of a service of the stories' namespace.
pub fn mesh_host(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.clusterset.local")
}

/// The repository's top. Asked when the test runs: a build directory that clones share keeps the path of the first.
pub fn top() -> PathBuf {
    let tests = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs the tests");
    Path::new(&tests).parent().expect("tests/ lies in the repository").to_owned()
}

/// The binary that stories run: `ISTHMUS_BIN`, or the one that cargo built beside the tests.
///
/// # Errors
/// There is none, and what makes it.
pub fn binary() -> Result<PathBuf, String> {
    let beside = || {
        // target/debug/deps/story-1234 -> target/debug/isthmus
        let test = std::env::current_exe().ok()?;
        Some(test.parent()?.parent()?.join("isthmus"))
    };
    let binary = std::env::var_os("ISTHMUS_BIN").map(PathBuf::from).or_else(beside).unwrap_or_default();
    match binary.exists() {
        true => Ok(binary),
        false => Err(format!("no {}; `cargo build -p isthmus-cli` makes it", binary.display())),
    }
}

/// The binary, if it can play a gateway.
fn ready_to_run() -> Result<PathBuf, String> {
    let binary = binary()?;
    let can = |command: &str| {
        let asked = std::process::Command::new(&binary).args([command, "--help"]).output();
        let usage = format!("isthmus {command}");
        asked.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(&usage))
    };
    match ["init", "gateway", "join", "proxy"].into_iter().find(|command| !can(command)) {
        Some(missing) => Err(format!("{} has no command `{missing}`", binary.display())),
        None => Ok(binary),
    }
}

/// Namespaces where they are allowed; `ISTHMUS_LAB=loopback` tells the story without root's help.
fn chosen_mode() -> (Mode, Option<String>) {
    match std::env::var("ISTHMUS_LAB").as_deref() {
        Ok("loopback") => (Mode::Loopback, Some("ISTHMUS_LAB says so".to_owned())),
        _ => Mode::detect(),
    }
}

/// Says that a story was not told, or fails if it had to be.
fn skip(name: &str, reason: &str) {
    let required = std::env::var("ISTHMUS_STORIES").is_ok_and(|value| value == "required");
    assert!(!required, "{name} is required and cannot run: {reason}");
    println!("SKIPPED: {name}: {reason}");
}

const NAMESPACE: &str = "shop";
/// One network for all runs; a story about loss sets its own.
const SEED: u64 = 20_26;
/// How long a load waits for its target's name to arrive.
const NAME_WITHIN: Duration = Duration::from_secs(5);
const LOG_LINES: usize = 30;
