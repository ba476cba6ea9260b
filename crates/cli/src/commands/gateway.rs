//! `isthmus gateway`: a gateway replica's process.

use std::path::PathBuf;
use std::time::Duration;

use isthmus_gateway::config::GatewayConfig;
use isthmus_runtime::shutdown::on_signals;

use super::logging::LogOptions;
use crate::failure::{Exit, Failure};

/// Threads of the control plane: one may sign or compress while the other answers probes and streams.
const CONTROL_THREADS: usize = 2;

/// Options of `isthmus gateway`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The gateway's configuration, as `isthmus init` and `isthmus join` write it
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How long forwarding goes on after SIGTERM [default: 15s]
    #[arg(long, value_parser = super::token::duration, value_name = "DURATION")]
    drain: Option<Duration>,
    #[command(flatten)]
    log: LogOptions,
}

/// Runs a gateway until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// A config that cannot be, and what keeps the gateway from starting or going on.
pub fn run(args: Args) -> Result<(), Failure> {
    let config = GatewayConfig::load(&args.config)?;
    args.log.init()?;
    // The packet path has threads of its own; these carry sessions, links and the registry.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(CONTROL_THREADS).enable_all().build()?;
    let ran = runtime.block_on(async {
        let shutdown = on_signals()?;
        tokio::spawn(isthmus_runtime::memory::release_startup_code());
        isthmus_gateway::run(config, args.drain, shutdown).await
    });
    // Blocking threads (file reads) must not hold up the end.
    runtime.shutdown_background();
    ran.map_err(|error| Failure::from_chain(Exit::Failed, &error))
}
