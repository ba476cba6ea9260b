//! `isthmus init`: founds a mesh: its root, its first cluster, its first operator.

use std::path::{Path, PathBuf};
use std::time::Duration;

use isthmus_gateway::cluster_files::{ClusterFacts, ClusterFiles};
use isthmus_identity::state::{create_dir, read_private, to_pem, write_private};
use isthmus_identity::{KeyPair, RootAuthority, fingerprint};
use isthmus_model::{ClusterId, ClusterName, SpiffeId, TrustDomain};
use serde_json::json;

use crate::context::{self, Context};
use crate::failure::{Exit, Failure};
use crate::gateway_yaml::Settings;
use crate::render;

/// Life of an operator's certificate: a person's key, renewed once a year with `operator add`.
const OPERATOR_LIFE: Duration = Duration::from_secs(365 * 86_400);

/// Options of `isthmus init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The mesh's name
    #[arg(long)]
    mesh: ClusterName,
    /// Its trust domain: the first part of every identity, spiffe://TRUST-DOMAIN/... [default: the mesh's name]
    #[arg(long)]
    trust_domain: Option<TrustDomain>,
    /// The name of this, the first cluster
    #[arg(long)]
    cluster: ClusterName,
    /// The first operator's name
    #[arg(long, default_value = "admin")]
    operator: String,
    /// Where the operator's certificate and key go [default: $XDG_CONFIG_HOME/isthmus/MESH]
    #[arg(long, value_name = "DIR")]
    operator_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Runs `isthmus init`.
///
/// # Errors
/// A directory in use, names that cannot be, files that cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let trust_domain = match &args.trust_domain {
        Some(domain) => domain.clone(),
        None => args.mesh.as_str().parse()?,
    };
    let operator: SpiffeId = format!("spiffe://{trust_domain}/ns/isthmus-operators/sa/{}", args.operator)
        .parse()
        .map_err(|error| Failure::new(Exit::Usage, format!("--operator {:?}: {error}", args.operator)))?;
    let state = args.settings.state();
    args.settings.check(&state)?;
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0);
    let root = RootAuthority::create(args.mesh.as_str(), &trust_domain, now)?;
    let root_fingerprint = fingerprint(root.certificate());
    let operator_dir = args.operator_dir.clone().unwrap_or_else(|| context::operator_dir(args.mesh.as_str()));
    issue_operator(&root, &operator, &operator_dir, now)?;
    found(args, &trust_domain, root, &state, now)?;
    let config = args.settings.write(&args.cluster, &state)?;

    render::done(&format!("mesh {}, trust domain {trust_domain}, root {root_fingerprint}", args.mesh));
    render::done(&format!("cluster {}: state in {}; it holds the root key, back it up", args.cluster, state.display()));
    render::done(&format!("operator {}: {}", args.operator, operator_dir.join("operator.crt").display()));
    let socket = args.settings.socket(&state);
    if context.json() {
        render::print_object(
            "Init",
            &json!({
                "mesh": args.mesh, "trust_domain": trust_domain, "cluster": args.cluster, "state": state,
                "config": config, "socket": socket, "operator_dir": operator_dir,
                "root_fingerprint": root_fingerprint,
            }),
        );
    } else {
        crate::gateway_yaml::print_next(&config, &socket, "isthmus token create OTHER-CLUSTER");
    }
    Ok(())
}

/// Writes the first cluster's identity.
fn found(args: &Args, trust_domain: &TrustDomain, root: RootAuthority, state: &Path, now: u64) -> Result<(), Failure> {
    let key = KeyPair::generate()?;
    let intermediate = root.issue_intermediate(&key.request()?, &args.cluster, trust_domain, now)?;
    let facts = ClusterFacts {
        mesh: args.mesh.to_string(),
        trust_domain: trust_domain.clone(),
        cluster: args.cluster.clone(),
        cluster_id: ClusterId(1),
        founder: true,
        peers: Vec::new(),
    };
    let roots = vec![root.certificate().clone()];
    let files = ClusterFiles { facts, chain: vec![intermediate], key, roots, root: Some(root) };
    Ok(files.save(&state.join("identity"))?)
}

/// Writes an operator's certificate and key. Those of an earlier mesh of this name are kept beside it.
fn issue_operator(root: &RootAuthority, operator: &SpiffeId, dir: &Path, now: u64) -> Result<(), Failure> {
    let key = KeyPair::generate()?;
    let certificate = root.issue_operator(&key.request()?, operator, OPERATOR_LIFE, now)?;
    create_dir(dir)?;
    let (crt, private) = (dir.join("operator.crt"), dir.join("operator.key"));
    if let Some(old) = read_private(&crt)? {
        let suffix = isthmus_identity::state::from_pem(&old, &crt)
            .ok()
            .and_then(|old| old.first().map(fingerprint))
            .and_then(|print| print.strip_prefix("sha256:").map(|hex| hex.chars().take(8).collect::<String>()))
            .unwrap_or_else(|| "old".into());
        for (path, extension) in [(&crt, "crt"), (&private, "key")] {
            if path.exists() {
                std::fs::rename(path, dir.join(format!("operator-{suffix}.{extension}")))?;
            }
        }
        render::note(&format!("   an earlier operator's files are kept as operator-{suffix}.*"));
    }
    write_private(&private, key.to_pem().as_bytes())?;
    // With the root, so that the operator can tell gateways of this mesh from others.
    write_private(&crt, to_pem(&[certificate, root.certificate().clone()]).as_bytes())?;
    Ok(())
}
