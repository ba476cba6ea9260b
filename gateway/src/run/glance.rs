//! Makes the dashboard's data every half second, and tells what happened between one and the next.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use isthmus_federation::member::MemberHandle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::hub::Hub;
use crate::summary::{Event, Summary};
use crate::tables::Glance;

/// The dashboard's data is made this often.
const SUMMARY_EVERY: Duration = Duration::from_millis(500);

pub(super) async fn summarise(
    hub: Arc<Hub>,
    member: MemberHandle,
    links: crate::links::LinksHandle,
    dashboard: SocketAddr,
    summary: watch::Sender<Arc<Summary>>,
    stop: CancellationToken,
) {
    let mut ticks = tokio::time::interval(SUMMARY_EVERY);
    let mut events = Events::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let status = member.status();
        let glance = Glance {
            hub: &hub,
            status: &status,
            links: links.table(),
            events: Vec::new(),
            dashboard: format!("http://{dashboard}"),
            now: Instant::now(),
            now_unix_ms,
        };
        let mut next = glance.summary();
        next.events = events.observe(&summary.borrow(), &next);
        summary.send_replace(Arc::new(next));
    }
}

/// What happened, seen by comparing one summary with the next.
#[derive(Default)]
struct Events(std::collections::VecDeque<Event>);

impl Events {
    fn observe(&mut self, before: &Summary, after: &Summary) -> Vec<Event> {
        let mut push = |kind: &str, text: String| {
            self.0.push_front(Event { at: after.generated_at, kind: kind.into(), text });
            self.0.truncate(crate::summary::EVENTS_MAX);
        };
        for cluster in &after.clusters {
            match before.clusters.iter().find(|old| old.name == cluster.name) {
                None => push("cluster_joined", format!("cluster {} is a member", cluster.name)),
                Some(old) if old.state != cluster.state => {
                    let state =
                        serde_json::to_value(cluster.state).ok().and_then(|one| one.as_str().map(str::to_owned));
                    let why = if cluster.reason.is_empty() { String::new() } else { format!(": {}", cluster.reason) };
                    push("cluster_state", format!("cluster {} is {}{why}", cluster.name, state.unwrap_or_default()));
                }
                Some(_) => {}
            }
        }
        for old in before.clusters.iter().filter(|old| after.clusters.iter().all(|one| one.name != old.name)) {
            push("cluster_left", format!("cluster {} is no member any more", old.name));
        }
        if before.store.leader != after.store.leader {
            let text = match &after.store.leader {
                Some(leader) => format!("{leader} leads the registry"),
                None => "the registry has no leader: writes wait".into(),
            };
            push("leader_changed", text);
        }
        self.0.iter().cloned().collect()
    }
}
