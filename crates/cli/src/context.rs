//! What all operator commands share: which gateway they speak to, and how they print.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use hyper_util::rt::TokioIo;
use isthmus_wire::operator::GetRequest;
use isthmus_wire::operator::operator_client::OperatorClient;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

use crate::failure::{Exit, Failure};

/// A local socket answers at once or not at all; a linearizable read waits for the leader.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer: `get endpoints` of a mesh with 100,000 endpoints.
const ANSWER_LEN_MAX: usize = 64 * 1024 * 1024;

/// How to print.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For machines: `isthmus.io/cli/v1`.
    Json,
}

/// Options of all operator commands.
#[derive(Debug, Clone, clap::Args)]
pub struct Context {
    /// The gateway's operator socket
    #[arg(long, global = true, env = "ISTHMUS_GATEWAY", value_name = "unix:PATH", help_heading = "Global options")]
    pub gateway: Option<String>,
    /// How to print
    #[arg(long, short = 'o', global = true, value_enum, default_value_t, help_heading = "Global options")]
    pub output: Output,
}

/// The operator service of a gateway, connected.
pub type Gateway = OperatorClient<Channel>;

impl Context {
    /// Whether to print for machines.
    pub fn json(&self) -> bool {
        self.output == Output::Json
    }

    /// Connects to the gateway.
    ///
    /// # Errors
    /// [`Exit::Unreachable`] with the socket's path and what to do.
    pub async fn connect(&self) -> Result<Gateway, Failure> {
        let path = self.socket()?;
        let shown = path.display().to_string();
        // The address is never used: the connector below knows where to go.
        let endpoint = Endpoint::from_static("http://gateway.invalid").timeout(ANSWER_TIMEOUT);
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
            Failure::new(Exit::Unreachable, format!("no gateway answers at unix:{shown}")).cause(innermost(&error)).fix(
                "start one with `isthmus gateway --config FILE`, or name its socket with --gateway or ISTHMUS_GATEWAY",
            )
        })?;
        Ok(OperatorClient::new(channel).max_decoding_message_size(ANSWER_LEN_MAX))
    }

    /// Asks for a table and reads it as `T`.
    ///
    /// # Errors
    /// Those of the connection and of the gateway; an answer that is no `T` means another version.
    pub async fn get<T: DeserializeOwned>(&self, request: GetRequest) -> Result<T, Failure> {
        let what = request.what.clone();
        let answer = self.connect().await?.get(request).await.map_err(refused)?.into_inner();
        serde_json::from_slice(&answer.json).map_err(|error| {
            Failure::new(Exit::Failed, format!("the gateway's answer to `get {what}` is not understood"))
                .cause(error)
                .fix("use the `isthmus` of the gateway's version (`isthmus version`, `isthmus get clusters`)")
        })
    }

    fn socket(&self) -> Result<PathBuf, Failure> {
        let Some(gateway) = &self.gateway else { return Ok(default_socket()) };
        match gateway.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
            _ => Err(Failure::new(Exit::Usage, format!("--gateway {gateway:?} is not a socket"))
                .fix("write unix:PATH, e.g. unix:/run/isthmus/gateway.sock")),
        }
    }
}

/// Where a gateway listens for operators if nothing else is said.
pub fn default_socket() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        "/run/isthmus/gateway.sock".into()
    } else {
        default_state().join("gateway.sock")
    }
}

/// Where a gateway keeps its state if nothing else is said.
pub fn default_state() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/isthmus".into();
    }
    xdg("XDG_STATE_HOME", ".local/state").join("isthmus")
}

/// Where an operator's identities are.
pub fn operator_dir(mesh: &str) -> PathBuf {
    xdg("XDG_CONFIG_HOME", ".config").join("isthmus").join(mesh)
}

fn xdg(variable: &str, below_home: &str) -> PathBuf {
    // The specification has relative paths ignored.
    let set = std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    set.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/".into())).join(below_home))
}

/// What a gateway's refusal means to the user.
pub fn refused(status: Status) -> Failure {
    let reason = status.metadata().get("isthmus-reason").and_then(|word| word.to_str().ok());
    let exit = if status.code() == Code::Unavailable { Exit::Unreachable } else { Exit::Failed };
    match reason {
        Some(reason) => Failure::new(exit, format!("{} [{reason}]", status.message())),
        None if status.message().is_empty() => Failure::new(exit, status.code().description()),
        None => Failure::new(exit, status.message()),
    }
}

/// The last of a chain of sources: `tonic` wraps what the system said in words of its own.
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> anyhow::Error {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    anyhow::anyhow!(error.to_string())
}
