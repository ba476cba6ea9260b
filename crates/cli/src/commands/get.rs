//! `isthmus get`: what the gateway knows, as tables.

use clap::ValueEnum;
use comfy_table::{Cell, Table};
use isthmus_gateway::rows::{ConfigRow, EndpointRow, ExportRow, ImportRow, PortRow, ProxyRow, TokenRow};
use isthmus_gateway::summary::{Cluster, Link, Service};
use isthmus_wire::operator::GetRequest;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::failure::Failure;
use crate::render::{self, age, latency_ms, number, or_dash, rate, state, success};

/// Options of `isthmus get`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to show
    #[arg(value_enum)]
    what: What,
    /// Only this one (a host, a cluster, a service, a workload)
    name: Option<String>,
    /// Only this namespace
    #[arg(short = 'n', long)]
    namespace: Option<String>,
    /// Ask the leader of the registry, so that every finished write is seen
    #[arg(long)]
    linearizable: bool,
}

/// What can be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Members of the mesh
    #[value(alias = "cluster")]
    Clusters,
    /// Links between gateways
    #[value(alias = "link")]
    Links,
    /// Services with their traffic
    #[value(aliases = ["service", "svc"])]
    Services,
    /// Services exported, by cluster
    #[value(alias = "export")]
    Exports,
    /// Services of other clusters that can be called from here
    #[value(alias = "import")]
    Imports,
    /// Sidecars behind services
    #[value(alias = "endpoint")]
    Endpoints,
    /// Join tokens and workload tokens
    #[value(alias = "token")]
    Tokens,
    /// Objects in force, and those refused
    Config,
    /// Sidecars connected to this gateway
    #[value(alias = "proxy")]
    Proxies,
}

impl What {
    fn word(self) -> &'static str {
        match self {
            Self::Clusters => "clusters",
            Self::Links => "links",
            Self::Services => "services",
            Self::Exports => "exports",
            Self::Imports => "imports",
            Self::Endpoints => "endpoints",
            Self::Tokens => "tokens",
            Self::Config => "config",
            Self::Proxies => "proxies",
        }
    }
}

/// Runs `isthmus get`.
///
/// # Errors
/// Those of the gateway.
pub async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    match args.what {
        What::Clusters => show(&args, context, "ClusterList", clusters).await,
        What::Links => show(&args, context, "LinkList", links).await,
        What::Services => show(&args, context, "ServiceList", services).await,
        What::Exports => show(&args, context, "ExportList", exports).await,
        What::Imports => show(&args, context, "ImportList", imports).await,
        What::Endpoints => show(&args, context, "EndpointList", endpoints).await,
        What::Tokens => show(&args, context, "TokenList", tokens).await,
        What::Config => show(&args, context, "ConfigList", config).await,
        What::Proxies => show(&args, context, "ProxyList", proxies).await,
    }
}

async fn show<T: Serialize + DeserializeOwned>(
    args: &Args,
    context: &Context,
    kind: &str,
    table: fn(&[T]) -> Table,
) -> Result<(), Failure> {
    let what = args.what.word();
    let rows: Vec<T> = context
        .get(GetRequest {
            what: what.to_owned(),
            namespace: args.namespace.clone().unwrap_or_default(),
            name: args.name.clone().unwrap_or_default(),
            linearizable: args.linearizable,
        })
        .await?;
    match context.json() {
        true => render::print_items(kind, &rows),
        false => render::print_table(table(&rows), &format!("No {what}.")),
    }
    Ok(())
}

/// The word a value has in JSON: states are shown as they are written.
pub fn word(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn clusters(rows: &[Cluster]) -> Table {
    let mut table =
        render::table(&["CLUSTER", "ID", "STATE", "HEARD", "LOCALITY", "STORE", "EXPORTS", "VERSION", "GATEWAYS"]);
    for row in rows {
        let role = match (row.is_leader, row.voter) {
            (true, _) => "leader",
            (_, true) => "voter",
            _ => "follower",
        };
        let gateways = if row.gateways.is_empty() { "dials out only".to_owned() } else { row.gateways.join(",") };
        table.add_row([
            Cell::new(format!("{}{}", row.name, if row.is_self { "*" } else { "" })),
            number(row.id),
            state(&word(row.state)),
            Cell::new(if row.is_self { "-".to_owned() } else { age(row.age_ms) }),
            Cell::new(or_dash(&row.locality)),
            Cell::new(role),
            number(row.exports),
            Cell::new(or_dash(&row.version)),
            Cell::new(gateways),
        ]);
    }
    table
}

fn links(rows: &[Link]) -> Table {
    let mut table = render::table(&["FROM", "TO", "STATE", "TRANSPORT", "RTT", "LOSS", "IN", "OUT", "FLOWS"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.from),
            Cell::new(&row.to),
            state(&word(row.state)),
            Cell::new(word(row.transport)),
            number(latency_ms(row.rtt_us.map(|us| f64::from(us) / 1_000.0))),
            number(render::loss(row.loss_ppm)),
            number(render::bytes_rate(row.bytes_in_per_s)),
            number(render::bytes_rate(row.bytes_out_per_s)),
            number(row.flows),
        ]);
    }
    table
}

fn services(rows: &[Service]) -> Table {
    let mut table = render::table(&["HOST", "CLUSTERS", "SUCCESS", "RPS", "P50", "P99", "FROM→TO"]);
    for row in rows {
        let edges: Vec<String> =
            row.edges.iter().map(|edge| format!("{}→{} {}", edge.from, or_dash(&edge.to), rate(edge.rps))).collect();
        table.add_row([
            Cell::new(&row.host),
            Cell::new(or_dash(&row.exporters.join(","))),
            number(if row.traffic.rps > 0.0 { success(row.traffic.error_ratio) } else { "-".to_owned() }),
            number(rate(row.traffic.rps)),
            number(latency_ms(row.traffic.p50_ms)),
            number(latency_ms(row.traffic.p99_ms)),
            Cell::new(or_dash(&edges.join(", "))),
        ]);
    }
    table
}

fn ports(ports: &[PortRow]) -> String {
    let shown: Vec<String> = ports.iter().map(|port| format!("{}/{}", port.number, port.protocol)).collect();
    shown.join(",")
}

fn exports(rows: &[ExportRow]) -> Table {
    let mut table = render::table(&["NAMESPACE", "NAME", "CLUSTER", "PORTS", "VISIBLE TO", "CONFLICTS", "HOST"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.namespace),
            Cell::new(&row.name),
            Cell::new(&row.cluster),
            Cell::new(ports(&row.ports)),
            Cell::new(row.visible_to.join(",")),
            Cell::new(or_dash(&row.conflicts.join("; "))),
            Cell::new(&row.host),
        ]);
    }
    table
}

fn imports(rows: &[ImportRow]) -> Table {
    let mut table = render::table(&["HOST", "CLUSTER", "PORTS", "HEALTHY", "DATA", "AGE"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.host),
            Cell::new(&row.cluster),
            Cell::new(ports(&row.ports)),
            number(format!("{}/{}", row.endpoints_healthy, row.endpoints)),
            state(&row.freshness),
            number(age(row.age_ms)),
        ]);
    }
    table
}

fn endpoints(rows: &[EndpointRow]) -> Table {
    let mut table = render::table(&["HOST", "CLUSTER", "HANDLE", "STATE", "WEIGHT", "LOCALITY", "WORKLOAD", "LABELS"]);
    for row in rows {
        let labels: Vec<String> = row.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        table.add_row([
            Cell::new(&row.host),
            Cell::new(&row.cluster),
            number(format!("{}.{}", row.handle, row.incarnation)),
            state(if row.healthy { "healthy" } else { "unhealthy" }),
            number(row.weight),
            Cell::new(or_dash(&row.locality)),
            Cell::new(or_dash(&row.workload)),
            Cell::new(or_dash(&labels.join(","))),
        ]);
    }
    table
}

/// The table of tokens; `isthmus token list` shows it too.
pub fn tokens(rows: &[TokenRow]) -> Table {
    let now = jiff::Timestamp::now().as_second();
    let mut table = render::table(&["ID", "KIND", "FOR", "STATE", "EXPIRES", "NAMESPACES"]);
    for row in rows {
        let left_s = i64::try_from(row.expires_unix_s).unwrap_or(i64::MAX).saturating_sub(now);
        let expires = match u64::try_from(left_s) {
            Ok(left_s) if row.state == "open" => format!("in {}", render::duration_ms(left_s.saturating_mul(1_000))),
            _ => "-".to_owned(),
        };
        table.add_row([
            Cell::new(&row.id),
            Cell::new(&row.kind),
            Cell::new(&row.subject),
            state(&row.state),
            Cell::new(expires),
            Cell::new(or_dash(&row.namespaces.join(","))),
        ]);
    }
    table
}

fn config(rows: &[ConfigRow]) -> Table {
    let mut table = render::table(&["KIND", "NAMESPACE", "NAME", "STATE", "ORIGIN", "MESSAGE"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.kind),
            Cell::new(or_dash(&row.namespace)),
            Cell::new(&row.name),
            state(&row.state),
            Cell::new(or_dash(&row.origin)),
            Cell::new(or_dash(&row.message)),
        ]);
    }
    table
}

fn proxies(rows: &[ProxyRow]) -> Table {
    let mut table =
        render::table(&["WORKLOAD", "STATE", "SENT", "ACKED", "HANDLE", "ADDRESS", "CONNECTED", "ACCOUNT", "VERSION"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.workload),
            state(&row.state),
            number(row.version_sent),
            number(row.version_acked),
            number(format!("{}.{}", row.handle, row.incarnation)),
            Cell::new(&row.address),
            Cell::new(render::duration_ms(row.connected_s.saturating_mul(1_000))),
            Cell::new(&row.account),
            Cell::new(or_dash(&row.version)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use isthmus_gateway::summary::ClusterState;

    use super::*;

    #[test]
    fn the_own_cluster_is_marked_and_a_silent_one_says_so() {
        let rows = [
            Cluster { name: "aws-eu".into(), is_self: true, is_leader: true, ..Cluster::default() },
            Cluster { name: "gcp-us".into(), state: ClusterState::Down, age_ms: Some(61_000), ..Cluster::default() },
        ];
        let text = clusters(&rows).to_string();
        assert!(text.contains("aws-eu*") && text.contains("leader"), "{text}");
        assert!(text.contains("down") && text.contains("61s") && text.contains("dials out only"), "{text}");
    }

    #[test]
    fn a_used_token_shows_no_expiry() {
        let row = TokenRow { state: "used".into(), expires_unix_s: u64::MAX, ..TokenRow::default() };
        assert!(!tokens(&[row]).to_string().contains("in "));
    }
}
