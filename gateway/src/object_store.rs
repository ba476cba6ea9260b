//! The cluster's own objects: a directory of YAML files and what was applied, together with what operators
//! wrote for the whole mesh. The last good state stays: a broken file changes nothing until it is mended.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use isthmus_identity::state::{StateError, read_private, write_private};
use isthmus_model::authn::PeerAuthentication;
use isthmus_model::destination::DestinationRule;
use isthmus_model::route::VirtualService;
use isthmus_model::service::{Patterns, Service, ServiceEntry, Workload};
use isthmus_model::{Namespace, ServiceName};
use isthmus_objects::{Kind, Object, ObjectKey, ObjectSet, Refusal, ServiceExport, Warning};
use isthmus_wire::operator::Change;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::hub::Hub;
use crate::rows::ConfigRow;

/// The code of warnings about objects that other objects contradict.
const CONTRADICTED: &str = "ISM1003";
/// How often the directory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Applied objects as they lie on disk.
#[derive(Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Stored {
    services: Vec<Service>,
    workloads: Vec<Workload>,
    service_entries: Vec<ServiceEntry>,
    exports: Vec<(Namespace, ServiceName, Patterns)>,
    virtual_services: Vec<VirtualService>,
    destination_rules: Vec<DestinationRule>,
    peer_authentications: Vec<PeerAuthentication>,
}

/// Why objects were not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// Problems in the files; nothing was applied.
    #[error("{} problems", .0.len())]
    Refused(Vec<String>),
    /// They could not be kept.
    #[error("the objects could not be kept; nothing was applied")]
    State(#[from] StateError),
}

struct Inner {
    applied: BTreeMap<ObjectKey, Object>,
    /// From the directory, with the file each came from.
    files: BTreeMap<ObjectKey, (Object, String)>,
    /// Why the directory's last change was not taken.
    refusals: Vec<Refusal>,
    seen: BTreeMap<PathBuf, SystemTime>,
}

/// Objects of one cluster.
pub struct ObjectStore {
    path: PathBuf,
    directory: Option<PathBuf>,
    hub: Arc<Hub>,
    inner: Mutex<Inner>,
}

impl ObjectStore {
    /// Opens the store in `state`, and reads `directory` once.
    ///
    /// # Errors
    /// [`StateError`] if what was applied before cannot be read back.
    pub fn open(state: &Path, directory: Option<PathBuf>, hub: Arc<Hub>) -> Result<Arc<Self>, StateError> {
        let path = state.join("objects.json");
        let applied = match read_private(&path)? {
            None => BTreeMap::new(),
            Some(bytes) => {
                let stored: Stored = serde_json::from_slice(&bytes)
                    .map_err(|error| StateError::Content { path: path.clone(), what: error.to_string() })?;
                stored.into_objects().map(|object| (object.key(), object)).collect()
            }
        };
        let inner = Inner { applied, files: BTreeMap::new(), refusals: Vec::new(), seen: BTreeMap::new() };
        let store = Arc::new(Self { path, directory, hub, inner: Mutex::new(inner) });
        store.look();
        store.publish();
        Ok(store)
    }

    /// All objects of the cluster, in the form in which they are kept.
    pub fn to_json(&self) -> Vec<u8> {
        let inner = self.inner.lock();
        let all = inner.applied.values().chain(inner.files.values().map(|(object, _)| object));
        // Plain values into memory: cannot fail.
        serde_json::to_vec(&Stored::of(all)).unwrap_or_default()
    }

    /// Takes over what [`ObjectStore::to_json`] gave at the member: this replica's objects from now on.
    ///
    /// # Errors
    /// [`StateError`] if it cannot be read or kept; the last objects stay.
    pub fn adopt(&self, json: &[u8]) -> Result<(), StateError> {
        let content =
            |error: serde_json::Error| StateError::Content { path: self.path.clone(), what: error.to_string() };
        let stored: Stored = serde_json::from_slice(json).map_err(content)?;
        write_private(&self.path, json)?;
        self.inner.lock().applied = stored.into_objects().map(|object| (object.key(), object)).collect();
        self.publish();
        Ok(())
    }

    /// Looks at the directory and at the log's configuration until `shutdown`.
    pub async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let mut generation = self.hub.generation();
        let mut config = None;
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = look.tick() => if self.look() { self.publish() },
                Ok(()) = generation.changed() => {
                    generation.borrow_and_update();
                    let now = self.hub.registry().config.clone();
                    if config.as_ref() != Some(&now) {
                        config = Some(now);
                        self.publish();
                    }
                }
            }
        }
    }

    /// Writes objects: all of them or none.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn apply(&self, files: &[(String, Vec<u8>)], dry_run: bool) -> Result<(Vec<Change>, Vec<Warning>), ApplyError> {
        let (set, mut warnings) = read(files)?;
        let mut inner = self.inner.lock();
        self.refuse_file_objects(&inner, &set)?;
        let mut next = inner.applied.clone();
        // Contradictions are judged with all that is here, not within the files of one call.
        let mut all = ObjectSet::default();
        for object in inner.files.values().map(|(object, _)| object).chain(inner.applied.values()) {
            all.insert(object.clone());
        }
        for object in set.iter() {
            all.insert(object);
        }
        let still: Vec<String> = all.contradictions().into_iter().map(|(_, message)| message).collect();
        warnings.retain(|warning| warning.code != CONTRADICTED || still.contains(&warning.message));
        let mut changes = Vec::new();
        for object in set.iter() {
            let key = object.key();
            let action = match next.insert(key.clone(), object.clone()) {
                None => "created",
                Some(old) if old == object => "unchanged",
                Some(_) => "configured",
            };
            changes.push(change(&key, action));
        }
        self.keep(&mut inner, next, dry_run)?;
        drop(inner);
        self.publish();
        Ok((changes, warnings))
    }

    /// Removes the objects that the files name.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn delete(&self, files: &[(String, Vec<u8>)], dry_run: bool) -> Result<Vec<Change>, ApplyError> {
        let (set, _) = read(files)?;
        let mut inner = self.inner.lock();
        self.refuse_file_objects(&inner, &set)?;
        let mut next = inner.applied.clone();
        let changes = set.iter().map(|object| {
            let key = object.key();
            let action = if next.remove(&key).is_some() { "deleted" } else { "not found" };
            change(&key, action)
        });
        let changes = changes.collect();
        self.keep(&mut inner, next, dry_run)?;
        drop(inner);
        self.publish();
        Ok(changes)
    }

    /// `get config`.
    pub fn rows(&self) -> Vec<ConfigRow> {
        let inner = self.inner.lock();
        let row = |key: &ObjectKey, origin: &str| {
            let waits_for = self.waits_for(key);
            ConfigRow {
                kind: key.kind.to_string(),
                namespace: key.namespace.to_string(),
                name: key.name.clone(),
                origin: origin.to_owned(),
                state: if waits_for.is_empty() { "active" } else { "waiting" }.into(),
                message: waits_for,
            }
        };
        let mut rows: Vec<ConfigRow> = inner.applied.keys().map(|key| row(key, "applied")).collect();
        rows.extend(inner.files.iter().map(|(key, (_, file))| row(key, file)));
        rows.extend(self.hub.registry().config.values().map(|record| ConfigRow {
            kind: record.key.kind.clone(),
            namespace: record.key.namespace.to_string(),
            name: record.key.name.clone(),
            origin: "mesh".into(),
            state: "active".into(),
            message: format!("by operator {}", record.operator),
        }));
        rows.extend(inner.refusals.iter().map(|refusal| ConfigRow {
            origin: refusal.place.file.clone(),
            state: "refused".into(),
            message: refusal.to_string(),
            ..ConfigRow::default()
        }));
        rows
    }

    /// What an object waits for before it does anything; empty if it does.
    fn waits_for(&self, key: &ObjectKey) -> String {
        let objects = self.hub.objects();
        if key.kind == Kind::WorkloadEntry {
            let entry =
                objects.workloads.values().find(|one| one.namespace == key.namespace && one.name.as_str() == key.name);
            return match entry {
                Some(entry) if !self.hub.locals().has(entry) => {
                    format!("no sidecar named {} or at {} has registered yet", entry.name, entry.address)
                }
                _ => String::new(),
            };
        }
        if key.kind != Kind::ServiceExport {
            return String::new();
        }
        let name = format!("{}/{}", key.namespace, key.name);
        let registry = self.hub.registry();
        if registry.exports.get(self.hub.own()).is_some_and(|of| of.contains_key(&name)) {
            return String::new();
        }
        match objects.services.keys().any(|(namespace, service)| format!("{namespace}/{service}") == name) {
            true => format!("no sidecar of a workload that {name} selects has registered yet"),
            false => format!("there is no Service {name}"),
        }
    }

    fn refuse_file_objects(&self, inner: &Inner, set: &ObjectSet) -> Result<(), ApplyError> {
        let of_files = set.iter().filter_map(|object| {
            let key = object.key();
            let (_, file) = inner.files.get(&key)?;
            Some(format!("{key} comes from the file {file} on the gateway; change it there"))
        });
        let refusals: Vec<String> = of_files.collect();
        if refusals.is_empty() { Ok(()) } else { Err(ApplyError::Refused(refusals)) }
    }

    fn keep(&self, inner: &mut Inner, next: BTreeMap<ObjectKey, Object>, dry_run: bool) -> Result<(), ApplyError> {
        if dry_run || next == inner.applied {
            return Ok(());
        }
        let json = serde_json::to_vec(&Stored::of(next.values()))
            .map_err(|error| StateError::Content { path: self.path.clone(), what: error.to_string() })?;
        write_private(&self.path, &json)?;
        inner.applied = next;
        Ok(())
    }

    /// Reads the directory if a file of it changed; says whether its objects are to be used.
    fn look(&self) -> bool {
        let Some(directory) = &self.directory else { return false };
        let found = match yaml_files(directory) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(directory = %directory.display(), %error, "objects cannot be read; the last ones stay");
                return false;
            }
        };
        let mut inner = self.inner.lock();
        if inner.seen == found {
            return false;
        }
        let mut files = Vec::new();
        for path in found.keys() {
            match std::fs::read(path) {
                Ok(bytes) => files.push((path.display().to_string(), bytes)),
                // Removed since it was listed: the next look sees that.
                Err(_) => return false,
            }
        }
        inner.seen = found;
        match read_files(&files) {
            Ok(objects) => {
                inner.refusals.clear();
                inner.files = objects;
                true
            }
            Err(refusals) => {
                for refusal in &refusals {
                    tracing::warn!("{refusal}; the last good objects stay");
                }
                inner.refusals = refusals;
                false
            }
        }
    }

    /// What holds now: files and applied objects, then what operators wrote for the mesh where nothing of the
    /// same name is here.
    fn publish(&self) {
        let mut set = ObjectSet::default();
        for record in self.hub.registry().config.values() {
            match Object::from_json(&record.json) {
                Ok(object) => drop(set.insert(object)),
                Err(error) => tracing::warn!(object = %record.key, %error, "mesh-wide object not used"),
            }
        }
        let inner = self.inner.lock();
        for object in inner.applied.values().chain(inner.files.values().map(|(object, _)| object)) {
            set.insert(object.clone());
        }
        drop(inner);
        if *self.hub.objects() != set {
            self.hub.set_objects(Arc::new(set));
        }
    }
}

fn read(files: &[(String, Vec<u8>)]) -> Result<(ObjectSet, Vec<Warning>), ApplyError> {
    let all = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    ObjectSet::read(all).map_err(|refusals| ApplyError::Refused(refusals.iter().map(ToString::to_string).collect()))
}

fn read_files(files: &[(String, Vec<u8>)]) -> Result<BTreeMap<ObjectKey, (Object, String)>, Vec<Refusal>> {
    let all = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    let (_, warnings) = ObjectSet::read(all)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let mut objects = BTreeMap::new();
    for (name, bytes) in files {
        for object in isthmus_objects::read(name, bytes)?.objects {
            objects.insert(object.key(), (object, name.clone()));
        }
    }
    Ok(objects)
}

fn yaml_files(directory: &Path) -> std::io::Result<BTreeMap<PathBuf, SystemTime>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if yaml && let Ok(modified) = std::fs::metadata(&path).and_then(|metadata| metadata.modified()) {
            found.insert(path, modified);
        }
    }
    Ok(found)
}

fn change(key: &ObjectKey, action: &str) -> Change {
    Change {
        kind: key.kind.to_string(),
        namespace: key.namespace.to_string(),
        name: key.name.clone(),
        action: action.to_owned(),
    }
}

impl Stored {
    fn of<'a>(objects: impl Iterator<Item = &'a Object>) -> Self {
        let mut stored = Self::default();
        for object in objects.cloned() {
            match object {
                Object::Service(one) => stored.services.push(one),
                Object::WorkloadEntry(one) => stored.workloads.push(one),
                Object::ServiceEntry(one) => stored.service_entries.push(one),
                Object::ServiceExport(one) => stored.exports.push((one.namespace, one.name, one.visible_to)),
                Object::VirtualService(one) => stored.virtual_services.push(one),
                Object::DestinationRule(one) => stored.destination_rules.push(one),
                Object::PeerAuthentication(one) => stored.peer_authentications.push(one),
            }
        }
        stored
    }

    fn into_objects(self) -> impl Iterator<Item = Object> {
        let export = |(namespace, name, visible_to)| ServiceExport { namespace, name, visible_to };
        let services = self.services.into_iter().map(Object::Service);
        let workloads = self.workloads.into_iter().map(Object::WorkloadEntry);
        let entries = self.service_entries.into_iter().map(Object::ServiceEntry);
        let exports = self.exports.into_iter().map(export).map(Object::ServiceExport);
        let routes = self.virtual_services.into_iter().map(Object::VirtualService);
        let rules = self.destination_rules.into_iter().map(Object::DestinationRule);
        let authn = self.peer_authentications.into_iter().map(Object::PeerAuthentication);
        services.chain(workloads).chain(entries).chain(exports).chain(routes).chain(rules).chain(authn)
    }
}
