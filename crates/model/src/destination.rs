//! What a DestinationRule means: subsets, and how a host's endpoints are used.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::service::Labels;
use crate::{Host, Namespace, ObjectName};

/// Policies of one host (Istio `networking.istio.io/v1 DestinationRule`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DestinationRule {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ObjectName,
    /// The host, fully qualified; may be a wildcard.
    pub host: Host,
    /// Policy of all subsets that say nothing else.
    pub policy: TrafficPolicy,
    /// Named subsets.
    pub subsets: Vec<Subset>,
    /// Namespaces it applies to (`.` own, `*` all).
    pub export_to: Vec<String>,
}

/// A named part of a host's endpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subset {
    /// Its name.
    pub name: String,
    /// Labels an endpoint must carry.
    pub labels: Labels,
    /// What differs from the rule's policy.
    pub policy: Option<TrafficPolicy>,
}

/// How one endpoint of several is chosen (Istio `LoadBalancerSettings.simple`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Balancing {
    /// The less busy of two drawn at random (Istio's default).
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// To the address that the caller dialled.
    Passthrough,
}

/// How a host's endpoints are used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen; `None` means not said.
    pub balancing: Option<Balancing>,
    /// Limit of connecting (`connectionPool.tcp.connectTimeout`, default 10 s).
    pub connect_timeout: Option<Duration>,
    /// Policies of single ports, by port number.
    pub ports: Vec<(u16, TrafficPolicy)>,
}

/// Limit of connecting where nothing is said (Istio's default).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What holds for one host, subset and port once all levels are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EffectivePolicy {
    /// How an endpoint is chosen.
    pub balancing: Balancing,
    /// Limit of connecting.
    pub connect_timeout: Duration,
}

impl Default for EffectivePolicy {
    fn default() -> Self {
        Self { balancing: Balancing::default(), connect_timeout: CONNECT_TIMEOUT }
    }
}

impl DestinationRule {
    /// The subset of that name.
    pub fn subset(&self, name: &str) -> Option<&Subset> {
        self.subsets.iter().find(|subset| subset.name == name)
    }

    /// What holds for `port` of `subset`.
    ///
    /// As in Istio: a subset's fields override the rule's; a port's settings, at either level, replace
    /// all that stands above them and leave to defaults what they do not say.
    pub fn effective(&self, subset: Option<&str>, port: u16) -> EffectivePolicy {
        let rule = self.policy.port(port).unwrap_or(&self.policy);
        let narrow = subset.and_then(|name| self.subset(name)).and_then(|subset| subset.policy.as_ref());
        let said = match narrow {
            None => rule.clone(),
            Some(narrow) => match narrow.port(port) {
                Some(alone) => alone.clone(),
                None => TrafficPolicy {
                    balancing: narrow.balancing.or(rule.balancing),
                    connect_timeout: narrow.connect_timeout.or(rule.connect_timeout),
                    ports: Vec::new(),
                },
            },
        };
        EffectivePolicy {
            balancing: said.balancing.unwrap_or_default(),
            connect_timeout: said.connect_timeout.unwrap_or(CONNECT_TIMEOUT),
        }
    }
}

impl TrafficPolicy {
    fn port(&self, port: u16) -> Option<&TrafficPolicy> {
        self.ports.iter().find(|(number, _)| *number == port).map(|(_, policy)| policy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(balancing: Option<Balancing>, seconds: Option<u64>) -> TrafficPolicy {
        TrafficPolicy { balancing, connect_timeout: seconds.map(Duration::from_secs), ports: Vec::new() }
    }

    fn rule(policy: TrafficPolicy, subset: Option<TrafficPolicy>) -> DestinationRule {
        DestinationRule {
            namespace: "shop".parse().expect("valid"),
            name: "cart".parse().expect("valid"),
            host: "cart.shop.svc.cluster.local".parse().expect("valid"),
            policy,
            subsets: vec![Subset { name: "v1".into(), labels: Labels::new(), policy: subset }],
            export_to: Vec::new(),
        }
    }

    #[test]
    fn a_subset_overrides_field_by_field_and_a_port_as_a_whole() {
        use Balancing::{LeastRequest, Random, RoundRobin};
        let with_port = |mut policy: TrafficPolicy, port: TrafficPolicy| {
            policy.ports.push((80, port));
            policy
        };
        let cases = [
            ("nothing said", says(None, None), None, LeastRequest, 10),
            ("rule", says(Some(Random), Some(3)), None, Random, 3),
            ("subset over rule", says(Some(Random), Some(3)), Some(says(Some(RoundRobin), None)), RoundRobin, 3),
            (
                "the rule's port drops what the rule says",
                with_port(says(Some(Random), Some(3)), says(None, Some(5))),
                None,
                LeastRequest,
                5,
            ),
            (
                "a subset over the rule's port",
                with_port(says(Some(Random), Some(3)), says(None, Some(5))),
                Some(says(Some(RoundRobin), None)),
                RoundRobin,
                5,
            ),
            (
                "the subset's port drops everything else",
                says(Some(Random), Some(3)),
                Some(with_port(says(Some(RoundRobin), Some(4)), says(None, None))),
                LeastRequest,
                10,
            ),
        ];
        for (what, policy, subset, balancing, seconds) in cases {
            let effective = rule(policy, subset).effective(Some("v1"), 80);
            let expected = EffectivePolicy { balancing, connect_timeout: Duration::from_secs(seconds) };
            assert_eq!(effective, expected, "{what}");
        }
    }

    #[test]
    fn another_port_and_an_unknown_subset_follow_the_rule() {
        let mut policy = says(Some(Balancing::Random), None);
        policy.ports.push((80, says(None, None)));
        let rule = rule(policy, None);
        assert_eq!(rule.effective(None, 81).balancing, Balancing::Random);
        assert_eq!(rule.effective(Some("v9"), 81).balancing, Balancing::Random);
    }
}
