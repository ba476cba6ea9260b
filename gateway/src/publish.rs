//! What this cluster should write to the log: the difference between its objects and its own records.
//!
//! Pure. The driver proposes the commands; a refusal is shown at the object, not retried until something changes.

use std::collections::BTreeMap;

use isthmus_federation::command::{ClusterFacts, Command};
use isthmus_federation::registry::Registry;
use isthmus_model::ClusterName;
use isthmus_model::service::{Export, ServiceEntry};

use crate::locals::ServiceKey;

/// What the cluster wants to stand in its key space.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// Exports by service.
    pub exports: BTreeMap<ServiceKey, Export>,
    /// ServiceEntries by namespace and name.
    pub entries: BTreeMap<ServiceKey, ServiceEntry>,
    /// What it says of itself; `None` leaves it.
    pub facts: Option<ClusterFacts>,
}

/// The commands that bring `own`'s records in `registry` to `wanted`; empty if they already say so, or
/// if `own` is not (yet) a member.
pub fn commands(registry: &Registry, own: &ClusterName, wanted: &Wanted) -> Vec<Command> {
    let Some(member) = registry.clusters.get(own) else { return Vec::new() };
    let mut commands = Vec::new();
    if let Some(facts) = wanted.facts.as_ref().filter(|facts| **facts != member.facts) {
        commands.push(Command::UpdateCluster { facts: facts.clone() });
    }
    let none = BTreeMap::new();
    let exported = registry.exports.get(own).unwrap_or(&none);
    for export in wanted.exports.values() {
        let name = format!("{}/{}", export.namespace, export.name);
        if exported.get(&name).is_none_or(|record| record.export != *export) {
            commands.push(Command::PutExport { export: export.clone() });
        }
    }
    for record in exported.values() {
        let key = (record.export.namespace.clone(), record.export.name.clone());
        if !wanted.exports.contains_key(&key) {
            commands.push(Command::DeleteExport { namespace: key.0, name: key.1 });
        }
    }
    let none = BTreeMap::new();
    let declared = registry.service_entries.get(own).unwrap_or(&none);
    for entry in wanted.entries.values() {
        let name = format!("{}/{}", entry.namespace, entry.name);
        if declared.get(&name).is_none_or(|record| record.entry != *entry) {
            commands.push(Command::PutServiceEntry { entry: entry.clone() });
        }
    }
    for record in declared.values() {
        let key = (record.entry.namespace.clone(), record.entry.name.clone());
        if !wanted.entries.contains_key(&key) {
            commands.push(Command::DeleteServiceEntry { namespace: key.0, name: key.1 });
        }
    }
    commands
}
