//! From a file's documents to objects: which kind, whose name, and nothing by halves.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use isthmus_model::Namespace;
use isthmus_model::service::Labels;

use crate::fields::{Fields, Item};
use crate::object::{Kind, Object, ObjectKey};
use crate::report::{NO_EFFECT, Place, Problem, Refusal, Report, Warning};
use crate::scalar::labels;
use crate::suggest::nearest;
use crate::tree::{self, Node, Value};
use crate::{destination_rule, peer_authentication, service, service_entry, service_export, virtual_service, workload};

/// Largest file: 4 MiB, ten times what the API server takes of one object.
pub(crate) const FILE_LEN_MAX: usize = 4 * 1024 * 1024;

/// The proven objects of one file.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// In the order written.
    pub objects: Vec<Object>,
    /// What was not taken at its word.
    pub warnings: Vec<Warning>,
}

/// Reads all documents of a file. `file` is only used to name places.
///
/// An object without a namespace lies in `default`, as for kubectl. A `List` is read item by item.
///
/// # Errors
/// All problems of the file, in the order of its lines; then none of its objects is returned. An error
/// of YAML itself hides what follows it.
pub fn read(file: &str, bytes: &[u8]) -> Result<Read, Vec<Refusal>> {
    let (objects, warnings) = read_placed(file, bytes)?;
    Ok(Read { objects: objects.into_iter().map(|(object, _)| object).collect(), warnings })
}

/// Objects with their places, and warnings.
type Placed = (Vec<(Object, Place)>, Vec<Warning>);

/// As [`read`], with the place of each object.
pub(crate) fn read_placed(file: &str, bytes: &[u8]) -> Result<Placed, Vec<Refusal>> {
    let mut report = Report::new(file);
    let mut objects: Vec<(Object, Place)> = Vec::new();
    match parse(bytes) {
        Ok(documents) => {
            for node in &documents {
                read_document(&Item { node, path: String::new() }, &mut objects, &mut report);
            }
        }
        Err(error) => {
            let place = Place { file: file.to_owned(), line: error.line, column: error.column, path: String::new() };
            let fix = "correct the YAML; what follows was not read".to_owned();
            report.refuse(Refusal { place, problem: Problem::Syntax, value: None, message: error.message, fix });
        }
    }
    refuse_duplicates(&objects, &mut BTreeMap::new(), &mut report);
    if report.refusals.is_empty() {
        return Ok((objects, report.warnings));
    }
    report.refusals.sort_by_key(|one| (one.place.line, one.place.column));
    Err(report.refusals)
}

/// Refuses objects whose key `seen` has already; adds the others to it.
pub(crate) fn refuse_duplicates(
    objects: &[(Object, Place)],
    seen: &mut BTreeMap<ObjectKey, Place>,
    report: &mut Report,
) {
    for (object, place) in objects {
        let key = object.key();
        match seen.get(&key) {
            None => {
                seen.insert(key, place.clone());
            }
            Some(first) => {
                let message = format!("{key} is there twice, first in {} line {}", first.file, first.line);
                let fix = "rename or remove one of them".to_owned();
                let value = Some(key.name);
                report.refuse(Refusal { place: place.clone(), problem: Problem::Duplicate, value, message, fix });
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Vec<Node>, tree::SyntaxError> {
    let error = |line: usize, message: String| {
        let line = u32::try_from(line).unwrap_or(0);
        tree::SyntaxError { line, column: 1, message }
    };
    if bytes.len() > FILE_LEN_MAX {
        let message = format!("{} bytes are more than {FILE_LEN_MAX}; split the file", bytes.len());
        return Err(error(0, message));
    }
    let text = std::str::from_utf8(bytes).map_err(|broken| {
        let line = 1 + bytes[..broken.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        error(line, "not UTF-8".to_owned())
    })?;
    tree::documents(text)
}

/// What `metadata` says, as far as it means something here.
#[derive(Debug)]
pub(crate) struct Metadata<'a> {
    pub(crate) namespace: Namespace,
    pub(crate) name: Option<Item<'a>>,
    pub(crate) labels: Labels,
    pub(crate) annotations: Vec<(String, Item<'a>)>,
}

impl Metadata<'_> {
    /// The object's name as `T`; `None` if it was refused or is missing, which is noted.
    pub(crate) fn parsed_name<T: FromStr<Err: Display>>(&self, report: &mut Report) -> Option<T> {
        self.name.as_ref()?.parsed(report, "rename the object")
    }
}

fn read_document(item: &Item<'_>, objects: &mut Vec<(Object, Place)>, report: &mut Report) {
    let Some(mut fields) = item.fields(report) else { return };
    let kind_item = fields.need("kind", report);
    let version_item = fields.need("apiVersion", report);
    let (Some(kind_item), Some(version_item)) = (kind_item, version_item) else { return };
    let (Some(kind), Some(version)) = (kind_item.text(report), version_item.text(report)) else { return };
    if kind == "List" && version == "v1" {
        for item in fields.list("items", report) {
            read_document(&item, objects, report);
        }
        fields.ignore(&["metadata"]);
        fields.finish(report);
        return;
    }
    let Some(kind) = known_kind(&kind_item, kind, report) else { return };
    if !kind.api_versions().contains(&version) {
        let fix = format!("use {}", kind.api_versions().join(" or "));
        let message = format!("{kind} has no version {version:?}");
        version_item.refuse(report, Problem::UnknownKind, message, fix);
        return;
    }
    let place = item.place(report);
    if let Some(object) = read_object(kind, fields, report) {
        objects.push((object, place));
    }
}

fn read_object(kind: Kind, mut fields: Fields<'_>, report: &mut Report) -> Option<Object> {
    let metadata = fields.need("metadata", report).and_then(|item| read_metadata(&item, kind, report));
    fields.ignore(&["status"]);
    let optional = matches!(kind, Kind::ServiceExport | Kind::PeerAuthentication);
    let spec = if optional { fields.take("spec") } else { fields.need("spec", report) };
    let spec = spec.map(|item| item.fields(report));
    fields.finish(report);
    let metadata = metadata?;
    if let Some(None) = spec {
        return None;
    }
    let spec = spec.flatten();
    match kind {
        Kind::ServiceExport => service_export::read(&metadata, spec, report).map(Object::ServiceExport),
        Kind::PeerAuthentication => peer_authentication::read(&metadata, spec, report).map(Object::PeerAuthentication),
        Kind::Service => service::read(&metadata, spec?, report).map(Object::Service),
        Kind::WorkloadEntry => workload::read(&metadata, spec?, report).map(Object::WorkloadEntry),
        Kind::ServiceEntry => service_entry::read(&metadata, spec?, report).map(Object::ServiceEntry),
        Kind::VirtualService => virtual_service::read(&metadata, spec?, report).map(Object::VirtualService),
        Kind::DestinationRule => destination_rule::read(&metadata, spec?, report).map(Object::DestinationRule),
    }
}

/// Kinds that people have in such files, and what to do with them here.
const OTHER_KINDS: [(&str, &str); 14] = [
    ("EnvoyFilter", "isthmus does not run Envoy; use VirtualService or DestinationRule"),
    ("Gateway", "not supported yet; services are reached through sidecars"),
    ("HTTPRoute", "not supported yet; use a VirtualService"),
    ("AuthorizationPolicy", "not supported yet; remove it: ignoring a policy would open what it closes"),
    ("RequestAuthentication", "not supported yet; remove it: ignoring a policy would open what it closes"),
    ("Sidecar", "not supported yet; sidecars hold only what their workloads call"),
    ("WorkloadGroup", "not supported yet; write a WorkloadEntry, or start `isthmus proxy` with a token"),
    ("Telemetry", "not supported yet"),
    ("WasmPlugin", "not supported yet"),
    ("ProxyConfig", "not supported yet; settings stand in the proxy's config file"),
    ("Deployment", "isthmus does not run workloads; apply it with kubectl"),
    ("Pod", "isthmus does not run workloads; apply it with kubectl"),
    ("Namespace", "namespaces need no object here; remove it"),
    ("ServiceAccount", "service accounts need no object here; remove it"),
];

fn known_kind(item: &Item<'_>, kind: &str, report: &mut Report) -> Option<Kind> {
    if let Some(known) = Kind::ALL.into_iter().find(|known| known.as_str() == kind) {
        return Some(known);
    }
    let other = OTHER_KINDS.iter().find(|(name, _)| *name == kind);
    let (problem, fix) = match (other, nearest(kind, Kind::ALL.map(Kind::as_str))) {
        (Some((_, fix)), _) => (Problem::NotSupported, (*fix).to_owned()),
        (None, Some(meant)) => (Problem::UnknownKind, format!("did you mean {meant}?")),
        (None, None) => (Problem::UnknownKind, format!("use one of {}", Kind::ALL.map(Kind::as_str).join(", "))),
    };
    let message = format!("kind {:?} is not read here", kind.chars().take(64).collect::<String>());
    item.refuse(report, problem, message, fix);
    None
}

/// Fields that the API server writes.
const SERVER_FIELDS: [&str; 11] = [
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "ownerReferences",
    "finalizers",
    "selfLink",
    "generateName",
];

fn read_metadata<'a>(item: &Item<'a>, kind: Kind, report: &mut Report) -> Option<Metadata<'a>> {
    let mut fields = item.fields(report)?;
    let name = fields.need("name", report);
    let namespace = match fields.take("namespace") {
        Some(item) => item.parsed::<Namespace>(report, "write the name of a namespace"),
        None => "default".parse().ok(),
    };
    let labels = fields.take("labels").map(|item| labels(&item, report)).unwrap_or_default();
    let annotations = fields.take("annotations").map(|item| item.pairs(report)).unwrap_or_default();
    let annotations: Vec<_> = annotations.into_iter().map(|(key, value)| (key.key(), value)).collect();
    for (name, value) in &annotations {
        check_annotation(name, value, kind, report);
    }
    fields.ignore(&SERVER_FIELDS);
    fields.finish(report);
    // A refused namespace is noted; `default` lets the rest be read, so that its problems show too.
    let namespace = namespace.or_else(|| "default".parse().ok())?;
    Some(Metadata { namespace, name, labels, annotations })
}

/// Annotations are free for all but for our own, which are not ignored silently.
fn check_annotation(name: &str, value: &Item<'_>, kind: Kind, report: &mut Report) {
    if name == "isthmus.io/global" && kind == Kind::Service {
        if value.node.value != Value::Text("false".to_owned()) {
            value.not_supported(report, "export the service and call its svc.clusterset.local name");
        }
    } else if name.starts_with("isthmus.io/") && !(name == service_export::VISIBLE_TO && kind == Kind::ServiceExport) {
        value.warn(report, NO_EFFECT, format!("annotation {name} has no effect on a {kind}"));
    }
}
