//! `isthmus proxy`: a sidecar's process.

use std::path::PathBuf;

use isthmus_proxy::config::{Config, LogFormat as Written};
use isthmus_runtime::LogFormat;
use isthmus_runtime::shutdown::on_signals;

use crate::failure::Failure;

/// Options of `isthmus proxy`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The sidecar's configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// What to log, in the syntax of RUST_LOG, in place of the configuration's `log.level`
    #[arg(long, env = "ISTHMUS_LOG", value_name = "FILTER")]
    log: Option<String>,
}

/// Runs a sidecar until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// A config that cannot be, and what keeps the sidecar from starting.
pub fn run(args: Args) -> Result<(), Failure> {
    let config = Config::load(&args.config)?;
    let format = match config.log.format {
        Written::Text => LogFormat::Text,
        Written::Json => LogFormat::Json,
    };
    let logging = isthmus_runtime::logging::init(args.log.as_deref().unwrap_or(&config.log.level), format)?;
    // One thread: a sidecar serves one workload, and a second thread costs more than it gives.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ran = runtime.block_on(async {
        let shutdown = on_signals()?;
        tokio::spawn(isthmus_runtime::memory::release_startup_code());
        Ok::<_, std::io::Error>(isthmus_proxy::run(config, Some(logging), shutdown).await)
    });
    // Blocking threads (name resolution) must not hold up the end.
    runtime.shutdown_background();
    Ok(ran??)
}
