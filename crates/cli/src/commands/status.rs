//! `isthmus status`: the mesh at a glance, and what is wrong with it.

use std::time::Duration;

use comfy_table::Cell;
use isthmus_gateway::summary::{Cluster, ClusterState, Link, Summary};
use isthmus_wire::operator::GetRequest;
use tokio::time::{Instant, sleep};

use super::get::word;
use crate::context::Context;
use crate::failure::{Exit, Failure};
use crate::render::{self, age, latency_ms, number, or_dash, state};

/// How often `--wait` looks.
const WAIT_INTERVAL: Duration = Duration::from_millis(250);

/// Options of `isthmus status`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Wait until every cluster is ready and the registry has a leader
    #[arg(long)]
    wait: bool,
    /// How long to wait at most
    #[arg(long, default_value = "60s", value_parser = super::token::duration, value_name = "DURATION")]
    timeout: Duration,
}

/// Runs `isthmus status`.
///
/// # Errors
/// Those of the gateway; [`Exit::Waiting`] if `--wait` ran out.
pub async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let deadline = Instant::now() + args.timeout;
    let summary = loop {
        let summary = fetch(context).await;
        let missing = match &summary {
            Ok(summary) => missing(summary),
            Err(failure) => Some(failure.to_string()),
        };
        match missing {
            Some(_) if args.wait && Instant::now() < deadline => sleep(WAIT_INTERVAL).await,
            Some(missing) if args.wait => {
                return Err(Failure::new(Exit::Waiting, format!("after {:?}: {missing}", args.timeout)));
            }
            _ => break summary?,
        }
    };
    match context.json() {
        true => render::print_object("Status", &summary),
        false => print(&summary),
    }
    Ok(())
}

/// The gateway's summary.
///
/// # Errors
/// Those of the gateway.
pub async fn fetch(context: &Context) -> Result<Summary, Failure> {
    context.get(GetRequest { what: "status".into(), ..GetRequest::default() }).await
}

/// The first thing that keeps the mesh from being whole.
fn missing(summary: &Summary) -> Option<String> {
    if summary.store.leader.is_none() {
        return Some("the registry has no leader".into());
    }
    let unready = summary.clusters.iter().find(|cluster| cluster.state != ClusterState::Ready)?;
    Some(format!("cluster {} is {}", unready.name, word(unready.state)))
}

fn print(summary: &Summary) {
    let mut table =
        render::table(&["CLUSTER", "STATE", "LINK", "RTT", "LOSS", "EXPORTS", "HEARD", "DATA", "VERSION", ""]);
    for cluster in &summary.clusters {
        let link = summary.links.iter().find(|link| link.from == summary.cluster && link.to == cluster.name);
        table.add_row(row(summary, cluster, link));
    }
    render::print_table(table, "No cluster is known yet: the registry has not been read.");
    render::line(&traffic(summary));
    render::line(&store(summary));
}

fn row(summary: &Summary, cluster: &Cluster, link: Option<&Link>) -> Vec<Cell> {
    let import = summary.imports.iter().find(|import| import.cluster == cluster.name);
    let transport = link.map_or_else(|| "-".to_owned(), |link| word(link.transport));
    vec![
        Cell::new(format!("{}{}", cluster.name, if cluster.is_self { "*" } else { "" })),
        state(&word(cluster.state)),
        Cell::new(transport),
        number(latency_ms(link.and_then(|link| link.rtt_us).map(|us| f64::from(us) / 1_000.0))),
        number(link.map_or_else(|| "-".to_owned(), |link| render::loss(link.loss_ppm))),
        number(cluster.exports),
        number(if cluster.is_self { "-".to_owned() } else { age(cluster.age_ms) }),
        import.map_or_else(|| Cell::new("-"), |import| state(&import.freshness)),
        Cell::new(or_dash(&cluster.version)),
        Cell::new(&cluster.reason),
    ]
}

fn traffic(summary: &Summary) -> String {
    let traffic = &summary.traffic;
    if traffic.rps == 0.0 {
        return "Traffic: none".into();
    }
    format!(
        "Traffic: {}, {} ok, p50 {}, p99 {}, {:.0}% between clusters",
        render::rate(traffic.rps),
        render::success(traffic.error_ratio),
        latency_ms(traffic.p50_ms),
        latency_ms(traffic.p99_ms),
        traffic.cross_cluster_ratio * 100.0
    )
}

fn store(summary: &Summary) -> String {
    let store = &summary.store;
    let leader = store.leader.as_deref().unwrap_or("none (writes are refused until a majority of voters is back)");
    let alone = match store.voters.len() {
        1 | 2 if summary.clusters.len() > 1 => " (no redundancy before three clusters have caught up)",
        _ => "",
    };
    format!(
        "Store:   leader {leader}, {} voter{}{alone}, commit {}, apply lag {}",
        store.voters.len(),
        if store.voters.len() == 1 { "" } else { "s" },
        store.commit,
        store.commit.saturating_sub(store.applied)
    )
}

#[cfg(test)]
mod tests {
    use isthmus_gateway::summary::Store;

    use super::*;

    fn mesh() -> Summary {
        let ready = |name: &str| Cluster { name: name.into(), state: ClusterState::Ready, ..Cluster::default() };
        Summary {
            cluster: "aws-eu".into(),
            clusters: vec![ready("aws-eu"), ready("gcp-us")],
            store: Store { leader: Some("aws-eu".into()), voters: vec!["aws-eu".into()], commit: 9, applied: 7 },
            ..Summary::default()
        }
    }

    #[test]
    fn waiting_ends_when_all_is_ready_and_names_what_is_not() {
        let mut summary = mesh();
        assert_eq!(missing(&summary), None);
        summary.clusters[1].state = ClusterState::Down;
        assert_eq!(missing(&summary).as_deref(), Some("cluster gcp-us is down"));
        summary.store.leader = None;
        assert_eq!(missing(&summary).as_deref(), Some("the registry has no leader"));
    }

    #[test]
    fn a_registry_without_redundancy_says_so() {
        assert!(store(&mesh()).contains("1 voter (no redundancy"));
        assert!(store(&mesh()).contains("apply lag 2"));
    }
}
