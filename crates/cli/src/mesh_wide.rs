//! Writes for the whole mesh: read and judged here, signed with the operator's key, proposed as log entries.
//!
//! The key never leaves this machine; a gateway only passes on what it could not have signed itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use isthmus_federation::command::{Command, ConfigKey, SignError, SignedEntry, Signer, Writer};
use isthmus_federation::der::Der;
use isthmus_federation::registry::Registry;
use isthmus_identity::KeyPair;
use isthmus_identity::state::{from_pem, read_private};
use isthmus_objects::{Object, ObjectSet};
use isthmus_wire::operator::{ApplyResponse, Change, File, GetRequest, ProposeRequest};

use crate::context::{self, Context, refused};
use crate::failure::{Exit, Failure};

/// What to do with the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Create or replace.
    Put,
    /// Remove.
    Delete,
}

/// An operator's certificate and key.
struct Operator {
    chain: Vec<Der>,
    key: KeyPair,
}

impl Signer for Operator {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        self.key.sign(message).map_err(|error| SignError(error.to_string()))
    }
}

impl Operator {
    fn load(dir: &Path) -> Result<Self, Failure> {
        let read = |name: &str| {
            let path = dir.join(name);
            let missing = || {
                Failure::new(Exit::Usage, format!("no operator's {name} in {}", dir.display()))
                    .fix("name the directory that `isthmus init` wrote with --operator-dir")
            };
            Ok::<_, Failure>((read_private(&path)?.ok_or_else(missing)?, path))
        };
        let (crt, path) = read("operator.crt")?;
        let (key, _) = read("operator.key")?;
        // The root comes last, for reading; the log has its own.
        let mut chain = from_pem(&crt, &path)?;
        if chain.len() > 1 {
            chain.pop();
        }
        let key = KeyPair::from_pem(&String::from_utf8_lossy(&key))?;
        Ok(Self { chain: chain.into_iter().map(|der| Der(der.to_vec())).collect(), key })
    }
}

/// Writes the objects of `files` for the whole mesh. All are judged before the first is written.
///
/// # Errors
/// No gateway, no operator's key, a refusal of the log: said together with what was written before it.
pub async fn write(
    files: Vec<File>,
    write: Write,
    dry_run: bool,
    operator_dir: Option<PathBuf>,
    context: &Context,
) -> Result<ApplyResponse, Failure> {
    let all = files.iter().map(|file| (file.name.as_str(), file.content.as_slice()));
    let (set, warnings) = match ObjectSet::read(all) {
        Ok(read) => read,
        Err(refusals) => return Ok(refuse(refusals.iter().map(ToString::to_string).collect())),
    };
    let foreign: Vec<String> = set
        .iter()
        .map(|object| object.key())
        .filter(|key| !key.kind.is_mesh_wide())
        .map(|key| format!("{key} belongs to one cluster; apply it there, without --mesh"))
        .collect();
    if !foreign.is_empty() {
        return Ok(refuse(foreign));
    }
    let request = GetRequest { what: "registry".into(), linearizable: true, ..GetRequest::default() };
    let registry: Registry = context.get(request).await?;
    let Some(mesh) = &registry.mesh else {
        return Err(
            Failure::new(Exit::Failed, "this gateway has not heard of its mesh yet").fix("try again in a moment")
        );
    };
    let dir = operator_dir.unwrap_or_else(|| context::operator_dir(&mesh.name));
    let operator = Operator::load(&dir)?;
    let writer = Writer::Operator(operator.chain.clone());
    let known: BTreeMap<&ConfigKey, &str> =
        registry.config.values().map(|record| (&record.key, record.json.as_str())).collect();
    let mut gateway = context.connect().await?;
    let mut answer =
        ApplyResponse { warnings: warnings.iter().map(ToString::to_string).collect(), ..ApplyResponse::default() };
    for (number, object) in set.iter().enumerate() {
        let key = config_key(&object);
        let (action, command) = decide(write, &object, &key, known.get(&key).copied());
        if let Some(command) = command.filter(|_| !dry_run) {
            let micros = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0);
            let entry = SignedEntry::sign(&writer, &mesh.name, micros + number as u64, command, &operator)?;
            let request = ProposeRequest { entry: entry.to_bytes() };
            gateway.propose(request).await.map_err(|status| partly(refused(status), &answer.changes))?;
        }
        answer.changes.push(Change {
            kind: key.kind,
            namespace: key.namespace.to_string(),
            name: key.name,
            action: action.to_owned(),
        });
    }
    Ok(answer)
}

fn decide(write: Write, object: &Object, key: &ConfigKey, known: Option<&str>) -> (&'static str, Option<Command>) {
    // Kinds without a record were refused before.
    let json = object.to_json().unwrap_or_default();
    let put = || Some(Command::PutConfig { key: key.clone(), json: json.clone() });
    match (write, known) {
        (Write::Put, None) => ("created", put()),
        (Write::Put, Some(old)) if old == json => ("unchanged", None),
        (Write::Put, Some(_)) => ("configured", put()),
        (Write::Delete, Some(_)) => ("deleted", Some(Command::DeleteConfig { key: key.clone() })),
        (Write::Delete, None) => ("not found", None),
    }
}

fn config_key(object: &Object) -> ConfigKey {
    let key = object.key();
    ConfigKey { kind: key.kind.to_string(), namespace: key.namespace, name: key.name }
}

fn refuse(refusals: Vec<String>) -> ApplyResponse {
    ApplyResponse { refusals, ..ApplyResponse::default() }
}

/// A failure in the middle: each object is a log entry of its own.
fn partly(failure: Failure, written: &[Change]) -> Failure {
    if written.is_empty() {
        return failure;
    }
    let names: Vec<String> = written.iter().map(|one| format!("{}/{}/{}", one.kind, one.namespace, one.name)).collect();
    failure.fix(format!("written before it: {}; apply the same files again to go on", names.join(", ")))
}
