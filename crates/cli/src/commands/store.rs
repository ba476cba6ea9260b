//! `isthmus store`: what can be done about a gateway's damaged registry file.

use std::path::PathBuf;

use isthmus_gateway::cluster_files::ClusterFiles;
use isthmus_gateway::config::GatewayConfig;
use serde_json::json;

use crate::context::Context;
use crate::failure::Failure;
use crate::render;

/// Subcommands of `isthmus store`.
#[derive(Debug, clap::Subcommand)]
pub enum Args {
    /// Set a damaged registry file aside; its contents then come from the other clusters
    ///
    /// Stop the gateway first. Votes and promises are forgotten with the old file: the member takes no part in the
    /// registry's group until the group has replaced it (after 10 minutes of silence). Workload tokens that were
    /// not used yet are gone. A mesh of one cluster has no other copy: restore a backup of the file instead.
    Restore(Restore),
}

/// Options of `isthmus store restore`.
#[derive(Debug, clap::Args)]
pub struct Restore {
    /// The gateway's config file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// Runs `isthmus store`.
///
/// # Errors
/// A gateway that still runs on the file, a missing file or identity.
pub fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let Args::Restore(args) = args;
    let config = GatewayConfig::load(&args.config)?;
    let facts = ClusterFiles::load(&config.identity)?.facts;
    let dir = config.state.join("registry");
    let aside = isthmus_federation::store::restore(&dir, &facts.mesh, facts.cluster.as_str())?;
    render::done(&format!("the old file lies in {}", aside.display()));
    render::done("start the gateway: it follows the other clusters until the registry's group has replaced it");
    if context.json() {
        render::print_object("StoreRestore", &json!({ "cluster": facts.cluster, "set_aside": aside }));
    }
    Ok(())
}
