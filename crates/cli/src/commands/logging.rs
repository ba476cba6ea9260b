//! Options of the daemons' log.

use clap::ValueEnum;
use isthmus_runtime::LogFormat;

use crate::failure::Failure;

/// What goes to the log, and how.
#[derive(Debug, clap::Args)]
pub struct LogOptions {
    /// What to log, in the syntax of RUST_LOG
    #[arg(long, env = "ISTHMUS_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// How to write log lines
    #[arg(long, value_enum, default_value_t)]
    log_format: Format,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

impl LogOptions {
    /// Sets up logging for this process.
    ///
    /// # Errors
    /// A filter that is not understood.
    pub fn init(&self) -> Result<(), Failure> {
        let format = match self.log_format {
            Format::Text => LogFormat::Text,
            Format::Json => LogFormat::Json,
        };
        Ok(isthmus_runtime::logging::init(&self.log, format).map(drop)?)
    }
}
