//! `isthmus sample` (hidden): the demo's workload, a service that knows nothing of the mesh.

use crate::failure::{Exit, Failure};

/// Options of `isthmus sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Flags of `isthmus_lab::sample::SampleConfig`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// Runs `isthmus sample`.
///
/// # Errors
/// Flags that cannot be, ports that are taken.
pub fn run(args: Args) -> Result<(), Failure> {
    isthmus_lab::sample::main(args.flags).map_err(|error| Failure::new(Exit::Failed, format!("{error:#}")))
}
