//! `isthmus`: one binary for operators, gateways and sidecars.
//!
//! Reads the command line and hands over; what a command does is in `commands`, what it prints in
//! `render`. It decides nothing that a library could decide.

mod commands;
mod context;
mod demo;
mod failure;
mod gateway_yaml;
mod join_channel;
mod mesh_wide;
mod render;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands::{
    apply, completion, dashboard, demo as demo_command, export, gateway, get, init, join, proxy, sample, status, store,
    token, version,
};
use crate::context::Context;
use crate::failure::Failure;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A multi-cluster mesh: services of one cluster, called by name from all others.
#[derive(Debug, Parser)]
#[command(name = "isthmus", version, propagate_version = true, disable_help_subcommand = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 gateway not reached, 4 waited in vain"
)]
struct Cli {
    #[command(flatten)]
    context: Context,
    #[command(subcommand)]
    command: Commands,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Three clouds on this machine: a story with measured times, and a dashboard
    Demo(demo_command::Args),
    #[command(hide = true)]
    Sample(sample::Args),
    /// Found a mesh: its root, its first cluster, its first operator
    Init(init::Args),
    /// Make this cluster a member of a mesh
    Join(join::Args),
    /// Run a gateway
    Gateway(gateway::Args),
    /// Run a sidecar beside a workload
    Proxy(proxy::Args),
    /// Make and revoke join tokens and workload tokens
    #[command(subcommand)]
    Token(token::Args),
    /// Make a service callable from other clusters
    Export(export::Export),
    /// Take a service back from other clusters
    Unexport(export::Unexport),
    /// Write objects from YAML files: all of them or none
    Apply(apply::Args),
    /// Remove the objects of YAML files
    Delete(apply::Args),
    /// The mesh at a glance
    Status(status::Args),
    /// What the gateway knows, as tables
    Get(get::Args),
    /// Open the web page of the mesh
    Dashboard(dashboard::Args),
    /// Mend a gateway's registry file
    #[command(subcommand)]
    Store(store::Args),
    /// This binary's version
    Version,
    /// A completion script for a shell
    Completion(completion::Args),
}

fn main() -> ExitCode {
    let Cli { context, command } = Cli::parse();
    match run(command, &context) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            render::note(&failure.to_string());
            failure.exit_code()
        }
    }
}

fn run(command: Commands, context: &Context) -> Result<(), Failure> {
    match command {
        Commands::Demo(args) => demo_command::run(&args, context)?,
        Commands::Sample(args) => sample::run(args)?,
        Commands::Init(args) => init::run(&args, context)?,
        Commands::Gateway(args) => gateway::run(args)?,
        Commands::Proxy(args) => proxy::run(args)?,
        Commands::Join(args) => block_on(join::run(args, context))?,
        Commands::Store(args) => store::run(&args, context)?,
        Commands::Version => version::run(context),
        Commands::Completion(args) => completion::run(&args),
        Commands::Token(args) => block_on(token::run(args, context))?,
        Commands::Export(args) => block_on(export::export(args, context))?,
        Commands::Unexport(args) => block_on(export::unexport(args, context))?,
        Commands::Apply(args) => block_on(apply::apply(args, context))?,
        Commands::Delete(args) => block_on(apply::delete(args, context))?,
        Commands::Status(args) => block_on(status::run(args, context))?,
        Commands::Get(args) => block_on(get::run(args, context))?,
        Commands::Dashboard(args) => block_on(dashboard::run(args, context))?,
    }
    Ok(())
}

/// A command talks to one gateway: one thread is plenty.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_is_for_a_cluster_or_a_workload_never_both() {
        assert!(Cli::try_parse_from(["isthmus", "token", "create", "gcp-us"]).is_ok());
        assert!(Cli::try_parse_from(["isthmus", "token", "create", "--workload", "ns/a/sa/b"]).is_ok());
        assert!(Cli::try_parse_from(["isthmus", "token", "create", "gcp-us", "--workload", "ns/a/sa/b"]).is_err());
        assert!(Cli::try_parse_from(["isthmus", "token", "create"]).is_err());
    }
}
