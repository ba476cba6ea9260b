//! A small service to call: says who answered, and writes down what it was asked.
//!
//! Used by the demo (a hidden subcommand) and by the tests (a binary of theirs). It serves
//! - HTTP/1.1 and HTTP/2 (prior knowledge): see `sample/http.rs`;
//! - TCP echo on the next port, and a server that speaks first on the one after: see `sample/tcp.rs`.
//!
//! It knows nothing of the mesh: it binds the loopback or pod address it is told and speaks
//! plaintext, as any workload does.

mod http;
mod tcp;

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What a sample service is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleConfig {
    /// Where it listens for HTTP; the next two ports are TCP echo and server-first TCP.
    pub listen: SocketAddr,
    /// The service it is, as `cart`.
    pub service: String,
    /// A version, as `v2`; empty if it has none.
    pub version: String,
    /// This instance's name, unique in the mesh.
    pub instance: String,
    /// The cluster it runs in.
    pub cluster: String,
    /// A file that gets one [`Seen`] a line.
    pub ledger: Option<PathBuf>,
}

/// The answer to every ordinary request, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's `x-request-id`, or empty.
    pub request_id: String,
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The authority that was asked for.
    pub host: String,
    /// Who answers.
    pub service: String,
    /// Of which version.
    pub version: String,
    /// Which instance.
    pub instance: String,
    /// Where.
    pub cluster: String,
    /// HTTP version as received, as `HTTP/1.1`.
    pub protocol: String,
    /// All headers of the request, in order; values as text.
    pub headers: Vec<(String, String)>,
    /// Length of the request's body.
    pub body_bytes: usize,
}

/// One line of an instance's ledger: a request that reached it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The request's `x-request-id`.
    pub request_id: String,
    /// The instance that saw it.
    pub instance: String,
    /// Its service.
    pub service: String,
    /// The method.
    pub method: String,
}

impl SampleConfig {
    /// Reads `--listen IP:PORT --service NAME --instance NAME --cluster NAME [--version V]
    /// [--ledger FILE]`.
    ///
    /// # Errors
    /// A sentence that names the flag.
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let listen = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 8080);
        let [service, version, instance, cluster] = ["sample", "", "sample-1", ""].map(str::to_owned);
        let mut config = Self { listen, service, version, instance, cluster, ledger: None };
        let mut args = args.into_iter();
        while let Some(flag) = args.next() {
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--listen" => {
                    config.listen = value.parse().map_err(|error| format!("--listen {value}: {error}"))?;
                }
                "--service" => config.service = value,
                "--version" => config.version = value,
                "--instance" => config.instance = value,
                "--cluster" => config.cluster = value,
                "--ledger" => config.ledger = Some(value.into()),
                unknown => return Err(format!("unknown flag {unknown} of the sample service")),
            }
        }
        Ok(config)
    }

    /// The flags that [`SampleConfig::from_args`] reads.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut flag = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        flag("--listen", &self.listen.to_string());
        flag("--service", &self.service);
        flag("--version", &self.version);
        flag("--instance", &self.instance);
        flag("--cluster", &self.cluster);
        if let Some(ledger) = &self.ledger {
            flag("--ledger", &ledger.to_string_lossy());
        }
        args
    }

    /// The port of the TCP echo.
    pub fn echo_port(&self) -> u16 {
        self.listen.port() + 1
    }

    /// The port of the server that speaks first.
    pub fn greeting_port(&self) -> u16 {
        self.listen.port() + 2
    }
}

/// A sample service whose ports are bound.
#[derive(Debug)]
pub struct Sample {
    service: Arc<Service>,
    http: tokio::net::TcpListener,
    echo: tokio::net::TcpListener,
    greeting: tokio::net::TcpListener,
}

/// What all connections share.
#[derive(Debug)]
struct Service {
    config: SampleConfig,
    ledger: Option<File>,
}

impl Sample {
    /// Opens the ledger and binds the ports.
    ///
    /// # Errors
    /// The system's.
    pub async fn bind(config: SampleConfig) -> io::Result<Self> {
        let open = |path| OpenOptions::new().create(true).append(true).open(path);
        let ledger = config.ledger.as_ref().map(open).transpose()?;
        let ip = config.listen.ip();
        let http = tokio::net::TcpListener::bind(config.listen).await?;
        let echo = tokio::net::TcpListener::bind((ip, config.echo_port())).await?;
        let greeting = tokio::net::TcpListener::bind((ip, config.greeting_port())).await?;
        Ok(Self { service: Arc::new(Service { config, ledger }), http, echo, greeting })
    }

    /// Serves until `shutdown`; open connections are then dropped, as a killed workload does.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut servers = JoinSet::new();
        servers.spawn(http::serve(self.http, self.service.clone()));
        servers.spawn(tcp::serve(self.echo, self.service.clone(), tcp::Kind::Echo));
        servers.spawn(tcp::serve(self.greeting, self.service, tcp::Kind::Greeting));
        shutdown.cancelled().await;
        servers.shutdown().await;
    }
}

/// The whole program: reads flags, serves until SIGTERM or SIGINT. Blocking.
///
/// # Errors
/// Bad flags or taken ports, in words.
pub fn main(args: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let config = SampleConfig::from_args(args).map_err(anyhow::Error::msg)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let name = format!("{} of {}", config.instance, config.service);
        let sample = Sample::bind(config).await?;
        println!("{name} is ready");
        let shutdown = CancellationToken::new();
        let stop = shutdown.clone();
        let ended = async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            stop.cancel();
        };
        tokio::join!(sample.run(shutdown), ended);
        Ok(())
    })
}

impl Service {
    /// Writes a request down before it is answered: an answer without a line is nobody's.
    fn note(&self, request_id: &str, method: &str) {
        let Some(mut ledger) = self.ledger.as_ref() else { return };
        let seen = Seen {
            request_id: request_id.to_owned(),
            instance: self.config.instance.clone(),
            service: self.config.service.clone(),
            method: method.to_owned(),
        };
        // One write, so that lines of concurrent requests do not mix (O_APPEND).
        let line = serde_json::to_string(&seen).unwrap_or_default() + "\n";
        if let Err(error) = ledger.write_all(line.as_bytes()) {
            eprintln!("ledger: {error}");
        }
    }
}
