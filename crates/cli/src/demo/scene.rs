//! Who is there: three clouds, the delay between them, a payments service and its callers.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use isthmus_lab::ledger::Answered;
use isthmus_lab::load::Load;
use isthmus_lab::mesh::{Capture, WorkloadSpec, service_yaml};
use isthmus_lab::{Host, Lab, LoadReport, Mesh, MeshError, Mode, PathConfig, Program, RunningLoad, Verdict};
use tokio_util::sync::CancellationToken;

/// A cluster: name and locality.
pub const AWS: (&str, &str) = ("aws-eu", "eu-west-1/a");
/// The far one.
pub const GCP: (&str, &str) = ("gcp-us", "us-east1/b");
/// The near one, which joins in the middle of the story.
pub const ONPREM: (&str, &str) = ("onprem", "eu-central/rack-7");
/// Round trips between them.
pub const AWS_GCP: Duration = Duration::from_millis(80);
/// Frankfurt is near Dublin.
pub const AWS_ONPREM: Duration = Duration::from_millis(25);
const GCP_ONPREM: Duration = Duration::from_millis(95);

const NAMESPACE: &str = "shop";
/// What the story is about.
pub const PAYMENTS: &str = "payments";
/// Runs in one cluster only, so that the dashboard's links have something to carry.
pub const CATALOG: &str = "catalog";
/// The WAN's dice: the same in every run.
const SEED: u64 = 7;
/// Between two looks while something is awaited.
const GLANCE: Duration = Duration::from_millis(10);
/// Longest wait for one answer while looking whether a service answers at all.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);

/// The running demo. Dropping it takes everything down.
pub struct Demo {
    // Before the mesh: loads stop before what they call is gone.
    traffic: Vec<RunningLoad>,
    /// The mesh.
    pub mesh: Mesh,
    stop: CancellationToken,
}

/// The user asked to end.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

impl Demo {
    /// The network, with its delays, without a process.
    ///
    /// # Errors
    /// The lab's.
    pub fn new(mode: Mode, stop: CancellationToken) -> anyhow::Result<Self> {
        let lab = Lab::new(mode, SEED).context("cannot make the demo's network")?;
        let isthmus = std::env::current_exe().context("cannot find this program's own file")?;
        let sample = Program::new("sample", &isthmus).arg("sample");
        let mut mesh = Mesh::new(lab, isthmus, sample)?;
        for (name, locality) in [AWS, GCP, ONPREM] {
            mesh.add_cluster(name, locality)?;
        }
        for (a, b, rtt) in [(AWS, GCP, AWS_GCP), (AWS, ONPREM, AWS_ONPREM), (GCP, ONPREM, GCP_ONPREM)] {
            mesh.lab().wan().set(a.0, b.0, PathConfig::delay(rtt / 2))?;
        }
        Ok(Self { traffic: Vec::new(), mesh, stop })
    }

    /// Starts an instance of the service in a cluster, and tells the cluster of the service.
    ///
    /// # Errors
    /// [`MeshError`].
    pub fn add_service(&mut self, cluster: &str, service: &str, instance: &str) -> Result<(), MeshError> {
        self.mesh.apply(cluster, &service_yaml(NAMESPACE, service))?;
        self.mesh.add_workload(&WorkloadSpec::service(cluster, NAMESPACE, service, instance)).map(drop)
    }

    /// Starts a workload that only calls.
    ///
    /// # Errors
    /// [`MeshError`].
    pub fn add_caller(&mut self, cluster: &str) -> Result<(), MeshError> {
        self.mesh.add_workload(&WorkloadSpec::client(cluster, NAMESPACE, CALLER)).map(drop)
    }

    /// `isthmus export` in a cluster.
    ///
    /// # Errors
    /// [`MeshError`].
    pub fn export(&self, cluster: &str, service: &str) -> Result<(), MeshError> {
        self.mesh.cli(cluster, &["export", &format!("svc/{service}"), "-n", NAMESPACE]).map(drop)
    }

    /// Calls a service from a cluster until an answer satisfies `wanted`; gives the time it took.
    ///
    /// # Errors
    /// [`Stopped`]; no such answer in time, with what came instead.
    pub fn call_until(
        &mut self,
        from: &str,
        service: &str,
        within: Duration,
        wanted: impl Fn(&Answered) -> bool,
    ) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let mut last = "no answer".to_owned();
        while start.elapsed() < within {
            self.check_stop()?;
            match self.load(from, service).map(|(load, host)| load.patience(LOOK_PATIENCE).once(&host)) {
                Ok(outcome) => match outcome?.result {
                    Ok(answered) if wanted(&answered) => return Ok(start.elapsed()),
                    Ok(answered) => last = format!("answered by {}", answered.cluster),
                    Err(failure) => last = failure.to_string(),
                },
                Err(MeshError::Unknown { name, .. }) => last = format!("{name} is not known"),
                Err(error) => return Err(error.into()),
            }
            thread::sleep(GLANCE);
        }
        anyhow::bail!("{service} called from {from} for {within:?}: {last}")
    }

    /// Starts calling a service from a cluster, `rate` times a second.
    ///
    /// # Errors
    /// The lab's.
    pub fn start_calling(&mut self, from: &str, service: &str, rate: u32) -> anyhow::Result<RunningLoad> {
        let (load, host) = self.load(from, service)?;
        Ok(load.rate(rate).connections(CONNECTIONS).start(&host)?)
    }

    /// Calls payments for a while.
    ///
    /// # Errors
    /// [`Stopped`], the lab's.
    pub fn call_for(&mut self, from: &str, rate: u32, duration: Duration) -> anyhow::Result<LoadReport> {
        let running = self.start_calling(from, PAYMENTS, rate)?;
        self.sleep(duration)?;
        Ok(running.stop()?)
    }

    /// Calls a service from a cluster as long as the demo is up.
    ///
    /// # Errors
    /// The lab's.
    pub fn keep_calling(&mut self, from: &str, service: &str, rate: u32) -> anyhow::Result<()> {
        let running = self.start_calling(from, service, rate)?;
        self.traffic.push(running);
        Ok(())
    }

    /// Holds what callers of payments got against what services saw.
    ///
    /// # Errors
    /// A ledger that cannot be read.
    pub fn judge(&self, report: &LoadReport) -> anyhow::Result<Verdict> {
        let mut ledger = report.ledger();
        for path in self.mesh.ledgers() {
            ledger.read_seen(&path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        Ok(ledger.judge(PAYMENTS))
    }

    /// Sleeps, unless the user asks to end.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn sleep(&self, duration: Duration) -> Result<(), Stopped> {
        let until = Instant::now() + duration;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            self.check_stop()?;
            thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub fn check_stop(&self) -> Result<(), Stopped> {
        if self.stop.is_cancelled() { Err(Stopped) } else { Ok(()) }
    }

    /// How to call the service by hand from a cluster.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn by_hand(&mut self, from: &str) -> Result<String, MeshError> {
        let caller = self.mesh.workload(&caller(from))?;
        let url = format!("http://{}/", host_of(PAYMENTS));
        Ok(match caller.capture {
            Capture::Transparent => format!("nsenter -t {} -n curl {url}", caller.sidecar.pid()),
            Capture::Explicit if caller.host.netns().is_some() => {
                format!("nsenter -t {} -n curl -x http://{} {url}", caller.sidecar.pid(), caller.proxy())
            }
            Capture::Explicit => format!("curl -x http://{} {url}", caller.proxy()),
        })
    }

    fn load(&mut self, from: &str, service: &str) -> Result<(Load, Host), MeshError> {
        let caller = self.mesh.workload(&caller(from))?;
        Ok((caller.load(&host_of(service))?, caller.host.clone()))
    }
}

const CALLER: &str = "shopper";
/// Enough for 200 requests a second that each wait 80 ms, thrice over.
const CONNECTIONS: usize = 50;

fn host_of(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.clusterset.local")
}

fn caller(cluster: &str) -> String {
    format!("{cluster}/{CALLER}")
}
