//! The walls of the house: which crate may use which, and that ARCHITECTURE.md names nothing that is gone.
//!
//! A new edge is a decision. Add it to [`EDGES`] in the commit that needs it, and say there why.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use isthmus_tests::top;
use serde_json::Value;

/// Each crate of the workspace, and the others that it may depend on.
const EDGES: &[(&str, &[&str])] = &[
    ("isthmus-model", &[]),
    ("isthmus-wire", &["model"]),
    ("isthmus-objects", &["model"]),
    ("isthmus-identity", &["model"]),
    ("isthmus-runtime", &[]),
    ("isthmus-tunnel", &["identity", "model", "wire"]),
    ("isthmus-federation", &["identity", "model", "wire"]),
    ("isthmus-gateway", &["federation", "identity", "model", "objects", "runtime", "tunnel", "wire"]),
    ("isthmus-proxy", &["identity", "model", "runtime", "tunnel", "wire"]),
    ("isthmus-lab", &["identity"]),
    (
        "isthmus-cli",
        &["federation", "gateway", "identity", "lab", "model", "objects", "proxy", "runtime", "tunnel", "wire"],
    ),
    ("isthmus-tests", &["lab"]),
    // Our build of the messages that the `raft` crate names; nothing else may use it by name.
    ("raft-proto", &[]),
];

/// What a crate must not carry, however indirectly, and why.
const NEVER: &[(&str, &[&str], &str)] = &[
    ("isthmus-model", &["tokio", "rustls", "hyper"], "it is pure: no I/O, no clock"),
    ("isthmus-objects", &["tokio", "rustls", "hyper"], "reading YAML needs no network"),
    ("isthmus-identity", &["tokio", "quinn", "hyper"], "it opens no socket"),
    ("isthmus-proxy", &["isthmus-objects", "isthmus-federation", "raft", "redb", "kube"], "every pod pays for it"),
    ("isthmus-tunnel", &["isthmus-objects", "isthmus-federation", "raft", "redb", "kube"], "sidecars carry it"),
    ("isthmus-cli", &["ring", "openssl-sys", "native-tls"], "one crypto provider: aws-lc-rs"),
];

fn cargo(arguments: &[&str]) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).args(arguments).current_dir(top()).output().expect("cargo runs");
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo writes UTF-8")
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key}")).iter()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key}"))
}

/// Edges inside the workspace, of any kind: a test that crosses a wall ties the crates as well.
fn edges(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let inside = |package: &Value| {
        let local = list(package, "dependencies").filter(|dependency| dependency["path"].is_string());
        local.map(|dependency| text(dependency, "name").to_owned()).collect()
    };
    list(metadata, "packages").map(|package| (text(package, "name").to_owned(), inside(package))).collect()
}

#[test]
fn crates_use_only_what_the_layout_allows() {
    let metadata = cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]);
    let found = edges(&serde_json::from_str(&metadata).expect("cargo metadata is JSON"));
    let allowed: BTreeMap<&str, BTreeSet<String>> =
        EDGES.iter().map(|(name, uses)| (*name, uses.iter().map(|one| format!("isthmus-{one}")).collect())).collect();
    let mut complaints = Vec::new();
    for (name, uses) in &found {
        match allowed.get(name.as_str()) {
            None => complaints.push(format!("{name} is new: add it to EDGES with what it may use")),
            Some(allowed) => complaints.extend(uses.difference(allowed).map(|new| format!("{name} now uses {new}"))),
        }
    }
    complaints.extend(allowed.keys().filter(|name| !found.contains_key(**name)).map(|name| format!("{name} is gone")));
    assert!(complaints.is_empty(), "the layout changed:\n  {}", complaints.join("\n  "));
}

/// What is linked with a crate on Linux: its dependencies and theirs, without those of builds and tests.
fn linked(root: &str) -> BTreeSet<String> {
    let target = ["--target", "x86_64-unknown-linux-gnu"];
    let tree = cargo(&[&["tree", "--locked", "-p", root, "-e", "normal", "--prefix", "none"], &target[..]].concat());
    tree.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn crates_never_carry_what_they_must_not() {
    let mut complaints = Vec::new();
    for (root, never, why) in NEVER {
        let linked = linked(root);
        assert!(linked.contains(*root) && linked.len() > 1, "cargo tree says nothing of {root}");
        let carried = never.iter().filter(|name| linked.contains(**name));
        complaints
            .extend(carried.map(|name| format!("{root} carries {name}, but {why} (cargo tree -p {root} -i {name})")));
    }
    assert!(complaints.is_empty(), "\n  {}", complaints.join("\n  "));
}

/// Texts in backquotes that look like paths of this repository, with the line they stand in.
fn named_paths(document: &str) -> Vec<(usize, String)> {
    let is_path = |text: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
        let ends = [".rs", ".md", ".toml", ".proto", ".sh", "/"].iter().any(|end| text.ends_with(end));
        text.chars().all(plain) && !text.starts_with(['/', '.']) && text.contains('/') && ends
    };
    let in_line = |(number, line): (usize, &str)| {
        let quoted = line.split('`').skip(1).step_by(2);
        quoted.filter(|text| is_path(text)).map(move |text| (number + 1, text.to_owned())).collect::<Vec<_>>()
    };
    document.lines().enumerate().flat_map(in_line).collect()
}

#[test]
fn every_path_named_in_architecture_md_exists() {
    let document = top().join("ARCHITECTURE.md");
    let document = std::fs::read_to_string(&document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
    let named = named_paths(&document);
    assert!(named.len() >= 10, "only {} paths found: are they still written in backquotes?", named.len());
    let gone: Vec<String> = named
        .iter()
        .filter(|(_, path)| !top().join(path).exists())
        .map(|(line, path)| format!("ARCHITECTURE.md:{line}: {path}"))
        .collect();
    assert!(gone.is_empty(), "named but gone:\n  {}", gone.join("\n  "));
    assert!(document.lines().count() <= LINES_MAX, "a map of more than {LINES_MAX} lines is not read");
}

/// Longest ARCHITECTURE.md: what one reads before the first change.
const LINES_MAX: usize = 250;

#[test]
fn paths_are_told_from_other_texts_in_backquotes() {
    let document = "see `gateway/src/router.rs` and `crates/model/`,\nnot `cargo test`, `/etc/hosts`, `a/b` or `*.rs`";
    assert_eq!(named_paths(document), [(1, "gateway/src/router.rs".to_owned()), (1, "crates/model/".to_owned())]);
}
