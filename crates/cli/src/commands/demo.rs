//! `isthmus demo`: three clouds on this machine, until Ctrl-C.

use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use isthmus_lab::mesh::Capture;
use isthmus_lab::{Forward, Mode};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::demo::report::{Teller, shown};
use crate::demo::scene::{AWS, Demo, Stopped};
use crate::demo::steps;
use crate::failure::{Exit, Failure};
use crate::render;

/// Options of `isthmus demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Tell the story and end; exit 0 only if every step held
    #[arg(long)]
    check: bool,
    /// Loopback addresses and explicit proxies even where root could do better
    #[arg(long)]
    loopback: bool,
}

/// Runs `isthmus demo`.
///
/// # Errors
/// A step that could not be told; with `--check`, one that did not hold.
pub fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let begun = Instant::now();
    let stop = signals()?;
    let mut teller = Teller::new(context.json());
    let (mode, limitation) = match (args.loopback, Mode::detect()) {
        (true, _) => (Mode::Loopback, Some("--loopback says so".to_owned())),
        (false, detected) => detected,
    };
    teller.say(&format!("isthmus demo: three clouds on this machine ({})", steps::distances()));
    teller.say(&format!("   {}", how(mode, limitation.as_deref())));
    let mut demo = Demo::new(mode, stop.clone()).map_err(|error| Failure::new(Exit::Failed, error.to_string()))?;
    let told = steps::story(&mut demo, &mut teller, begun);
    match told {
        Ok(()) => {}
        Err(_) if stop.is_cancelled() => return Ok(()),
        Err(error) if error.is::<Stopped>() => return Ok(()),
        Err(error) => return Err(told_not(&mut demo, error)),
    }
    let (dashboard, _door) = open_dashboard(&mut demo)?;
    finish(&mut demo, &teller, args, context, &dashboard, begun)?;
    if args.check {
        return match teller.all_held() {
            true => Ok(()),
            false => Err(Failure::new(Exit::Failed, "the story was told, but not every step held")),
        };
    }
    teller.say(&format!("Dashboard {dashboard}   Ctrl-C ends everything"));
    match steps::linger(&mut demo) {
        Err(error) if !stop.is_cancelled() => return Err(told_not(&mut demo, error)),
        _ => {}
    }
    while demo.sleep(std::time::Duration::from_secs(1)).is_ok() {}
    teller.say("\nStopping: no process, namespace, rule or file stays.");
    Ok(())
}

/// Ends the story: the object for machines, or what people can do now.
fn finish(
    demo: &mut Demo,
    teller: &Teller,
    args: &Args,
    context: &Context,
    dashboard: &str,
    begun: Instant,
) -> Result<(), Failure> {
    let socket = format!("unix:{}", demo.mesh.socket(AWS.0)?.display());
    let by_hand = demo.by_hand(AWS.0)?;
    if context.json() {
        let value = json!({
            "steps": teller.steps(), "held": teller.all_held(), "seconds": begun.elapsed().as_secs_f64(),
            "dashboard": dashboard, "gateway": socket, "call": by_hand,
        });
        render::print_object("Demo", &value);
        return Ok(());
    }
    let count = teller.steps().len();
    let held = teller.steps().iter().filter(|step| step.held).count();
    teller.say(&format!("{held} of {count} steps held, in {}.", shown(begun.elapsed())));
    if !args.check {
        teller.say(&format!("\nTry   {by_hand}"));
        teller.say(&format!("      export ISTHMUS_GATEWAY={socket}; isthmus status; isthmus get services"));
    }
    Ok(())
}

/// Where the dashboard can be opened from here, and the door that leads there.
fn open_dashboard(demo: &mut Demo) -> Result<(String, Option<Forward>), Failure> {
    let inside = demo.mesh.dashboard(AWS.0)?;
    let host = demo.mesh.gateway(AWS.0, 0)?.host().clone();
    if host.netns().is_none() {
        return Ok((format!("http://{inside}"), None));
    }
    // The usual port if it is free: people keep the tab open from one demo to the next.
    let open = |port| Forward::open(([127, 0, 0, 1], port).into(), &host, inside);
    let door = open(inside.port()).or_else(|_| open(0))?;
    Ok((format!("http://{}", door.address()), Some(door)))
}

fn how(mode: Mode, limitation: Option<&str>) -> String {
    let capture = Capture::best(mode);
    match (mode, capture) {
        (Mode::Namespaces, Capture::Transparent) => {
            "network namespaces; workloads' connections are captured transparently".to_owned()
        }
        (Mode::Namespaces, Capture::Explicit) => {
            "network namespaces; `nft` is missing, so workloads name their sidecar as HTTP proxy".to_owned()
        }
        (Mode::Loopback, _) => {
            let why = limitation.unwrap_or("namespaces are not available");
            format!("loopback addresses and explicit proxies: {why}")
        }
    }
}

/// What kept the story from being told; the logs stay, to be read.
fn told_not(demo: &mut Demo, error: anyhow::Error) -> Failure {
    demo.mesh.lab_mut().keep_dir();
    let logs = demo.mesh.logs();
    let fix =
        format!("every process's log is in {}; remove {} when read", logs.display(), demo.mesh.lab().dir().display());
    Failure::from_chain(Exit::Failed, &error.context("the demo could not go on")).fix(fix)
}

/// SIGINT and SIGTERM as a token: everything is taken down in order, by owners that are dropped.
fn signals() -> Result<CancellationToken, Failure> {
    let (sender, receiver) = mpsc::channel();
    // Lives as long as the process: a second signal ends it at once.
    thread::Builder::new().name("demo-signals".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let token = isthmus_runtime::shutdown::on_signals()?;
            let _ = sender.send(token);
            std::future::pending::<std::io::Result<()>>().await
        })
    })?;
    receiver.recv().map_err(|_| Failure::new(Exit::Failed, "the handlers of SIGINT and SIGTERM cannot be installed"))
}
