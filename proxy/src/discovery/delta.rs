//! Applies what a gateway tells to the view: all of a delta, or none of it. Pure.

use std::sync::Arc;

use isthmus_model::Host;
use isthmus_model::route::matching::Routes;
use isthmus_model::view::{Resource, ResourceName, View};
use isthmus_wire::discovery as wire;
use rustc_hash::FxHashMap;

/// Resources in one delta at most; a gateway sends more in several.
const RESOURCES_MAX: usize = 16 * 1024;

/// Why a delta was refused as a whole: the text goes back to the gateway.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {reason}")]
pub struct Refused {
    /// The resource's name, as the gateway gave it.
    pub resource: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Everything a sidecar was told: the view, and what goes with it.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// What is routed by.
    pub view: View,
    /// VirtualServices by host, ready to route.
    pub routes: FxHashMap<Host, Arc<Routes>>,
    /// Versions of all resources held, by name.
    pub held: FxHashMap<String, u64>,
}

/// What a resource's name means.
enum Named {
    Service(Host),
    VirtualService(Host),
    DestinationRule(Host),
    PeerAuthentication,
    MeshRanges,
}

impl Named {
    fn read(name: &str) -> Option<Self> {
        let (kind, host) = match name.split_once('/') {
            Some((kind, host)) => (kind, Some(host.parse().ok()?)),
            None => (name, None),
        };
        match (kind, host) {
            ("service", Some(host)) => Some(Self::Service(host)),
            ("virtual-service", Some(host)) => Some(Self::VirtualService(host)),
            ("destination-rule", Some(host)) => Some(Self::DestinationRule(host)),
            ("peer-authentication", None) => Some(Self::PeerAuthentication),
            ("mesh-ranges", None) => Some(Self::MeshRanges),
            _ => None,
        }
    }
}

impl std::ops::Deref for Known {
    type Target = View;
    fn deref(&self) -> &View {
        &self.view
    }
}

impl From<View> for Known {
    fn from(view: View) -> Self {
        Self::from_view(view)
    }
}

impl Known {
    /// Around a view from elsewhere; routes that do not compile are left out.
    pub fn from_view(view: View) -> Self {
        let compiled = view
            .routes
            .iter()
            .filter_map(|(host, service)| Some((host.clone(), Arc::new(Routes::compile(Arc::clone(service)).ok()?))));
        Self { routes: compiled.collect(), view, held: FxHashMap::default() }
    }

    /// What is known after `delta`, and the names that turned out not to exist.
    ///
    /// # Errors
    /// [`Refused`] for the first resource that cannot be read; nothing was changed.
    pub fn after(&self, delta: &wire::Delta) -> Result<(Self, Vec<ResourceName>), Refused> {
        let refused = |resource: &str, reason: &str| Refused {
            resource: resource.chars().take(300).collect(),
            reason: reason.chars().take(300).collect(),
        };
        if delta.upserts.len() + delta.removed.len() + delta.absent.len() > RESOURCES_MAX {
            return Err(refused("delta", "too many resources at once"));
        }
        let mut next = self.clone();
        for name in &delta.removed {
            let named = Named::read(name).ok_or_else(|| refused(name, "no such kind of resource"))?;
            next.remove(&named);
            next.held.remove(name);
        }
        for resource in &delta.upserts {
            let named =
                Named::read(&resource.name).ok_or_else(|| refused(&resource.name, "no such kind of resource"))?;
            let body =
                serde_json::from_slice(&resource.body).map_err(|error| refused(&resource.name, &error.to_string()))?;
            next.put(named, body).map_err(|reason| refused(&resource.name, &reason))?;
            next.held.insert(resource.name.clone(), resource.version);
        }
        let absent = delta
            .absent
            .iter()
            .map(|name| serde_json::from_str(name).map_err(|error| refused(name, &error.to_string())));
        let absent = absent.collect::<Result<Vec<_>, _>>()?;
        next.view.version = delta.version;
        Ok((next, absent))
    }

    fn remove(&mut self, named: &Named) {
        match named {
            Named::Service(host) => {
                if let Some(service) = self.view.services.remove(host) {
                    for address in &service.addresses {
                        if self.view.by_address.get(address) == Some(host) {
                            self.view.by_address.remove(address);
                        }
                    }
                }
            }
            Named::VirtualService(host) => {
                self.view.routes.remove(host);
                self.routes.remove(host);
            }
            Named::DestinationRule(host) => drop(self.view.destinations.remove(host)),
            Named::PeerAuthentication => self.view.peer_authentication.clear(),
            Named::MeshRanges => self.view.mesh_ranges.clear(),
        }
    }

    fn put(&mut self, named: Named, body: Resource) -> Result<(), String> {
        match (named, body) {
            (Named::Service(host), Resource::Service(service)) => {
                if service.host != host {
                    return Err(format!("it is of host {}", service.host));
                }
                self.remove(&Named::Service(host.clone()));
                for address in &service.addresses {
                    self.view.by_address.insert(*address, host.clone());
                }
                self.view.services.insert(host, Arc::new(service));
            }
            (Named::VirtualService(host), Resource::VirtualService(service)) => {
                let service = Arc::new(service);
                let routes = Routes::compile(Arc::clone(&service)).map_err(|error| error.to_string())?;
                self.view.routes.insert(host.clone(), service);
                self.routes.insert(host, Arc::new(routes));
            }
            (Named::DestinationRule(host), Resource::DestinationRule(rule)) => {
                self.view.destinations.insert(host, Arc::new(rule));
            }
            (Named::PeerAuthentication, Resource::PeerAuthentication(policies)) => {
                self.view.peer_authentication = policies
            }
            (Named::MeshRanges, Resource::MeshRanges(ranges)) => self.view.mesh_ranges = ranges,
            _ => return Err("its body is of another kind".into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use isthmus_model::service::{Location, Resolution};
    use isthmus_model::view::ServiceView;

    use super::*;

    const HOST: &str = "cart.shop.svc.clusterset.local";

    fn service(address: [u8; 4]) -> Resource {
        Resource::Service(ServiceView {
            host: HOST.parse().expect("valid"),
            addresses: vec![IpAddr::from(address)],
            ports: vec![],
            location: Location::MeshInternal,
            resolution: Resolution::Static,
            backends: vec![],
        })
    }

    fn delta(version: u64, upserts: &[(&str, &Resource)]) -> wire::Delta {
        let upserts = upserts.iter().map(|(name, body)| wire::Resource {
            name: (*name).into(),
            version,
            body: serde_json::to_vec(body).expect("serialises"),
        });
        wire::Delta { version, upserts: upserts.collect(), removed: vec![], absent: vec![] }
    }

    #[test]
    fn a_changed_address_replaces_the_old_one_and_a_removal_takes_both() {
        let name = format!("service/{HOST}");
        let (first, _) = Known::default().after(&delta(1, &[(&name, &service([240, 240, 0, 1]))])).expect("valid");
        let (second, _) = first.after(&delta(2, &[(&name, &service([240, 240, 0, 2]))])).expect("valid");
        assert_eq!(second.view.by_address.keys().collect::<Vec<_>>(), [&IpAddr::from([240, 240, 0, 2])]);
        assert_eq!(second.held[&name], 2);
        let removal = wire::Delta { version: 3, removed: vec![name], ..Default::default() };
        let (third, _) = second.after(&removal).expect("valid");
        assert!(third.view.services.is_empty() && third.view.by_address.is_empty() && third.held.is_empty());
    }

    #[test]
    fn a_delta_with_one_bad_resource_changes_nothing_and_names_it() {
        let name = format!("service/{HOST}");
        let mut bad = delta(1, &[(&name, &service([240, 240, 0, 1]))]);
        bad.upserts.push(wire::Resource {
            name: "service/other.example".into(),
            version: 1,
            body: br#"{"service":{"host":"x","new_field":1}}"#.to_vec(),
        });
        let error = Known::default().after(&bad).expect_err("an unknown field");
        assert_eq!(error.resource, "service/other.example");
        for name in ["service/x y", "thing/a", "mesh-ranges/a", "service"] {
            assert!(Known::default().after(&delta(1, &[(name, &service([1, 2, 3, 4]))])).is_err(), "{name}");
        }
        let foreign = delta(1, &[("service/other.example", &service([240, 240, 0, 1]))]);
        assert!(Known::default().after(&foreign).expect_err("another host").reason.contains(HOST));
    }

    #[test]
    fn absence_is_an_answer_and_never_a_removal() {
        let name = format!("service/{HOST}");
        let (known, _) = Known::default().after(&delta(1, &[(&name, &service([240, 240, 0, 1]))])).expect("valid");
        let host = ResourceName::Host(HOST.parse().expect("valid"));
        let absent = wire::Delta {
            version: 2,
            absent: vec![serde_json::to_string(&host).expect("serialises")],
            ..Default::default()
        };
        let (known, absent) = known.after(&absent).expect("valid");
        assert_eq!((known.view.services.len(), absent), (1, vec![host]));
    }
}
