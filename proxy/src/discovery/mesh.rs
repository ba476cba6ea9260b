//! The sidecar's knowledge of the mesh, shared by everything that routes or answers.
//!
//! Readers take an immutable [`View`]; nothing in it is ever changed in place. Only names in use are
//! held: the first question about a host or an address subscribes to it, and the asker waits at most
//! [`ASK_TIMEOUT`]. With every gateway gone the last view stays. Who fills it: `super::session`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use isthmus_model::Host;
use isthmus_model::view::{ResourceName, ServiceView, View};
use parking_lot::Mutex;
use rustc_hash::FxHashSet;
use tokio::sync::watch;

use super::delta::Known;

/// How long a question about an unknown name may hold up a connection.
pub const ASK_TIMEOUT: Duration = Duration::from_millis(100);

/// Names that a sidecar subscribes to at most: 4,096 hosts in use by one workload are far beyond
/// any application seen, and bound the view at about 16 MiB. A scan of a /16 of the mesh's ranges
/// must not fill it: names that turned out absent are given up first.
pub const SUBSCRIPTIONS_MAX: usize = 4096;

/// What the mesh says about a name.
#[derive(Debug, Clone)]
pub enum Answer {
    /// It is a service of the mesh.
    Known(Arc<ServiceView>),
    /// A gateway said that no such service is visible here.
    Absent,
    /// No gateway answered in time: nothing is known.
    Unanswered,
}

/// The view as it stands; others may replace it meanwhile.
pub struct ViewGuard(Guard<Arc<Known>>);

impl std::ops::Deref for ViewGuard {
    type Target = View;
    fn deref(&self) -> &View {
        &self.0.view
    }
}

/// Shared, cheap to clone.
#[derive(Debug, Clone)]
pub struct Mesh(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    known: ArcSwap<Known>,
    names: Mutex<Names>,
    /// Counts changes of the view and of what is absent.
    changed: watch::Sender<u64>,
    /// Counts names asked for: wakes the session.
    asked: watch::Sender<u64>,
}

/// Names in use, in the order of their first question.
#[derive(Debug, Default)]
struct Names {
    wanted: Vec<ResourceName>,
    known: FxHashSet<ResourceName>,
    absent: FxHashSet<ResourceName>,
}

impl Default for Mesh {
    fn default() -> Self {
        Self::with_view(View::default())
    }
}

impl Mesh {
    /// A mesh that knows `view` and is told more by whoever holds it.
    pub fn with_view(view: View) -> Self {
        Self(Arc::new(Inner {
            known: ArcSwap::from_pointee(Known::from_view(view)),
            names: Mutex::default(),
            changed: watch::Sender::new(0),
            asked: watch::Sender::new(0),
        }))
    }

    /// The current view: a load of a pointer, no lock. Not to be held across `.await`.
    pub fn view(&self) -> ViewGuard {
        ViewGuard(self.0.known.load())
    }

    /// Everything known, to be kept.
    pub fn snapshot(&self) -> Arc<Known> {
        self.0.known.load_full()
    }

    /// What is known of `name`, asking the gateways and waiting at most [`ASK_TIMEOUT`] if nothing is.
    pub async fn resolve(&self, name: &ResourceName) -> Answer {
        if let Some(answer) = self.known(name) {
            return answer;
        }
        let mut changed = self.0.changed.subscribe();
        self.want(name);
        let wait = async {
            loop {
                if let Some(answer) = self.known(name) {
                    return answer;
                }
                if changed.changed().await.is_err() {
                    return Answer::Unanswered;
                }
            }
        };
        tokio::time::timeout(ASK_TIMEOUT, wait).await.unwrap_or(Answer::Unanswered)
    }

    /// [`Mesh::resolve`] for a host.
    pub async fn resolve_host(&self, host: &Host) -> Answer {
        self.resolve(&ResourceName::Host(host.clone())).await
    }

    /// [`Mesh::resolve`] for an address.
    pub async fn resolve_address(&self, address: IpAddr) -> Answer {
        self.resolve(&ResourceName::Address(address)).await
    }

    /// What is known of `name` now; `None` if it has to be asked for.
    pub fn known(&self, name: &ResourceName) -> Option<Answer> {
        if let Some(service) = find(&self.0.known.load().view, name) {
            return Some(Answer::Known(service));
        }
        self.0.names.lock().absent.contains(name).then_some(Answer::Absent)
    }

    /// Replaces what is known, as a session was told; `absent` names are remembered as asked and not there.
    pub fn replace(&self, known: impl Into<Known>, absent: impl IntoIterator<Item = ResourceName>) {
        let known = known.into();
        {
            let mut names = self.0.names.lock();
            names.absent.retain(|name| find(&known.view, name).is_none());
            for name in absent {
                if names.known.contains(&name) {
                    names.absent.insert(name);
                }
            }
        }
        self.0.known.store(Arc::new(known));
        self.0.changed.send_modify(|count| *count += 1);
    }

    /// All names asked for so far.
    pub fn wanted(&self) -> Vec<ResourceName> {
        self.0.names.lock().wanted.clone()
    }

    /// Changes whenever [`Mesh::wanted`] does.
    pub fn asked(&self) -> watch::Receiver<u64> {
        self.0.asked.subscribe()
    }

    /// Changes with every change of the view.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    fn want(&self, name: &ResourceName) {
        {
            let mut names = self.0.names.lock();
            if names.known.contains(name) {
                return;
            }
            if names.wanted.len() >= SUBSCRIPTIONS_MAX {
                let Names { wanted, known, absent } = &mut *names;
                wanted.retain(|name| !absent.contains(name));
                known.retain(|name| !absent.contains(name));
                absent.clear();
            }
            if names.wanted.len() >= SUBSCRIPTIONS_MAX {
                tracing::warn!(?name, limit = SUBSCRIPTIONS_MAX, "not asked for: too many names are in use");
                return;
            }
            names.wanted.push(name.clone());
            names.known.insert(name.clone());
        }
        self.0.asked.send_modify(|count| *count += 1);
    }
}

/// The service of `name` in `view`; a host also by the wildcards that cover it, the longest first.
pub fn find(view: &View, name: &ResourceName) -> Option<Arc<ServiceView>> {
    match name {
        ResourceName::Host(host) => find_host(view, host),
        ResourceName::Address(address) => view.services.get(view.by_address.get(address)?).cloned(),
    }
}

fn find_host(view: &View, host: &Host) -> Option<Arc<ServiceView>> {
    if let Some(service) = view.services.get(host) {
        return Some(Arc::clone(service));
    }
    let mut rest = host.as_str();
    while let Some((_, parent)) = rest.split_once('.') {
        let wildcard = format!("*.{parent}").parse::<Host>().ok()?;
        if let Some(service) = view.services.get(&wildcard) {
            return Some(Arc::clone(service));
        }
        rest = parent;
    }
    None
}

#[cfg(test)]
mod tests {
    use isthmus_model::service::{Location, Resolution};

    use super::*;

    fn service(host: &str) -> ServiceView {
        ServiceView {
            host: host.parse().expect("valid host"),
            addresses: vec![IpAddr::from([240, 240, 0, 7])],
            ports: vec![],
            location: Location::MeshInternal,
            resolution: Resolution::Static,
            backends: vec![],
        }
    }

    fn view(host: &str) -> View {
        let service = service(host);
        let mut view = View::default();
        view.by_address.insert(service.addresses[0], service.host.clone());
        view.services.insert(service.host.clone(), Arc::new(service));
        view
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_name_is_asked_for_once_and_the_asker_waits_for_the_answer() {
        let mesh = Mesh::default();
        let name = ResourceName::Address(IpAddr::from([240, 240, 0, 7]));
        let teller = mesh.clone();
        let told = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            teller.replace(Known::from_view(view("cart.shop.svc.clusterset.local")), []);
        };
        let (first, second, ()) = tokio::join!(mesh.resolve(&name), mesh.resolve(&name), told);
        assert!(matches!(first, Answer::Known(_)) && matches!(second, Answer::Known(_)));
        assert_eq!(mesh.wanted(), [name]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_gateway_the_question_stays_unanswered_and_is_not_absence() {
        let mesh = Mesh::default();
        let name = ResourceName::Host("cart.shop.svc.clusterset.local".parse().expect("valid"));
        assert!(matches!(mesh.resolve(&name).await, Answer::Unanswered));
        mesh.replace(Known::default(), [name.clone()]);
        assert!(matches!(mesh.resolve(&name).await, Answer::Absent));
        mesh.replace(Known::from_view(view("cart.shop.svc.clusterset.local")), []);
        assert!(matches!(mesh.resolve(&name).await, Answer::Known(_)));
    }

    #[test]
    fn a_wildcard_answers_for_what_it_covers() {
        let view = view("*.example.com");
        let find = |host: &str| find(&view, &ResourceName::Host(host.parse().expect("valid"))).is_some();
        assert!(find("a.example.com") && find("a.b.example.com"));
        assert!(!find("example.com") && !find("a.example.org"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_scan_does_not_keep_new_names_out() {
        let mesh = Mesh::default();
        let scanned: Vec<_> =
            (0..SUBSCRIPTIONS_MAX).map(|n| ResourceName::Address(IpAddr::from((n as u32).to_be_bytes()))).collect();
        scanned.iter().for_each(|name| mesh.want(name));
        mesh.replace(Known::default(), scanned);
        let name = ResourceName::Host("cart.shop.svc.clusterset.local".parse().expect("valid"));
        mesh.resolve(&name).await;
        assert_eq!(mesh.wanted(), [name]);
    }
}
