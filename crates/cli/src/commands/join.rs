//! `isthmus join`: makes this cluster a member of a mesh, with one token.
//!
//! The key of the cluster's intermediate is made here and never leaves. It is kept beside its request
//! until the mesh has granted it, so that a join that was cut off can be repeated.

use std::path::Path;

use isthmus_gateway::cluster_files::{ClusterFacts, ClusterFiles, KnownPeer};
use isthmus_identity::state::{create_dir, read_private, write_private};
use isthmus_identity::{JoinToken, KeyPair, fingerprint};
use isthmus_model::ClusterId;
use isthmus_wire::join::join_client::JoinClient;
use isthmus_wire::join::{Granted, JoinEvent, JoinRequest, join_event::Event};
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::context::{Context, refused};
use crate::failure::{Exit, Failure};
use crate::gateway_yaml::{Settings, print_next};
use crate::join_channel;
use crate::render;

/// Certificates are refused beyond 60 s of difference; warn well before.
const CLOCK_DIFFERENCE_MS_MAX: u64 = 30_000;

/// Options of `isthmus join`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The token, as `isthmus token create` printed it; `-` reads it from standard input
    #[arg(env = "ISTHMUS_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Check everything, consume nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Runs `isthmus join`.
///
/// # Errors
/// A token that cannot be used, gateways that do not answer or are not the token's, files that cannot be written.
pub async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let started = Instant::now();
    let token = read_token(&args.token)?;
    let state = args.settings.state();
    args.settings.check(&state)?;
    render::done(&format!("token readable: cluster {} of mesh {}", token.cluster, token.mesh));
    let reached = join_channel::connect(&token).await?;
    render::done(&format!(
        "gateway {} answers on TCP in {}, and proves the token's root {}",
        reached.address,
        render::latency_ms(Some(reached.connect_time.as_secs_f64() * 1_000.0)),
        shortened(&token.root_fingerprint)
    ));
    let mut client = JoinClient::new(reached.channel);
    if args.dry_run {
        return dry_run(&mut client, &args, &token, context).await;
    }
    let (key, csr_der) = pending_key(&state.join("identity"))?;
    let granted = ask(&mut client, request(&args, &token, csr_der.clone(), false)).await?;
    let summary = json!({
        "mesh": granted.mesh, "trust_domain": granted.trust_domain, "cluster": token.cluster,
        "cluster_id": granted.cluster_id, "state": state, "peers": granted.peers.len(),
    });
    save(&state.join("identity"), &token, granted, key, &csr_der)?;
    let config = args.settings.write(&token.cluster, &state)?;
    render::done(&format!("member {} of mesh {}: state in {}", summary["cluster_id"], token.mesh, state.display()));
    let socket = args.settings.socket(&state);
    render::note(&format!("   Joined in {:.1} s.", started.elapsed().as_secs_f64()));
    if context.json() {
        let mut summary = summary;
        summary["config"] = json!(config);
        summary["socket"] = json!(socket);
        render::print_object("Join", &summary);
    } else {
        print_next(&config, &socket, "isthmus status --wait");
    }
    Ok(())
}

fn read_token(argument: &str) -> Result<JoinToken, Failure> {
    let text = match argument {
        "-" => std::io::read_to_string(std::io::stdin().lock())?,
        text => text.to_owned(),
    };
    JoinToken::decode(&text).map_err(|error| Failure::new(Exit::Usage, error.to_string()))
}

fn request(args: &Args, token: &JoinToken, csr_der: Vec<u8>, dry_run: bool) -> JoinRequest {
    JoinRequest {
        cluster: token.cluster.to_string(),
        secret: token.secret.reveal().as_bytes().to_vec(),
        csr_der,
        gateway_addresses: args.settings.advertise.clone(),
        locality: args.settings.locality.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        dry_run,
    }
}

/// Asks to join, and passes on what is heard until the grant.
async fn ask(client: &mut JoinClient<Channel>, request: JoinRequest) -> Result<Granted, Failure> {
    let mut events = client.join(request).await.map_err(refused)?.into_inner();
    while let Some(JoinEvent { event }) = events.message().await.map_err(refused)? {
        match event {
            Some(Event::Progress(text)) => render::done(&text),
            Some(Event::Granted(granted)) => return Ok(granted),
            Some(Event::DryRun(_)) | None => {}
        }
    }
    Err(Failure::new(Exit::Failed, "the gateway ended the conversation before granting anything")
        .fix("run the same command again: the request may be in the log, and its key is kept"))
}

async fn dry_run(
    client: &mut JoinClient<Channel>,
    args: &Args,
    token: &JoinToken,
    context: &Context,
) -> Result<(), Failure> {
    let asked = now_ms();
    let mut events = client.join(request(args, token, Vec::new(), true)).await.map_err(refused)?.into_inner();
    while let Some(JoinEvent { event }) = events.message().await.map_err(refused)? {
        let Some(Event::DryRun(answer)) = event else { continue };
        // Their clock was read about half way between question and answer.
        let here = asked.midpoint(now_ms());
        let ahead_ms = here - answer.server_unix_ms;
        let left_s = i64::try_from(answer.expires_unix_s).unwrap_or(i64::MAX) - answer.server_unix_ms / 1_000;
        render::done(&format!("token accepted: the name {} is free, {left_s} s left", token.cluster));
        check_clock(ahead_ms)?;
        if context.json() {
            let value = json!({ "cluster": token.cluster, "mesh": token.mesh, "clock_ahead_ms": ahead_ms, "token_left_s": left_s });
            render::print_object("JoinDryRun", &value);
        } else {
            render::line("All checks passed; nothing was consumed or written.");
        }
        return Ok(());
    }
    Err(Failure::new(Exit::Failed, "the gateway did not answer the check")
        .fix("upgrade the gateway, or join without --dry-run"))
}

fn check_clock(ahead_ms: i64) -> Result<(), Failure> {
    let difference = ahead_ms.unsigned_abs();
    let side = if ahead_ms < 0 { "behind" } else { "ahead of" };
    let text = format!("this clock is {} {side} the gateway's", render::duration_ms(difference));
    if difference > CLOCK_DIFFERENCE_MS_MAX {
        return Err(Failure::new(Exit::Failed, text)
            .fix("set both clocks (NTP): certificates are refused beyond 60 s of difference"));
    }
    render::done(&text);
    Ok(())
}

/// The key to be certified, and its request: those of an attempt that was cut off, or new ones.
fn pending_key(identity: &Path) -> Result<(KeyPair, Vec<u8>), Failure> {
    create_dir(identity)?;
    let (key_path, csr_path) = (identity.join("pending.key"), identity.join("pending.csr"));
    if let (Some(pem), Some(csr)) = (read_private(&key_path)?, read_private(&csr_path)?) {
        render::done("going on with the key of an earlier attempt");
        return Ok((KeyPair::from_pem(&String::from_utf8_lossy(&pem))?, csr));
    }
    let key = KeyPair::generate()?;
    let csr = key.request()?;
    write_private(&key_path, key.to_pem().as_bytes())?;
    write_private(&csr_path, &csr)?;
    Ok((key, csr))
}

/// Checks what was granted against the token, and writes it.
fn save(identity: &Path, token: &JoinToken, granted: Granted, key: KeyPair, csr: &[u8]) -> Result<(), Failure> {
    let odd = |what: &str| Failure::new(Exit::Failed, format!("the gateway's grant is not usable: {what}"));
    let certificates = |list: Vec<Vec<u8>>| list.into_iter().map(CertificateDer::from).collect::<Vec<_>>();
    let (chain, roots) = (certificates(granted.chain_der), certificates(granted.roots_der));
    if !roots.iter().any(|root| fingerprint(root) == token.root_fingerprint) {
        return Err(odd("none of its roots is the token's"));
    }
    let cluster_id =
        u16::try_from(granted.cluster_id).ok().filter(|id| *id > 0).ok_or_else(|| odd("no cluster number"))?;
    if chain.is_empty() {
        return Err(odd("no certificate"));
    }
    // A gateway that certified another key would speak for this cluster itself.
    if !isthmus_identity::authority::answers(csr, &chain[0]) {
        return Err(odd("it certifies another key"));
    }
    let mut peers = Vec::new();
    for peer in granted.peers {
        let id = u16::try_from(peer.cluster_id).map_err(|_| odd("a member's number is out of range"))?;
        peers.push(KnownPeer {
            cluster: peer.cluster.parse()?,
            cluster_id: ClusterId(id),
            gateways: peer.gateway_addresses,
        });
    }
    let facts = ClusterFacts {
        mesh: granted.mesh,
        trust_domain: granted.trust_domain.parse()?,
        cluster: token.cluster.clone(),
        cluster_id: ClusterId(cluster_id),
        founder: false,
        peers,
    };
    ClusterFiles { facts, chain, key, roots, root: None }.save(identity)?;
    for pending in ["pending.key", "pending.csr"] {
        std::fs::remove_file(identity.join(pending))?;
    }
    Ok(())
}

fn shortened(fingerprint: &str) -> String {
    let hex = fingerprint.strip_prefix("sha256:").unwrap_or(fingerprint);
    hex.chars().take(12).chain("…".chars()).collect()
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use isthmus_identity::RootAuthority;
    use isthmus_identity::token::Secret;
    use isthmus_model::TrustDomain;

    use super::*;

    fn granted(for_key: &KeyPair) -> (JoinToken, Granted) {
        let trust_domain: TrustDomain = "corp".parse().expect("valid");
        let root = RootAuthority::create("corp", &trust_domain, 1_700_000_000).expect("a root");
        let cluster = "gcp-us".parse().expect("valid");
        let csr = for_key.request().expect("a request");
        let intermediate = root.issue_intermediate(&csr, &cluster, &trust_domain, 1_700_000_000).expect("granted");
        let token = JoinToken {
            mesh: "corp".into(),
            cluster,
            id: "t".into(),
            gateways: Vec::new(),
            root_fingerprint: fingerprint(root.certificate()),
            secret: Secret::generate(),
        };
        let granted = Granted {
            chain_der: vec![intermediate.to_vec()],
            roots_der: vec![root.certificate().to_vec()],
            cluster_id: 2,
            mesh: "corp".into(),
            trust_domain: "corp".into(),
            ..Granted::default()
        };
        (token, granted)
    }

    #[test]
    fn an_interrupted_join_goes_on_with_its_own_key() {
        let dir = tempfile::tempdir().expect("writable");
        let (first, csr) = pending_key(dir.path()).expect("a key");
        let (second, same) = pending_key(dir.path()).expect("the same");
        assert_eq!((first.to_pem(), &csr), (second.to_pem(), &same));
        let (token, granted) = granted(&second);
        save(dir.path(), &token, granted, second, &csr).expect("saved");
        assert!(ClusterFiles::exist(dir.path()) && !dir.path().join("pending.key").exists());
    }

    #[test]
    fn a_grant_for_another_key_or_under_another_root_is_not_saved() {
        let dir = tempfile::tempdir().expect("writable");
        let (key, other) = (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
        let (token, grant) = granted(&other);
        let csr = key.request().expect("a request");
        let failure = save(dir.path(), &token, grant, key, &csr).expect_err("another key");
        assert!(failure.to_string().contains("certifies another key"), "{failure}");
        let (mut token, grant) = granted(&other);
        token.root_fingerprint = "sha256:00".into();
        let csr = other.request().expect("a request");
        let failure = save(dir.path(), &token, grant, other, &csr).expect_err("another root");
        assert!(failure.to_string().contains("roots"), "{failure}");
        assert!(!ClusterFiles::exist(dir.path()));
    }

    #[test]
    fn clocks_too_far_apart_are_named_before_they_break_anything() {
        assert!(check_clock(-2_000).is_ok());
        assert!(check_clock(45_000).expect_err("too far").to_string().contains("45s ahead of"));
    }
}
