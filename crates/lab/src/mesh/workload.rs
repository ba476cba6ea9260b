//! Workloads of a mesh in a lab: a machine with a sidecar, and a sample service beside it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::chown,
    path::PathBuf,
};

use super::{LEDGERS, Mesh, MeshError, READY_WITHIN, make_dir, unknown, write};
use crate::{Host, Load, Mode, Probe, Process, Program, dns, sample::SampleConfig};

/// How a sidecar gets its workload's connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capture {
    /// By nftables rules in the workload's namespace; needs root and `nft`.
    Transparent,
    /// As the workload's HTTP proxy.
    Explicit,
}

impl Capture {
    /// The best that this machine allows.
    pub fn best(mode: Mode) -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let has_nft = std::env::split_paths(&path).any(|dir| dir.join("nft").exists());
        if mode.is_isolated() && has_nft { Self::Transparent } else { Self::Explicit }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Transparent => "transparent",
            Self::Explicit => "explicit",
        }
    }
}

/// What is to run.
#[derive(Debug, Clone)]
pub struct WorkloadSpec {
    cluster: String,
    namespace: String,
    name: String,
    service: Option<String>,
    version: String,
}

impl WorkloadSpec {
    /// An instance of a service: `cart` in `shop`, as the workload `name`.
    pub fn service(cluster: &str, namespace: &str, service: &str, name: &str) -> Self {
        Self { service: Some(service.to_owned()), ..Self::client(cluster, namespace, name) }
    }

    /// A workload that only calls.
    pub fn client(cluster: &str, namespace: &str, name: &str) -> Self {
        let [cluster, namespace, name] = [cluster, namespace, name].map(str::to_owned);
        Self { cluster, namespace, name, service: None, version: String::new() }
    }

    /// Of this version: a label that subsets select by.
    #[must_use]
    pub fn version(mut self, version: &str) -> Self {
        self.version = version.to_owned();
        self
    }
}

/// A running workload.
#[derive(Debug)]
pub struct Workload {
    /// Its machine.
    pub host: Host,
    /// Its sidecar.
    pub sidecar: Process,
    /// Its sample service, if it is one.
    pub app: Option<Process>,
    /// How its connections are captured.
    pub capture: Capture,
    /// Its sidecar's admin address, on the machine's loopback.
    pub admin: SocketAddr,
}

impl Workload {
    /// Where its sidecar's HTTP proxy listens.
    pub fn proxy(&self) -> SocketAddr {
        SocketAddr::new(loopback_of(&self.host), OUTBOUND_PORT)
    }

    /// A load from this workload to a mesh host, as `cart.shop.svc.clusterset.local`, by the way
    /// its connections are captured.
    ///
    /// # Errors
    /// [`MeshError::Unknown`] if its DNS knows no such name (transparent capture only).
    pub fn load(&self, mesh_host: &str) -> Result<Load, MeshError> {
        if self.capture == Capture::Explicit {
            return Ok(Load::via_proxy(self.proxy(), mesh_host));
        }
        let server = SocketAddr::new(NAME_SERVER.into(), 53);
        let found = self.host.run(|| dns::lookup(server, mesh_host))?;
        let address = found.map_err(|_| unknown("address of", mesh_host))?;
        Ok(Load::direct(SocketAddr::new(address.into(), 80), mesh_host))
    }
}

impl Mesh {
    /// Starts a workload: enrols its sidecar by a token, starts it, and its service beside it.
    /// Gives its name in the mesh: `cluster/name`.
    ///
    /// # Errors
    /// [`MeshError`]; a process that does not get ready, with the end of its log.
    pub fn add_workload(&mut self, spec: &WorkloadSpec) -> Result<String, MeshError> {
        let key = format!("{}/{}", spec.cluster, spec.name);
        let host = self.lab_mut().add_workload(&spec.cluster, &key)?;
        let app = match &spec.service {
            Some(service) => Some(self.start_app(spec, service, &host)?),
            None => None,
        };
        // Without namespaces all sidecars share one loopback: then each has an admin port of its own,
        // never that of one that was taken away before.
        let admin_port = if host.netns().is_some() { ADMIN_PORT } else { ADMIN_PORT_SHARED + self.started };
        self.started += 1;
        let admin = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), admin_port);
        let (sidecar, capture) = self.start_sidecar(spec, &host, admin_port)?;
        self.workloads.insert(key.clone(), Workload { host, sidecar, app, capture, admin });
        Ok(key)
    }

    /// A workload by its name in the mesh, `cluster/name`.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn workload(&mut self, key: &str) -> Result<&mut Workload, MeshError> {
        self.workloads.get_mut(key).ok_or_else(|| unknown("workload", key))
    }

    /// Takes a workload away at once, with its processes and its machine.
    ///
    /// # Errors
    /// [`MeshError::Unknown`].
    pub fn remove_workload(&mut self, key: &str) -> Result<(), MeshError> {
        self.workloads.remove(key).map(drop).ok_or_else(|| unknown("workload", key))
    }

    fn start_app(&self, spec: &WorkloadSpec, service: &str, host: &Host) -> Result<Process, MeshError> {
        let instance = format!("{}-{}", spec.cluster, spec.name);
        let config = SampleConfig {
            listen: SocketAddr::new(loopback_of(host), APP_PORT),
            service: service.to_owned(),
            version: spec.version.clone(),
            instance: instance.clone(),
            cluster: spec.cluster.clone(),
            ledger: Some(self.lab().dir().join(LEDGERS).join(&instance)),
        };
        let mut app =
            self.sample.clone().named(format!("{instance}-app")).args(config.to_args()).start(host, &self.logs())?;
        app.wait_ready(&Probe::Tcp(config.listen), READY_WITHIN)?;
        Ok(app)
    }

    fn start_sidecar(
        &self,
        spec: &WorkloadSpec,
        host: &Host,
        admin_port: u16,
    ) -> Result<(Process, Capture), MeshError> {
        let capture = self.capture();
        let dir = self.lab().dir().join(format!("{}-{}", spec.cluster, spec.name));
        make_dir(&dir)?;
        let account = format!("ns/{}/sa/{}", spec.namespace, spec.account());
        let token = self.cli(&spec.cluster, &["token", "create", "--workload", &account])?;
        let files = [("token", token), ("proxy.yaml", self.sidecar_config(spec, host, admin_port)?)];
        let mut owned = vec![dir.clone()];
        for (name, content) in files {
            write(&dir.join(name), &content)?;
            owned.push(dir.join(name));
        }
        let mut program = Program::new(format!("{}-{}-sidecar", spec.cluster, spec.name), &self.isthmus);
        program = program.arg("proxy").arg("--config").arg(dir.join("proxy.yaml")).env("HOME", &dir);
        if capture == Capture::Transparent {
            // Rules exempt the sidecar by its uid, so it must not share the workload's (ours).
            hand_over(&owned)?;
            program = program.user(SIDECAR_UID).net_admin();
        }
        let mut process = program.start(host, &self.logs())?;
        let health = Probe::http(loopback_of(host), HEALTH_PORT, "/healthz/ready");
        process.wait_ready(&health, READY_WITHIN)?;
        Ok((process, capture))
    }

    fn sidecar_config(&self, spec: &WorkloadSpec, host: &Host, admin: u16) -> Result<String, MeshError> {
        let cluster = self.cluster(&spec.cluster)?;
        let gateways: Vec<String> = cluster.replicas.iter().map(|replica| replica.session().to_string()).collect();
        let mut labels = format!("app: {}", spec.account());
        if !spec.version.is_empty() {
            labels += &format!(", version: {}", spec.version);
        }
        let ports = if spec.service.is_some() {
            format!("{{http: {APP_PORT}, tcp-echo: {}, tcp-greet: {}}}", APP_PORT + 1, APP_PORT + 2)
        } else {
            "{}".to_owned()
        };
        Ok(format!(
            "state: state\ntoken_file: token\ngateways: {gateways:?}\nroot_fingerprint: {root:?}\nlisten: {listen}\n\
             advertise: {local}\nlocality: {locality:?}\ncapture: {capture}\nports: {{admin: {admin}}}\nworkload:\n  \
             namespace: {namespace}\n  name: {name}\n  service_account: {account}\n  labels: {{{labels}}}\n  \
             ports: {ports}\n  address: {address}\n",
            root = self.root,
            listen = host.listen(),
            local = host.local(),
            locality = cluster.locality,
            capture = self.capture().word(),
            namespace = spec.namespace,
            name = spec.name,
            account = spec.account(),
            address = loopback_of(host),
        ))
    }
}

impl WorkloadSpec {
    /// Its service account: the service's name, or its own.
    fn account(&self) -> &str {
        self.service.as_deref().unwrap_or(&self.name)
    }
}

/// The Service object of a sample service, for `isthmus apply`.
pub fn service_yaml(namespace: &str, service: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: {namespace}}}\nspec:\n  \
         selector: {{app: {service}}}\n  ports:\n  - {{name: http, port: 80, targetPort: {APP_PORT}}}\n  \
         - {{name: tcp-echo, port: {}}}\n  - {{name: tcp-greet, port: {}}}\n",
        APP_PORT + 1,
        APP_PORT + 2,
    )
}

/// Where a machine's own processes meet: its loopback, or on a shared loopback its address.
fn loopback_of(host: &Host) -> IpAddr {
    if host.netns().is_some() { Ipv4Addr::LOCALHOST.into() } else { host.local() }
}

fn hand_over(paths: &[PathBuf]) -> Result<(), MeshError> {
    for path in paths {
        let give = chown(path, Some(SIDECAR_UID), Some(SIDECAR_UID));
        give.map_err(|source| MeshError::File { path: path.clone(), source })?;
    }
    Ok(())
}

/// Istio's uid for its sidecar.
const SIDECAR_UID: u32 = 1337;
/// Any address will do: port 53 is captured. This one is routed and answers nothing itself.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The sample service's HTTP port.
pub const APP_PORT: u16 = 8080;
const ADMIN_PORT: u16 = 15000;
/// With a shared loopback: 15200 and up, clear of the mesh's other ports.
const ADMIN_PORT_SHARED: u16 = 15200;
const OUTBOUND_PORT: u16 = 15001;
const HEALTH_PORT: u16 = 15021;
