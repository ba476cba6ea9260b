//! `isthmus apply` and `isthmus delete`: objects from YAML files, all of them or none.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use isthmus_wire::operator::{ApplyRequest, ApplyResponse, Change, DeleteRequest, File};
use serde_json::json;

use crate::context::{Context, refused};
use crate::failure::{Exit, Failure};
use crate::mesh_wide::{self, Write};
use crate::render;

/// Largest file: well above the largest sensible object set, well below what a gRPC message may hold.
const FILE_LEN_MAX: u64 = 3 * 1024 * 1024;

/// Options of `isthmus apply` and `isthmus delete`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A YAML file, a directory of them, or `-` for standard input; may be repeated
    #[arg(short = 'f', long = "filename", required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Check everything, change nothing
    #[arg(long)]
    dry_run: bool,
    /// For the whole mesh, signed with the operator's key (VirtualService, DestinationRule, PeerAuthentication);
    /// an object of the same name in a cluster holds there instead
    #[arg(long)]
    mesh: bool,
    /// Where the operator's certificate and key are [default: $XDG_CONFIG_HOME/isthmus/MESH]
    #[arg(long, value_name = "DIR", requires = "mesh")]
    operator_dir: Option<PathBuf>,
}

/// Runs `isthmus apply`.
///
/// # Errors
/// Every refusal of the gateway with file, line, path, value and fix; then nothing was applied.
pub async fn apply(args: Args, context: &Context) -> Result<(), Failure> {
    let files = read(&args.files)?;
    if args.mesh {
        let answer = mesh_wide::write(files, Write::Put, args.dry_run, args.operator_dir, context).await?;
        return report(&answer, args.dry_run, context);
    }
    let request = ApplyRequest { files, dry_run: args.dry_run };
    let answer = context.connect().await?.apply(request).await.map_err(refused)?.into_inner();
    report(&answer, args.dry_run, context)
}

/// Runs `isthmus delete`.
///
/// # Errors
/// As [`apply`].
pub async fn delete(args: Args, context: &Context) -> Result<(), Failure> {
    let files = read(&args.files)?;
    if args.mesh {
        let answer = mesh_wide::write(files, Write::Delete, args.dry_run, args.operator_dir, context).await?;
        return report(&answer, args.dry_run, context);
    }
    let request = DeleteRequest { files, dry_run: args.dry_run };
    let answer = context.connect().await?.delete(request).await.map_err(refused)?.into_inner();
    report(&answer, args.dry_run, context)
}

/// Prints what was done; fails if anything was refused.
///
/// # Errors
/// [`Exit::Failed`] with the number of refusals.
pub fn report(answer: &ApplyResponse, dry_run: bool, context: &Context) -> Result<(), Failure> {
    for warning in &answer.warnings {
        render::note(&format!("warning: {warning}"));
    }
    for refusal in &answer.refusals {
        render::note(refusal);
    }
    if context.json() {
        let changes: Vec<_> = answer.changes.iter().map(json).collect();
        let (refusals, warnings) = (&answer.refusals, &answer.warnings);
        let value = json!({ "changes": changes, "refusals": refusals, "warnings": warnings, "dry_run": dry_run });
        render::print_object("ApplyResult", &value);
    } else {
        for change in &answer.changes {
            let suffix = if dry_run { " (dry run)" } else { "" };
            render::line(&format!("{} {}{suffix}", name(change), change.action));
        }
    }
    match answer.refusals.len() {
        0 => Ok(()),
        1 => Err(Failure::new(Exit::Failed, "refused; nothing was changed")),
        count => Err(Failure::new(Exit::Failed, format!("{count} problems; nothing was changed"))),
    }
}

fn name(change: &Change) -> String {
    let kind = change.kind.to_lowercase();
    match change.namespace.as_str() {
        "" => format!("{kind}/{}", change.name),
        namespace => format!("{kind}/{namespace}/{}", change.name),
    }
}

fn json(change: &Change) -> serde_json::Value {
    json!({
        "kind": change.kind, "namespace": change.namespace, "name": change.name, "action": change.action,
    })
}

fn read(paths: &[PathBuf]) -> Result<Vec<File>, Failure> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            files.push(File { name: "stdin".into(), content: bounded(std::io::stdin().lock(), Path::new("stdin"))? });
        } else if path.is_dir() {
            for path in yaml_files(path)? {
                files.push(read_file(&path)?);
            }
        } else {
            files.push(read_file(path)?);
        }
    }
    Ok(files)
}

/// The `.yaml` and `.yml` files of a directory, sorted, so that complaints come in a stable order.
fn yaml_files(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let unreadable =
        |error: std::io::Error| Failure::new(Exit::Usage, format!("cannot read {}", dir.display())).cause(error);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            found.push(path);
        }
    }
    found.sort();
    match found.is_empty() {
        true => Err(Failure::new(Exit::Usage, format!("no .yaml file in {}", dir.display()))),
        false => Ok(found),
    }
}

fn read_file(path: &Path) -> Result<File, Failure> {
    let file = std::fs::File::open(path)
        .map_err(|error| Failure::new(Exit::Usage, format!("cannot read {}", path.display())).cause(error))?;
    Ok(File { name: path.display().to_string(), content: bounded(file, path)? })
}

fn bounded(reader: impl std::io::Read, path: &Path) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    reader
        .take(FILE_LEN_MAX + 1)
        .read_to_end(&mut content)
        .map_err(|error| Failure::new(Exit::Usage, format!("cannot read {}", path.display())).cause(error))?;
    if content.len() as u64 > FILE_LEN_MAX {
        return Err(Failure::new(Exit::Usage, format!("{} is larger than {FILE_LEN_MAX} bytes", path.display()))
            .fix("split it"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_gives_its_yaml_files_in_order_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("isthmus-apply-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("writable");
        for name in ["b.yaml", "a.yml", "notes.txt"] {
            std::fs::write(dir.join(name), name).expect("writable");
        }
        let files = read(std::slice::from_ref(&dir)).expect("readable");
        let names: Vec<_> = files.iter().map(|file| String::from_utf8_lossy(&file.content).into_owned()).collect();
        std::fs::remove_dir_all(&dir).expect("own directory");
        assert_eq!(names, ["a.yml", "b.yaml"]);
    }

    #[test]
    fn an_endless_input_is_refused() {
        assert!(bounded(std::io::repeat(b' '), Path::new("stdin")).is_err());
    }
}
