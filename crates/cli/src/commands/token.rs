//! `isthmus token`: lets a cluster join or a workload enrol, once.

use std::time::Duration;

use isthmus_gateway::rows::TokenRow;
use isthmus_wire::operator::{
    ClusterToken, CreateTokenRequest, GetRequest, RevokeTokenRequest, WorkloadToken, create_token_request::What,
};
use serde_json::json;

use crate::context::{Context, refused};
use crate::failure::{Exit, Failure};
use crate::render;

/// A day: longer-lived secrets end up in chat logs.
const TTL_MAX: Duration = Duration::from_secs(86_400);

/// Subcommands of `isthmus token`.
#[derive(Debug, clap::Subcommand)]
pub enum Args {
    /// Make a token: for a cluster that is to join, or for one workload
    Create(Create),
    /// Show tokens and what became of them
    List,
    /// Make a token useless
    Revoke {
        /// Its id, as `isthmus token list` shows it
        id: String,
    },
}

/// Options of `isthmus token create`.
#[derive(Debug, clap::Args)]
pub struct Create {
    /// The cluster that is to join; its name is part of the token
    #[arg(required_unless_present = "workload", conflicts_with = "workload")]
    cluster: Option<String>,
    /// The workload that is to enrol: ns/NAMESPACE/sa/ACCOUNT
    #[arg(long, value_name = "ns/NS/sa/SA")]
    workload: Option<String>,
    /// Namespaces the cluster may issue identities and export services for
    #[arg(long, value_delimiter = ',', default_value = "*", conflicts_with = "workload")]
    namespaces: Vec<String>,
    /// How long it may be used
    #[arg(long, default_value = "15m", value_parser = duration, value_name = "DURATION")]
    ttl: Duration,
}

/// Runs `isthmus token`.
///
/// # Errors
/// Those of the gateway.
pub async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    match args {
        Args::Create(args) => create(args, context).await,
        Args::List => list(context).await,
        Args::Revoke { id } => {
            context.connect().await?.revoke_token(RevokeTokenRequest { id: id.clone() }).await.map_err(refused)?;
            render::done(&format!("token {id} revoked"));
            Ok(())
        }
    }
}

async fn create(args: Create, context: &Context) -> Result<(), Failure> {
    if args.ttl > TTL_MAX || args.ttl.is_zero() {
        return Err(Failure::new(Exit::Usage, format!("--ttl {:?} is not between 1s and 24h", args.ttl)));
    }
    let workload = args.workload.is_some();
    let what = match (args.cluster, args.workload) {
        (Some(cluster), _) => What::Cluster(ClusterToken { cluster, namespaces: args.namespaces }),
        (None, Some(account)) => What::Workload(WorkloadToken { account }),
        (None, None) => return Err(Failure::new(Exit::Usage, "name a cluster, or a workload with --workload")),
    };
    let ttl_s = u32::try_from(args.ttl.as_secs()).unwrap_or(u32::MAX);
    let request = CreateTokenRequest { what: Some(what), ttl_s };
    let made = context.connect().await?.create_token(request).await.map_err(refused)?.into_inner();
    if context.json() {
        render::print_object("Token", &json!({ "token": made.token, "expires_unix_s": made.expires_unix_s }));
        return Ok(());
    }
    // The token alone on standard output, so that `TOKEN=$(isthmus token create ...)` works.
    render::line(&made.token);
    let minutes = args.ttl.as_secs().div_ceil(60);
    render::note(&match workload {
        true => format!(
            "For one workload, within {minutes} min: put it in the file that `token_file` of its proxy.yaml names."
        ),
        false => format!("For one cluster, within {minutes} min. There: isthmus join TOKEN"),
    });
    Ok(())
}

async fn list(context: &Context) -> Result<(), Failure> {
    let rows: Vec<TokenRow> = context.get(GetRequest { what: "tokens".into(), ..GetRequest::default() }).await?;
    match context.json() {
        true => render::print_items("TokenList", &rows),
        false => render::print_table(super::get::tokens(&rows), "No tokens."),
    }
    Ok(())
}

/// Reads `90s`, `15m`, `24h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration; write 90s, 15m or 24h");
    let (number, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3_600),
        _ => None,
    };
    seconds.map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        for wrong in ["", "15", "m", "1.5h", "15µ", "99999999999999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
