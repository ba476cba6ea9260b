//! What a PeerAuthentication means: whether a workload accepts plaintext from inside its cluster.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::service::{Labels, selects_all};
use crate::{Namespace, ObjectName};

/// Which transports a workload accepts (Istio `PeerAuthentication.mtls.mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MtlsMode {
    /// mTLS only: the default everywhere.
    Strict,
    /// mTLS and plaintext.
    Permissive,
    /// Plaintext only. Traffic from other clusters is mTLS whatever is said here.
    Disable,
}

/// A PeerAuthentication (Istio `security.istio.io/v1`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerAuthentication {
    /// Its namespace; the root namespace `isthmus-system` makes it mesh-wide.
    pub namespace: Namespace,
    /// Its name.
    pub name: ObjectName,
    /// Workloads it applies to; empty means the whole namespace.
    pub selector: Labels,
    /// The mode; `None` inherits.
    pub mode: Option<MtlsMode>,
    /// Modes of single workload ports.
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// The namespace whose PeerAuthentication without a selector holds for the whole mesh.
pub const ROOT_NAMESPACE: &str = "isthmus-system";

/// How far a policy reaches, widest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// All workloads.
    Mesh,
    /// All workloads of its namespace.
    Namespace,
    /// Workloads of its namespace that its selector selects.
    Workload,
}

impl PeerAuthentication {
    /// How far it reaches.
    pub fn scope(&self) -> Scope {
        match (self.selector.is_empty(), self.namespace.as_str() == ROOT_NAMESPACE) {
            (false, _) => Scope::Workload,
            (true, true) => Scope::Mesh,
            (true, false) => Scope::Namespace,
        }
    }

    /// Whether it says anything of a workload of `namespace` that carries `labels`.
    pub fn applies_to(&self, namespace: &Namespace, labels: &Labels) -> bool {
        match self.scope() {
            Scope::Mesh => true,
            Scope::Namespace => self.namespace == *namespace,
            Scope::Workload => self.namespace == *namespace && selects_all(&self.selector, labels),
        }
    }
}

/// The policies that say anything of one workload, widest scope first, at most one per scope.
///
/// Of several in one scope the one whose name sorts first wins: log and files know no age that all
/// clusters would agree on.
pub fn applicable<'a>(
    all: impl IntoIterator<Item = &'a PeerAuthentication>,
    namespace: &Namespace,
    labels: &Labels,
) -> Vec<&'a PeerAuthentication> {
    let mut hit: Vec<_> = all.into_iter().filter(|one| one.applies_to(namespace, labels)).collect();
    hit.sort_by(|a, b| (a.scope(), &a.name).cmp(&(b.scope(), &b.name)));
    hit.dedup_by_key(|one| one.scope());
    hit
}

/// What a workload accepts on one of its own ports: port, workload, namespace, mesh, then STRICT.
///
/// `applicable` speaks of the workload, widest scope first, as [`applicable`] orders it; of several in one
/// scope the first counts.
pub fn effective_mode<'a>(
    applicable: impl IntoIterator<Item = &'a PeerAuthentication>,
    workload_port: u16,
) -> MtlsMode {
    let mut mode = MtlsMode::Strict;
    let mut scope = None;
    for policy in applicable {
        if scope.replace(policy.scope()) != Some(policy.scope()) {
            let port = policy.ports.get(&workload_port).copied();
            mode = port.or(policy.mode).unwrap_or(mode);
        }
    }
    mode
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(namespace: &str, name: &str, app: &str, mode: Option<MtlsMode>) -> PeerAuthentication {
        let selector = if app.is_empty() { Labels::new() } else { Labels::from([("app".into(), app.into())]) };
        PeerAuthentication {
            namespace: namespace.parse().expect("valid"),
            name: name.parse().expect("valid"),
            selector,
            mode,
            ports: BTreeMap::new(),
        }
    }

    fn mode_of(all: &[PeerAuthentication], namespace: &str, app: &str, port: u16) -> MtlsMode {
        let labels = Labels::from([("app".into(), app.into())]);
        effective_mode(applicable(all, &namespace.parse().expect("valid"), &labels), port)
    }

    #[test]
    fn the_narrowest_policy_that_speaks_wins() {
        use MtlsMode::{Disable, Permissive, Strict};
        let mut cart = policy("shop", "cart", "cart", None);
        cart.ports.insert(8080, Disable);
        let all = [
            cart,
            policy("shop", "default", "", Some(Permissive)),
            policy(ROOT_NAMESPACE, "default", "", Some(Disable)),
            policy("bank", "vault", "vault", Some(Strict)),
        ];
        assert_eq!(mode_of(&[], "shop", "cart", 80), Strict, "nothing said");
        assert_eq!(mode_of(&all, "shop", "cart", 8080), Disable, "port");
        assert_eq!(mode_of(&all, "shop", "cart", 80), Permissive, "unset inherits from the namespace");
        assert_eq!(mode_of(&all, "bank", "vault", 80), Strict, "workload over mesh");
        assert_eq!(mode_of(&all, "bank", "till", 80), Disable, "mesh");
    }

    #[test]
    fn of_two_in_one_scope_the_first_by_name_wins_in_any_order() {
        let mut all =
            vec![policy("shop", "b", "", Some(MtlsMode::Disable)), policy("shop", "a", "", Some(MtlsMode::Permissive))];
        assert_eq!(mode_of(&all, "shop", "x", 80), MtlsMode::Permissive);
        all.reverse();
        assert_eq!(mode_of(&all, "shop", "x", 80), MtlsMode::Permissive);
        assert_eq!(effective_mode(&all, 80), MtlsMode::Permissive, "also where nobody left the second out");
    }
}
