//! `isthmus completion`: completion scripts for shells, on standard output.

use clap::CommandFactory as _;
use clap_complete::Shell;

/// Options of `isthmus completion`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs `isthmus completion`.
pub fn run(args: &Args) {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "isthmus", &mut script);
    crate::render::line(String::from_utf8_lossy(&script).trim_end());
}
