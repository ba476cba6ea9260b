//! What travels on the streams of a link: the registry's messages, health of endpoints, summaries.
//!
//! Connections, flows and probes are [`crate::peers`]'; here is what they carry. One task per link and
//! direction, all owned by the link's own set: when a link ends, so do they.

mod health;
mod registry;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_federation::command::FORM_MAX;
use isthmus_federation::member::MemberHandle;
use isthmus_identity::{SharedIdentity, Tls};
use isthmus_model::{ClusterId, ClusterName};
use isthmus_tunnel::link::PathState;
use isthmus_tunnel::ticket::TicketMasters;
use isthmus_wire::discovery::{LinkState as WireLinkState, LinkStates};
use isthmus_wire::federation::{LinkControl, Traffic, link_control};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster_files::ClusterFacts;
use crate::distribution::sidecars::Sidecars;
use crate::hub::Hub;
use crate::issue::Issuer;
use crate::keys::TunnelKeys;
use crate::peers::{
    Class, LinkHandle, LinkStatus, PeerEvent, Peers, PeersConfig, PeersHandle, PeersParts, PeersStatus, WantedPeer,
};
use crate::router::Router;
use crate::summary::{self, Report};
use crate::view::PathFacts;

pub use registry::LinkTransport;

/// Summaries are told this often.
const TRAFFIC_EVERY: Duration = Duration::from_secs(1);
/// Rates are taken over at least this long: paths also change between two looks.
const RATE_EVERY: Duration = Duration::from_millis(500);
/// Largest summary read from a peer: 10,000 edges.
const TRAFFIC_LEN_MAX: usize = 4 * 1024 * 1024;

/// What the links are made of.
pub struct LinkGlue {
    /// What is known.
    pub hub: Arc<Hub>,
    /// The sidecars, who hear of paths.
    pub sidecars: Arc<Sidecars>,
    /// Who is trusted.
    pub issuer: Arc<Issuer>,
    /// The gateway's certificate.
    pub identity: SharedIdentity,
    /// The registry's member.
    pub member: MemberHandle,
    /// Own tunnel keys.
    pub keys: watch::Receiver<TunnelKeys>,
    /// Who we are, and whom to dial until the log says more.
    pub facts: ClusterFacts,
    /// This replica.
    pub replica: u8,
    /// Where others reach us; nowhere if empty.
    pub advertised: Vec<String>,
}

/// The running links, for tables.
#[derive(Clone)]
pub struct LinksHandle {
    own: ClusterName,
    peers: PeersHandle,
    rates: watch::Receiver<BTreeMap<ClusterId, (f64, f64)>>,
}

impl LinksHandle {
    /// This gateway's links.
    pub fn table(&self) -> Vec<summary::Link> {
        let status = self.peers.status().borrow().clone();
        let rates = self.rates.borrow().clone();
        let mut by_cluster: BTreeMap<&ClusterName, Vec<&LinkStatus>> = BTreeMap::new();
        for link in &status.links {
            by_cluster.entry(&link.cluster).or_default().push(link);
        }
        let row = |(cluster, links): (&ClusterName, Vec<&LinkStatus>)| {
            let facts = path_facts(&links);
            let id = links.first().map(|link| link.id);
            let (bytes_in_per_s, bytes_out_per_s) = id.and_then(|id| rates.get(&id).copied()).unwrap_or_default();
            summary::Link {
                from: self.own.to_string(),
                to: cluster.to_string(),
                transport: summary::Transport::Quic,
                rtt_us: links.iter().filter_map(|link| link.rtt).min().map(micros),
                loss_ppm: facts.loss_ppm,
                bytes_in_per_s,
                bytes_out_per_s,
                state: if facts.up { summary::LinkState::Up } else { summary::LinkState::Down },
                flows: links.iter().flat_map(|link| &link.flows).filter(|flow| flow.state == PathState::Live).count()
                    as u32,
            }
        };
        by_cluster.into_iter().map(row).collect()
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

fn path_facts(links: &[&LinkStatus]) -> PathFacts {
    let live: Vec<_> =
        links.iter().filter(|link| link.flows.iter().any(|flow| flow.state == PathState::Live)).collect();
    let loss = live.iter().map(|link| link.loss).fold(f32::NAN, f32::min);
    PathFacts {
        up: !live.is_empty(),
        rtt_us: live.iter().filter_map(|link| link.rtt).min().map_or(0, micros),
        loss_ppm: if loss.is_nan() { 0 } else { (loss * 1e6) as u32 },
    }
}

/// What the tasks of all links share.
struct Shared {
    hub: Arc<Hub>,
    sidecars: Arc<Sidecars>,
    member: MemberHandle,
    transport: Arc<LinkTransport>,
    /// Of this process: later than that of any process of this cluster before.
    epoch: u64,
}

impl LinkGlue {
    /// Starts the links; they end with `stop`.
    ///
    /// # Errors
    /// As the system says.
    pub fn start(
        self,
        router: Router,
        transport: &Arc<LinkTransport>,
        tasks: &mut JoinSet<()>,
        stop: CancellationToken,
    ) -> anyhow::Result<LinksHandle> {
        let (wanted_sender, wanted) = watch::channel(wanted(&self.hub, &self.facts));
        let (masters_sender, masters) = watch::channel(Arc::new(self.keys.borrow().masters.clone()));
        let (rates_sender, rates) = watch::channel(BTreeMap::new());
        let shared_router = router.shared();
        let Router { control, events: router_events, .. } = router;
        let (peers, handle, events) = Peers::new(PeersParts {
            config: PeersConfig {
                cluster: self.facts.cluster.clone(),
                cluster_id: self.facts.cluster_id,
                replica: self.replica,
                dialable: !self.advertised.is_empty(),
                member: self.replica == 0,
                version: env!("CARGO_PKG_VERSION").into(),
                form_max: FORM_MAX,
            },
            tls: Tls { identity: self.identity, trust: self.issuer.shared().clone() },
            router: shared_router,
            control,
            router_events,
            wanted,
            masters,
        })?;
        transport.attach(handle.clone());
        self.sidecars.attach(handle.clone());
        let shared = Arc::new(Shared {
            hub: self.hub.clone(),
            sidecars: self.sidecars.clone(),
            member: self.member.clone(),
            transport: transport.clone(),
            epoch: crate::join::now_unix_s(),
        });
        tasks.spawn(peers.run(stop.clone()));
        tasks.spawn(keep_wanted(self.hub.clone(), self.facts, wanted_sender, stop.clone()));
        tasks.spawn(keep_masters(self.keys, masters_sender, stop.clone()));
        tasks.spawn(watch_paths(shared.clone(), handle.status(), rates_sender, stop.clone()));
        tasks.spawn(registry::follow(self.member, handle.clone(), stop.clone()));
        let links = LinksHandle { own: self.hub.own().clone(), peers: handle, rates };
        tasks.spawn(tell_report(shared.clone(), links.clone(), stop.clone()));
        tasks.spawn(handle_events(shared, events, stop));
        Ok(links)
    }
}

/// All members but ourselves; before the log was heard those that admitted us.
fn wanted(hub: &Hub, facts: &ClusterFacts) -> Vec<WantedPeer> {
    let registry = hub.registry();
    if !registry.clusters.contains_key(&facts.cluster) {
        let known = facts.peers.iter().map(|peer| WantedPeer {
            cluster: peer.cluster.clone(),
            id: peer.cluster_id,
            addresses: peer.gateways.clone(),
        });
        return known.collect();
    }
    let members = registry.clusters.values().filter(|record| record.name != facts.cluster);
    members
        .map(|record| WantedPeer {
            cluster: record.name.clone(),
            id: record.id,
            addresses: record.facts.addresses.clone(),
        })
        .collect()
}

async fn keep_wanted(
    hub: Arc<Hub>,
    facts: ClusterFacts,
    sender: watch::Sender<Vec<WantedPeer>>,
    stop: CancellationToken,
) {
    let mut generation = hub.generation();
    loop {
        generation.borrow_and_update();
        let now = wanted(&hub, &facts);
        isthmus_runtime::watched::replace(&sender, now);
        tokio::select! {
            () = stop.cancelled() => return,
            changed = generation.changed() => if changed.is_err() { return },
        }
    }
}

async fn keep_masters(
    mut keys: watch::Receiver<TunnelKeys>,
    sender: watch::Sender<Arc<TicketMasters>>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = keys.changed() => if changed.is_err() { return },
        }
        let masters = keys.borrow_and_update().masters.clone();
        sender.send_replace(Arc::new(masters));
    }
}

async fn watch_paths(
    shared: Arc<Shared>,
    mut status: watch::Receiver<PeersStatus>,
    rates: watch::Sender<BTreeMap<ClusterId, (f64, f64)>>,
    stop: CancellationToken,
) {
    let mut last: BTreeMap<ClusterId, (u64, u64)> = BTreeMap::new();
    let mut at = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
        }
        let now = status.borrow_and_update().clone();
        tell_paths(&shared, &now);
        if at.elapsed() < RATE_EVERY {
            continue;
        }
        let seconds = at.elapsed().as_secs_f64();
        at = Instant::now();
        let totals = now.traffic.iter().map(|(id, totals)| (*id, (totals.bytes_in, totals.bytes_out)));
        let totals: BTreeMap<_, _> = totals.collect();
        let rate = |(id, (bytes_in, bytes_out)): (&ClusterId, &(u64, u64))| {
            let (old_in, old_out) = last.get(id).copied().unwrap_or_default();
            let per_s = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
            (*id, (per_s(*bytes_in, old_in), per_s(*bytes_out, old_out)))
        };
        rates.send_replace(totals.iter().map(rate).collect());
        last = totals;
    }
}

fn tell_paths(shared: &Shared, status: &PeersStatus) {
    let mut by_cluster: BTreeMap<(&ClusterName, ClusterId), Vec<&LinkStatus>> = BTreeMap::new();
    for link in &status.links {
        by_cluster.entry((&link.cluster, link.id)).or_default().push(link);
    }
    let mut states = LinkStates::default();
    for ((cluster, id), links) in by_cluster {
        let facts = path_facts(&links);
        shared.hub.set_path(cluster, facts);
        states.links.push(WireLinkState {
            cluster_id: id.0.into(),
            cluster: cluster.to_string(),
            rtt_us: facts.rtt_us,
            loss_ppm: facts.loss_ppm,
            mtu: links.iter().filter_map(|link| link.mtu).min().unwrap_or_default().into(),
            path_generation: status.path_generations.get(&id).copied().unwrap_or_default(),
            up: facts.up,
        });
    }
    shared.sidecars.set_link_states(states);
}

async fn tell_report(shared: Arc<Shared>, links: LinksHandle, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(TRAFFIC_EVERY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let report = Report { rates: shared.hub.own_traffic(Instant::now()), links: links.table() };
        let Ok(json) = serde_json::to_vec(&report) else { continue };
        for link in links.peers.links() {
            // A full queue means a slow peer: the next summary replaces this one anyway.
            link.tell(LinkControl { message: Some(link_control::Message::Traffic(Traffic { json: json.clone() })) });
        }
    }
}

/// Serves every link that comes up, until `stop`; on return no task of a link is left.
async fn handle_events(
    shared: Arc<Shared>,
    mut events: tokio::sync::mpsc::Receiver<PeerEvent>,
    stop: CancellationToken,
) {
    let mut tasks = JoinSet::new();
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next() => continue,
            event = events.recv() => match event {
                Some(event) => event,
                None => break,
            },
        };
        match event {
            PeerEvent::Up(link) => {
                tasks.spawn(health::tell(shared.clone(), link.clone()));
                if link.is_member() {
                    tasks.spawn(registry::send_raft(shared.transport.clone(), link));
                }
            }
            PeerEvent::Down(link) => {
                tracing::info!(cluster = %link.cluster(), replica = link.replica(), "link is down")
            }
            PeerEvent::Stream(link, stream) => match stream.class {
                Class::Raft => drop(tasks.spawn(registry::receive_raft(shared.member.clone(), link, stream))),
                Class::Call => drop(tasks.spawn(registry::answer_call(shared.member.clone(), stream))),
                Class::Follow => drop(tasks.spawn(registry::serve_follow(shared.member.clone(), link, stream))),
                Class::Health => drop(tasks.spawn(health::hear(shared.clone(), link, stream))),
                Class::Control | Class::Unspecified => {}
            },
            PeerEvent::Control(link, message) => control(&shared, &link, message),
        }
    }
    tasks.shutdown().await;
}

fn control(shared: &Shared, link: &LinkHandle, message: LinkControl) {
    match message.message {
        Some(link_control::Message::DialNotice(notice)) => shared.hub.tell_notice(notice),
        Some(link_control::Message::Traffic(traffic)) if traffic.json.len() <= TRAFFIC_LEN_MAX => {
            match serde_json::from_slice::<Report>(&traffic.json) {
                Ok(mut report) => {
                    report.retain_own(link.cluster().as_str());
                    shared.hub.set_report(link.cluster().clone(), report, Instant::now());
                }
                Err(error) => tracing::debug!(cluster = %link.cluster(), %error, "summary not read"),
            }
        }
        _ => {}
    }
}
