//! What happens, step by step, and what must hold. The limits are those that the project promises.

use std::time::{Duration, Instant};

use isthmus_lab::Verdict;

use super::report::{Step, Teller, shown};
use super::scene::{AWS, AWS_GCP, AWS_ONPREM, CATALOG, Demo, GCP, ONPREM, PAYMENTS};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// From the start to a mesh of two clusters with sidecars beside their workloads.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// From `export` to the first answer in another cluster, at 80 ms.
const EXPORT_LIMIT: Duration = ms(1_000);
/// What a warm request to another cluster may cost beyond the path's round trip, at the median.
const EXTRA_LIMIT: Duration = ms(5);
/// A warm request to the own cluster, at the median, on a busy machine.
const LOCAL_LIMIT: Duration = ms(10);
/// From a token to the first answer.
const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// From the death of a service's machine to answers from elsewhere.
const FAILOVER_LIMIT: Duration = ms(1_000);
/// The slowest request while a lone gateway is killed and back after [`GATEWAY_PAUSE`].
const GATEWAY_LIMIT: Duration = ms(1_500);
const GATEWAY_PAUSE: Duration = ms(300);
/// How long an event is awaited before the story calls it failed.
const PATIENCE: Duration = Duration::from_secs(15);

type Tell = fn(&mut Demo) -> anyhow::Result<Step>;

/// Tells the whole story.
///
/// # Errors
/// Whatever keeps it from being told; a step that is told but does not hold is no error.
pub fn story(demo: &mut Demo, teller: &mut Teller, begun: Instant) -> anyhow::Result<()> {
    let steps: [(&str, Tell); 7] = [
        ("exporting payments from gcp-us", export),
        ("calling it across the WAN", across),
        ("starting payments in aws-eu too", local_first),
        ("onprem joins by token", join),
        ("the machine of payments in aws-eu dies under load", failover),
        ("onprem's gateway is killed under load", gateway_kill),
        ("payments comes back in aws-eu", come_back),
    ];
    teller.begin("founding a mesh in aws-eu, joining gcp-us");
    let step = begin(demo, begun)?;
    teller.tell(step);
    for (text, step) in steps {
        demo.check_stop()?;
        teller.begin(text);
        let step = step(demo)?;
        teller.tell(step);
    }
    Ok(())
}

/// Everything that must be there before the first call.
fn begin(demo: &mut Demo, begun: Instant) -> anyhow::Result<Step> {
    demo.mesh.found(AWS.0)?;
    demo.check_stop()?;
    let joined = demo.mesh.join(GCP.0, AWS.0)?;
    demo.check_stop()?;
    demo.add_caller(AWS.0)?;
    demo.add_service(GCP.0, PAYMENTS, "payments-1")?;
    let text = "aws-eu founded the mesh, gcp-us (80 ms away) joined by token";
    Ok(Step::within("ready", text, begun.elapsed(), READY_LIMIT).and(format!("the join {}", shown(joined))))
}

/// Whether every answer came from who saw the request. Seen twice is allowed here: these are GETs, which
/// are asked again elsewhere when nobody answers.
fn is_right(verdict: &Verdict) -> bool {
    verdict.misrouted.is_empty() && verdict.invented.is_empty()
}

fn export(demo: &mut Demo) -> anyhow::Result<Step> {
    let start = Instant::now();
    demo.export(GCP.0, PAYMENTS)?;
    demo.call_until(AWS.0, PAYMENTS, PATIENCE, |answered| answered.cluster == GCP.0)?;
    let text = "gcp-us exported payments: aws-eu's first answer";
    Ok(Step::within("export", text, start.elapsed(), EXPORT_LIMIT))
}

fn across(demo: &mut Demo) -> anyhow::Result<Step> {
    let report = demo.call_for(AWS.0, 100, ms(2_000))?;
    let verdict = demo.judge(&report)?;
    let text = "shopper in aws-eu → payments in gcp-us, end-to-end QUIC";
    let step = Step::within("across", text, report.percentile(0.5), AWS_GCP + EXTRA_LIMIT);
    Ok(step
        .and(format!("p99 {}", shown(report.percentile(0.99))))
        .failures(verdict.failures(), verdict.sent, 0)
        .only_if(is_right(&verdict), "a request was answered by the wrong one"))
}

fn local_first(demo: &mut Demo) -> anyhow::Result<Step> {
    demo.add_service(AWS.0, PAYMENTS, "payments-1")?;
    demo.export(AWS.0, PAYMENTS)?;
    demo.call_until(AWS.0, PAYMENTS, PATIENCE, |answered| answered.cluster == AWS.0)?;
    let report = demo.call_for(AWS.0, 100, ms(1_500))?;
    let verdict = demo.judge(&report)?;
    let local = verdict.by_cluster.get(AWS.0).copied().unwrap_or_default();
    let text = "payments runs in aws-eu too: the same call stays there";
    Ok(Step::within("local_first", text, report.percentile(0.5), LOCAL_LIMIT)
        .failures(verdict.failures(), verdict.sent, 0)
        .only_if(local == verdict.answered, "some calls left the cluster"))
}

fn join(demo: &mut Demo) -> anyhow::Result<Step> {
    let start = Instant::now();
    let joined = demo.mesh.join(ONPREM.0, AWS.0)?;
    demo.add_caller(ONPREM.0)?;
    demo.call_until(ONPREM.0, PAYMENTS, PATIENCE, |_| true)?;
    let first = start.elapsed();
    demo.add_service(ONPREM.0, PAYMENTS, "payments-1")?;
    demo.export(ONPREM.0, PAYMENTS)?;
    demo.call_until(ONPREM.0, PAYMENTS, PATIENCE, |answered| answered.cluster == ONPREM.0)?;
    demo.keep_calling(ONPREM.0, PAYMENTS, 20)?;
    let text = "onprem (25 ms away) joined by token: its first answer";
    Ok(Step::within("join", text, first, JOIN_LIMIT).and(format!("the join {}", shown(joined))))
}

fn failover(demo: &mut Demo) -> anyhow::Result<Step> {
    let running = demo.start_calling(AWS.0, PAYMENTS, 200)?;
    demo.sleep(ms(1_000))?;
    demo.mesh.remove_workload("aws-eu/payments-1")?;
    let moved = running
        .wait_for(PATIENCE, |outcome| outcome.result.as_ref().is_ok_and(|answered| answered.cluster != AWS.0))
        .unwrap_or(PATIENCE);
    demo.sleep(ms(2_000))?;
    let report = running.stop()?;
    let verdict = demo.judge(&report)?;
    let nearest = report.answered().last().is_some_and(|(_, answered)| answered.cluster == ONPREM.0);
    let text = "payments in aws-eu dies (its whole machine): onprem answers";
    Ok(Step::within("failover", text, moved, FAILOVER_LIMIT)
        .and(format!("slowest {}", shown(report.slowest())))
        .failures(verdict.failures(), verdict.sent, 0)
        .only_if(nearest, "not the nearest cluster took over")
        .only_if(is_right(&verdict), "a request was answered by the wrong one"))
}

fn gateway_kill(demo: &mut Demo) -> anyhow::Result<Step> {
    let running = demo.start_calling(AWS.0, PAYMENTS, 200)?;
    demo.sleep(ms(1_000))?;
    demo.mesh.gateway(ONPREM.0, 0)?.kill();
    demo.sleep(GATEWAY_PAUSE)?;
    demo.mesh.restart_gateway(ONPREM.0, 0)?;
    demo.sleep(ms(2_500))?;
    let report = running.stop()?;
    let verdict = demo.judge(&report)?;
    let text = "onprem's only gateway: SIGKILL, back after 300 ms";
    let step = Step::within("gateway_kill", text, report.slowest(), GATEWAY_LIMIT);
    Ok(Step { figures: format!("slowest {}", step.figures), ..step }
        .failures(verdict.failures(), verdict.sent, 0)
        .only_if(is_right(&verdict), "a request was answered by the wrong one"))
}

fn come_back(demo: &mut Demo) -> anyhow::Result<Step> {
    let start = Instant::now();
    demo.add_service(AWS.0, PAYMENTS, "payments-2")?;
    let started = start.elapsed();
    let back = demo.call_until(AWS.0, PAYMENTS, PATIENCE, |answered| answered.cluster == AWS.0)?;
    demo.keep_calling(AWS.0, PAYMENTS, 40)?;
    let text = "payments is back in aws-eu: calls come home";
    Ok(Step::within("come_back", text, back, FAILOVER_LIMIT).and(format!("its start {}", shown(started))))
}

/// What goes on while people look: calls inside and between the clusters.
///
/// # Errors
/// As [`story`].
pub fn linger(demo: &mut Demo) -> anyhow::Result<()> {
    demo.add_service(GCP.0, CATALOG, "catalog-1")?;
    demo.export(GCP.0, CATALOG)?;
    demo.add_caller(GCP.0)?;
    for (cluster, rate) in [(AWS, 30), (ONPREM, 12), (GCP, 8)] {
        demo.call_until(cluster.0, CATALOG, PATIENCE, |_| true)?;
        demo.keep_calling(cluster.0, CATALOG, rate)?;
    }
    demo.keep_calling(GCP.0, PAYMENTS, 10)
}

/// The round trips of the scene, for the opening line.
pub fn distances() -> String {
    format!("aws-eu ↔ gcp-us {} ms, aws-eu ↔ onprem {} ms", AWS_GCP.as_millis(), AWS_ONPREM.as_millis())
}
