//! `isthmus dashboard`: opens the gateway's web page.

use std::process::{Command, Stdio};

use serde_json::json;

use super::status;
use crate::context::Context;
use crate::failure::{Exit, Failure};
use crate::render;

/// Options of `isthmus dashboard`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only print the address
    #[arg(long)]
    no_browser: bool,
}

/// Runs `isthmus dashboard`.
///
/// # Errors
/// Those of the gateway; a gateway that serves no dashboard.
pub async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let summary = status::fetch(context).await?;
    if summary.dashboard.is_empty() {
        return Err(Failure::new(Exit::Failed, "this gateway serves no dashboard")
            .fix("set `dashboard: IP:port` in its gateway.yaml"));
    }
    match context.json() {
        true => render::print_object("Dashboard", &json!({ "url": summary.dashboard })),
        false => render::line(&summary.dashboard),
    }
    if !args.no_browser && !context.json() {
        open(&summary.dashboard);
    }
    Ok(())
}

/// Opens `url` in the desktop's browser. Without one, the printed address has to do.
fn open(url: &str) {
    let quiet = || (Stdio::null(), Stdio::null(), Stdio::null());
    let (stdin, stdout, stderr) = quiet();
    let opener = Command::new("xdg-open").arg(url).stdin(stdin).stdout(stdout).stderr(stderr).spawn();
    if let Ok(mut opener) = opener {
        // It hands the address over and ends.
        let _ = opener.wait();
    }
}
