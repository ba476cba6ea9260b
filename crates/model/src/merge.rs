//! Merges what all clusters export under one host into one service, with conflicts kept.
//!
//! Pure: same exports in, same result out, in any order of arrival. Per port the oldest export wins and
//! ports are united (KEP-1645); oldest is the position in the log of the export's first commit, never a
//! clock. One host at a time, so that a change costs as much as the host it touches.
//! What a sidecar then does with the result is in [`crate::select`].

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::service::{Export, Location, Protocol, Resolution, ServicePort};
use crate::view::{Backends, Endpoint, Freshness, ServiceView};
use crate::{ClusterId, ClusterName, Host, Locality};

/// One cluster's export of a host: its record in the log, and what is known of its endpoints.
#[derive(Debug, Clone)]
pub struct Exported<'a> {
    /// The exporting cluster.
    pub cluster: &'a ClusterName,
    /// Its number.
    pub cluster_id: ClusterId,
    /// Where it is.
    pub locality: &'a Locality,
    /// Its record.
    pub export: &'a Export,
    /// Log position of the record's first commit.
    pub first_index: u64,
    /// What is known of its endpoints; `None` if it was not heard of since the start, which deletes nothing:
    /// its ports stay, and the caller decides whether to tell a view without them ([`Merged::unheard`]).
    pub heard: Option<Heard>,
}

/// What a cluster last said of its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Whether that is within its lease.
    pub freshness: Freshness,
    /// Round trip of the link in microseconds; `None` for the own cluster, and while no link is up.
    pub rtt_us: Option<u32>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// What came of all exports of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The service as one sidecar may see it.
    pub service: ServiceView,
    /// Ports on which clusters disagree.
    pub conflicts: Vec<Conflict>,
    /// Exporting clusters that were not heard of since the start.
    pub unheard: Vec<ClusterName>,
}

/// Which property of a port clusters disagree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disagreement {
    /// One number, different protocols.
    Protocol,
    /// One number, different names.
    Name,
    /// One name, different numbers: both stay, the younger without its name.
    Number,
}

/// Clusters disagree on a port; the oldest export's word is used, the others' exports carry the condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conflict {
    /// The host.
    pub host: Host,
    /// The port number, as the winner has it.
    pub port: u16,
    /// What they disagree on.
    pub what: Disagreement,
    /// What is used.
    pub used: String,
    /// The cluster with the oldest export of the port.
    pub winner: ClusterName,
    /// Clusters that say otherwise, and what they say.
    pub losers: Vec<(ClusterName, String)>,
    /// How many clusters export the port.
    pub exporters: usize,
}

impl fmt::Display for Conflict {
    /// As KEP-1645 words it: what is used, whose it is, and how many disagree.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.what {
            Disagreement::Protocol => "protocol",
            Disagreement::Name => "name",
            Disagreement::Number => "number",
        };
        write!(
            f,
            "Using {what} {:?} for port {} from oldest export in {:?}. {}/{} clusters disagree.",
            self.used,
            self.port,
            self.winner.as_str(),
            self.losers.len(),
            self.exporters
        )
    }
}

/// Merges the exports of `host`; `None` if there is none that `viewer` may see.
///
/// With a `viewer`, only exports visible to that cluster (and its own) count, for ports and conflicts
/// too: nothing of a hidden export shows. Without one, all count, as for tables of conflicts.
pub fn merge<'a>(
    host: &Host,
    addresses: &[IpAddr],
    exports: impl IntoIterator<Item = Exported<'a>>,
    viewer: Option<&ClusterName>,
) -> Option<Merged> {
    let visible = |one: &Exported<'_>| {
        viewer.is_none_or(|viewer| viewer == one.cluster || one.export.visible_to.cover(viewer.as_str()))
    };
    let mut exports: Vec<Exported<'a>> = exports.into_iter().filter(visible).collect();
    if exports.is_empty() {
        return None;
    }
    // The cluster's name only decides between records that claim one position, which a log cannot hold.
    exports.sort_by(|a, b| (a.first_index, a.cluster).cmp(&(b.first_index, b.cluster)));
    let (ports, conflicts) = unite_ports(host, &exports);
    let unheard = exports.iter().filter(|one| one.heard.is_none()).map(|one| one.cluster.clone()).collect();
    let mut backends: Vec<Backends> = exports.into_iter().filter_map(backends_of).collect();
    backends.sort_by(|a, b| a.cluster.cmp(&b.cluster));
    let service = ServiceView {
        host: host.clone(),
        addresses: addresses.to_vec(),
        ports,
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends,
    };
    Some(Merged { service, conflicts, unheard })
}

fn backends_of(one: Exported<'_>) -> Option<Backends> {
    let heard = one.heard?;
    let mut endpoints = heard.endpoints;
    endpoints.sort_by(|a, b| a.target.cmp(&b.target));
    Some(Backends {
        cluster: one.cluster.clone(),
        cluster_id: one.cluster_id,
        locality: one.locality.clone(),
        freshness: heard.freshness,
        rtt_us: heard.rtt_us,
        ports: one.export.ports.iter().map(|port| port.number).collect::<BTreeSet<_>>().into_iter().collect(),
        accounts: one.export.accounts.clone(),
        endpoints,
    })
}

/// A port of the union, and who said so first.
struct United<'a> {
    port: ServicePort,
    winner: &'a ClusterName,
}

/// TCP and UDP number their ports apart.
fn same_port(a: &ServicePort, b: &ServicePort) -> bool {
    a.number == b.number && (a.protocol == Protocol::Udp) == (b.protocol == Protocol::Udp)
}

/// Unites the ports of `exports`, the oldest first.
fn unite_ports(host: &Host, exports: &[Exported<'_>]) -> (Vec<ServicePort>, Vec<Conflict>) {
    let mut united: Vec<United<'_>> = Vec::new();
    for export in exports {
        for port in &export.export.ports {
            if united.iter().any(|have| same_port(&have.port, port)) {
                continue;
            }
            let mut port = port.clone();
            if united.iter().any(|have| have.port.name == port.name) {
                port.name.clear();
            }
            united.push(United { port, winner: export.cluster });
        }
    }
    let mut conflicts: Vec<Conflict> = united.iter().flat_map(|one| conflicts_of(host, one, exports)).collect();
    conflicts.sort_by_key(|conflict| (conflict.port, conflict.what));
    let mut ports: Vec<ServicePort> = united.into_iter().map(|one| one.port).collect();
    ports.sort_by_key(|port| (port.number, port.protocol));
    (ports, conflicts)
}

/// What clusters say against the winner of one port.
fn conflicts_of(host: &Host, one: &United<'_>, exports: &[Exported<'_>]) -> Vec<Conflict> {
    let said = |export: &Exported<'_>| export.export.ports.iter().find(|port| same_port(port, &one.port)).cloned();
    let Some(first) = exports.iter().find(|export| export.cluster == one.winner).and_then(said) else {
        return Vec::new();
    };
    let all: Vec<(&ClusterName, ServicePort)> =
        exports.iter().filter_map(|export| Some((export.cluster, said(export)?))).collect();
    let conflict = |what: Disagreement, used: String, losers: Vec<(ClusterName, String)>| {
        let (host, winner) = (host.clone(), one.winner.clone());
        // Who shares the name only exports another number: count everybody then.
        let exporters = if what == Disagreement::Number { exports.len() } else { all.len() };
        (!losers.is_empty()).then_some(Conflict { host, port: first.number, what, used, winner, losers, exporters })
    };
    let against = |differs: &dyn Fn(&ServicePort) -> Option<String>| -> Vec<(ClusterName, String)> {
        all.iter().filter_map(|(cluster, port)| Some(((*cluster).clone(), differs(port)?))).collect()
    };
    let protocol = against(&|port| (port.protocol != first.protocol).then(|| format!("{:?}", port.protocol)));
    let name = against(&|port| (port.name != first.name).then(|| port.name.clone()));
    let same_name = exports.iter().flat_map(|export| {
        let named = |port: &&ServicePort| {
            !first.name.is_empty() && port.name == first.name && !same_port(port, &first) && one.port.name == first.name
        };
        export.export.ports.iter().filter(named).map(|port| (export.cluster.clone(), port.number.to_string()))
    });
    let number = conflict(Disagreement::Number, first.number.to_string(), same_name.collect());
    let protocol = conflict(Disagreement::Protocol, format!("{:?}", first.protocol), protocol);
    let name = conflict(Disagreement::Name, first.name.clone(), name);
    [protocol, name, number].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::service::Patterns;
    use crate::view::Target;

    fn port(number: u16, name: &str, protocol: Protocol) -> ServicePort {
        ServicePort { number, name: name.into(), protocol, target: number }
    }

    /// What a test says of one cluster's export.
    #[derive(Debug, Clone)]
    struct Said {
        cluster: ClusterName,
        ports: Vec<ServicePort>,
        first_index: u64,
        visible_to: &'static str,
        endpoints: Option<u32>,
    }

    fn said(cluster: &str, first_index: u64, ports: Vec<ServicePort>) -> Said {
        Said { cluster: cluster.parse().expect("valid"), ports, first_index, visible_to: "*", endpoints: Some(1) }
    }

    fn host() -> Host {
        "cart.shop.svc.clusterset.local".parse().expect("valid")
    }

    fn merged(all: &[Said], viewer: Option<&str>) -> Option<Merged> {
        let locality = Locality::parse("eu/a");
        let exports: Vec<Export> = all.iter().map(export_of).collect();
        let exported = all.iter().zip(&exports).map(|(one, export)| Exported {
            cluster: &one.cluster,
            cluster_id: ClusterId(1),
            locality: &locality,
            export,
            first_index: one.first_index,
            heard: one.endpoints.map(heard),
        });
        let viewer = viewer.map(|name| name.parse().expect("valid"));
        merge(&host(), &[], exported, viewer.as_ref())
    }

    fn export_of(one: &Said) -> Export {
        Export {
            namespace: "shop".parse().expect("valid"),
            name: "cart".parse().expect("valid"),
            ports: one.ports.clone(),
            accounts: vec!["ns/shop/sa/cart".parse().expect("valid")],
            visible_to: Patterns(vec![one.visible_to.into()]),
        }
    }

    fn heard(count: u32) -> Heard {
        let endpoint = |handle| Endpoint {
            target: Target::Tunnel { handle, incarnation: 1 },
            weight: 1,
            locality: None,
            labels: Default::default(),
            healthy: true,
        };
        Heard { freshness: Freshness::Fresh, rtt_us: Some(1), endpoints: (0..count).map(endpoint).collect() }
    }

    fn shape(merged: &Merged) -> Vec<(u16, String, Protocol)> {
        merged.service.ports.iter().map(|port| (port.number, port.name.clone(), port.protocol)).collect()
    }

    #[test]
    fn ports_are_united_and_the_oldest_export_wins_each() {
        use Protocol::{Grpc, Http, Tcp};
        let all = [
            said("young", 30, vec![port(80, "web", Tcp), port(90, "admin", Http)]),
            said("old", 10, vec![port(80, "http", Http)]),
            said("middle", 20, vec![port(80, "http", Grpc), port(90, "admin", Http)]),
        ];
        let merged = merged(&all, None).expect("exported");
        assert_eq!(shape(&merged), [(80, "http".into(), Http), (90, "admin".into(), Http)]);
        let text: Vec<_> = merged.conflicts.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "Using protocol \"Http\" for port 80 from oldest export in \"old\". 2/3 clusters disagree.",
                "Using name \"http\" for port 80 from oldest export in \"old\". 1/3 clusters disagree.",
            ]
        );
        assert_eq!(merged.conflicts[1].losers, [("young".parse().expect("valid"), "web".to_owned())]);
        let served: Vec<_> =
            merged.service.backends.iter().map(|one| (one.cluster.as_str(), one.ports.clone())).collect();
        assert_eq!(served, [("middle", vec![80, 90]), ("old", vec![80]), ("young", vec![80, 90])]);
    }

    #[test]
    fn one_name_for_two_numbers_keeps_both_ports_and_one_name() {
        let all = [
            said("old", 1, vec![port(80, "http", Protocol::Http)]),
            said("young", 2, vec![port(8080, "http", Protocol::Http)]),
        ];
        let merged = merged(&all, None).expect("exported");
        assert_eq!(shape(&merged), [(80, "http".into(), Protocol::Http), (8080, String::new(), Protocol::Http)]);
        assert_eq!(merged.conflicts.len(), 1);
        assert_eq!(merged.conflicts[0].what, Disagreement::Number);
        assert_eq!(merged.conflicts[0].losers, [("young".parse().expect("valid"), "8080".to_owned())]);
    }

    #[test]
    fn tcp_and_udp_share_a_number_without_conflict() {
        let all = [
            said("a", 1, vec![port(53, "dns-tcp", Protocol::Tcp)]),
            said("b", 2, vec![port(53, "dns", Protocol::Udp)]),
        ];
        let merged = merged(&all, None).expect("exported");
        assert_eq!((merged.service.ports.len(), merged.conflicts.len()), (2, 0));
    }

    #[test]
    fn nothing_of_a_hidden_export_shows() {
        let mut hidden = said("old", 1, vec![port(80, "secret", Protocol::Tcp)]);
        hidden.visible_to = "gcp-us";
        let all = [hidden, said("young", 2, vec![port(80, "http", Protocol::Http)])];
        let onprem = merged(&all, Some("onprem")).expect("the young one is visible");
        assert_eq!(shape(&onprem), [(80, "http".into(), Protocol::Http)]);
        assert_eq!((onprem.conflicts.len(), onprem.service.backends.len()), (0, 1));
        assert_eq!(merged(&all, Some("gcp-us")).expect("both").service.backends.len(), 2);
        assert_eq!(merged(&all, Some("old")).expect("its own").service.backends.len(), 2, "an owner sees its own");
        assert_eq!(merged(&all[..1], Some("onprem")), None);
        assert_eq!(merged(&[], None), None);
    }

    #[test]
    fn absence_of_word_is_not_deletion() {
        let mut silent = said("silent", 1, vec![port(80, "http", Protocol::Http)]);
        silent.endpoints = None;
        let merged = merged(&[silent], None).expect("its export stands in the log");
        assert_eq!(merged.unheard, ["silent".parse().expect("valid")]);
        assert_eq!((merged.service.ports.len(), merged.service.backends.len()), (1, 0));
    }

    fn any_port() -> impl Strategy<Value = ServicePort> {
        use Protocol::{Auto, Grpc, Http, Tcp, Udp};
        let protocol = prop::sample::select(vec![Auto, Http, Grpc, Tcp, Udp]);
        (80_u16..84, prop::sample::select(vec!["", "a", "b"]), protocol).prop_map(|(n, name, p)| port(n, name, p))
    }

    fn any_exports() -> impl Strategy<Value = Vec<Said>> {
        let one = (prop::collection::vec(any_port(), 0..4), any::<bool>());
        prop::collection::vec(one, 1..6).prop_map(|all| {
            let numbered = all.into_iter().enumerate();
            let one = |(n, (ports, visible)): (usize, (Vec<ServicePort>, bool))| Said {
                visible_to: if visible { "*" } else { "nobody" },
                ..said(&format!("c{n}"), 100 - n as u64, ports)
            };
            numbered.map(one).collect()
        })
    }

    proptest! {
        #[test]
        fn order_of_arrival_does_not_matter(
            (all, shuffled) in any_exports().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle())),
        ) {
            prop_assert_eq!(merged(&all, None), merged(&shuffled, None));
            prop_assert_eq!(merged(&all, Some("c1")), merged(&shuffled, Some("c1")));
        }

        #[test]
        fn every_port_is_there_once_as_its_oldest_export_says(all in any_exports()) {
            let merged = merged(&all, None).expect("at least one");
            let mut oldest_first = all.clone();
            oldest_first.sort_by_key(|one| one.first_index);
            let ports: Vec<&ServicePort> = oldest_first.iter().flat_map(|one| &one.ports).collect();
            for port in &ports {
                prop_assert_eq!(merged.service.ports.iter().filter(|have| same_port(have, port)).count(), 1);
            }
            for have in &merged.service.ports {
                let first = ports.iter().find(|port| same_port(port, have)).expect("somebody exports it");
                prop_assert_eq!(first.protocol, have.protocol);
                prop_assert!(have.name == first.name || have.name.is_empty());
            }
            let names: Vec<_> = merged.service.ports.iter().map(|port| &port.name).filter(|name| !name.is_empty()).collect();
            prop_assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        }
    }
}
