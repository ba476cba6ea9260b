//! Exports, ServiceEntries and mesh-wide config: each writer in its own key space.

use std::sync::Arc;

use isthmus_model::service::{Export, ServiceEntry};
use isthmus_model::{ClusterName, Host, Namespace, ServiceName};

use super::{At, Machine, Outcome, Rejection};
use crate::command::ConfigKey;
use crate::registry::{ConfigRecord, ExportRecord, ServiceEntryRecord};

/// Exports of one cluster: the quota that keeps one member from filling everyone's memory.
pub const EXPORTS_MAX: usize = 10_000;
/// ServiceEntries of one cluster.
pub const SERVICE_ENTRIES_MAX: usize = 10_000;
/// Objects of mesh-wide configuration.
pub const CONFIG_MAX: usize = 10_000;
/// Longest object of mesh-wide configuration.
pub const CONFIG_LEN_MAX: usize = 128 * 1024;
/// Ports of one service.
const PORTS_MAX: usize = 64;
/// Accounts, patterns, hosts or endpoints of one record.
const LIST_MAX: usize = 256;

impl Machine {
    pub(super) fn put_export(&mut self, at: At, writer: &ClusterName, export: Export) -> Outcome {
        let record = self.member(writer)?;
        if !record.may_export.cover(export.namespace.as_str()) {
            return Err(Rejection::NamespaceNotGranted {
                cluster: writer.clone(),
                namespace: export.namespace.to_string(),
                allowed: record.may_export.0.clone(),
            });
        }
        check_export(&export)?;
        let of = Arc::make_mut(&mut self.registry.exports).entry(writer.clone()).or_default();
        let key = key_of(&export.namespace, &export.name);
        let first_index = match of.get(&key) {
            Some(old) => old.first_index,
            None if of.len() >= EXPORTS_MAX => return Err(quota("exports", writer, EXPORTS_MAX)),
            None => at.index,
        };
        of.insert(key, Arc::new(ExportRecord { export, first_index, index: at.index, version: at.sequence }));
        Ok(())
    }

    pub(super) fn delete_export(&mut self, writer: &ClusterName, namespace: &Namespace, name: &ServiceName) -> Outcome {
        let key = key_of(namespace, name);
        let of = Arc::make_mut(&mut self.registry.exports).get_mut(writer);
        match of.and_then(|of| of.remove(&key)) {
            Some(_) => Ok(()),
            None => Err(Rejection::Absent(format!("export {key} of cluster {writer}"))),
        }
    }

    pub(super) fn put_service_entry(&mut self, at: At, writer: &ClusterName, entry: ServiceEntry) -> Outcome {
        let record = self.member(writer)?;
        if !record.may_export.cover(entry.namespace.as_str()) {
            return Err(Rejection::NamespaceNotGranted {
                cluster: writer.clone(),
                namespace: entry.namespace.to_string(),
                allowed: record.may_export.0.clone(),
            });
        }
        check_service_entry(&entry)?;
        let of = Arc::make_mut(&mut self.registry.service_entries).entry(writer.clone()).or_default();
        let key = key_of(&entry.namespace, &entry.name);
        let first_index = match of.get(&key) {
            Some(old) => old.first_index,
            None if of.len() >= SERVICE_ENTRIES_MAX => {
                return Err(quota("ServiceEntries", writer, SERVICE_ENTRIES_MAX));
            }
            None => at.index,
        };
        of.insert(key, Arc::new(ServiceEntryRecord { entry, first_index, index: at.index }));
        Ok(())
    }

    pub(super) fn delete_service_entry(
        &mut self,
        writer: &ClusterName,
        namespace: &Namespace,
        name: &ServiceName,
    ) -> Outcome {
        let key = key_of(namespace, name);
        let of = Arc::make_mut(&mut self.registry.service_entries).get_mut(writer);
        match of.and_then(|of| of.remove(&key)) {
            Some(_) => Ok(()),
            None => Err(Rejection::Absent(format!("ServiceEntry {key} of cluster {writer}"))),
        }
    }

    pub(super) fn put_config(&mut self, at: At, operator: &str, key: ConfigKey, json: String) -> Outcome {
        if json.len() > CONFIG_LEN_MAX {
            return Err(Rejection::invalid(
                &key.to_string(),
                format!("{} bytes, at most {CONFIG_LEN_MAX}", json.len()),
            ));
        }
        if key.kind.len() > 64 || key.name.len() > 253 || key.kind.is_empty() || key.name.is_empty() {
            return Err(Rejection::invalid("config key", "kind of 1-64 bytes, name of 1-253 bytes"));
        }
        if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&json) {
            return Err(Rejection::invalid(&key.to_string(), format!("not JSON: {error}")));
        }
        let config = Arc::make_mut(&mut self.registry.config);
        let place = key.to_string();
        if !config.contains_key(&place) && config.len() >= CONFIG_MAX {
            return Err(Rejection::QuotaReached { what: "mesh-wide configuration".into(), max: CONFIG_MAX });
        }
        config.insert(place, Arc::new(ConfigRecord { key, json, index: at.index, operator: operator.into() }));
        Ok(())
    }

    pub(super) fn delete_config(&mut self, key: &ConfigKey) -> Outcome {
        match Arc::make_mut(&mut self.registry.config).remove(&key.to_string()) {
            Some(_) => Ok(()),
            None => Err(Rejection::Absent(format!("config {key}"))),
        }
    }
}

fn key_of(namespace: &Namespace, name: &ServiceName) -> String {
    format!("{namespace}/{name}")
}

fn quota(what: &str, cluster: &ClusterName, max: usize) -> Rejection {
    Rejection::QuotaReached { what: format!("{what} of cluster {cluster}"), max }
}

fn check_export(export: &Export) -> Outcome {
    let what = format!("export {}/{}", export.namespace, export.name);
    check_ports(&what, &export.ports)?;
    if export.accounts.len() > LIST_MAX || export.visible_to.0.len() > LIST_MAX {
        return Err(Rejection::invalid(&what, format!("at most {LIST_MAX} accounts and {LIST_MAX} clusters")));
    }
    Ok(())
}

fn check_ports(what: &str, ports: &[isthmus_model::service::ServicePort]) -> Outcome {
    let mut seen = std::collections::BTreeSet::new();
    if ports.is_empty() || ports.len() > PORTS_MAX {
        return Err(Rejection::invalid(what, format!("{} ports, must be 1-{PORTS_MAX}", ports.len())));
    }
    for port in ports {
        if port.number == 0 || !seen.insert(port.number) {
            return Err(Rejection::invalid(what, format!("port {} is zero or named twice", port.number)));
        }
        if port.name.len() > 63 {
            return Err(Rejection::invalid(what, format!("the name of port {} is longer than 63 bytes", port.number)));
        }
    }
    Ok(())
}

fn check_service_entry(entry: &ServiceEntry) -> Outcome {
    let what = format!("ServiceEntry {}/{}", entry.namespace, entry.name);
    check_ports(&what, &entry.ports)?;
    let lists = [entry.hosts.len(), entry.addresses.len(), entry.endpoints.len(), entry.subject_alt_names.len()];
    if entry.hosts.is_empty() || lists.iter().any(|len| *len > LIST_MAX) {
        return Err(Rejection::invalid(&what, format!("1-{LIST_MAX} hosts, at most {LIST_MAX} of anything else")));
    }
    // Names of the mesh are what exports make; an entry that claims one would take its traffic.
    // `*.local` claims them as well as `cart.shop.svc.clusterset.local` does.
    let samples = ["a.a.svc.clusterset.local", "a.a.svc.cluster.local"].map(|s| s.parse().expect("a known host"));
    let claims = |host: &&Host| host.is_mesh() || host.is_cluster() || samples.iter().any(|s| host.covers(s));
    if let Some(host) = entry.hosts.iter().find(claims) {
        return Err(Rejection::invalid(
            &what,
            format!("host {host} is a name of the mesh: export the service instead"),
        ));
    }
    Ok(())
}
