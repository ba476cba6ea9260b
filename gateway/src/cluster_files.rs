//! What `isthmus init` and `isthmus join` leave in a cluster's identity directory, and gateways start from.
//!
//! ```text
//! cluster.json       names, number, whom to dial first
//! intermediate.crt   the cluster's intermediate, without the root
//! intermediate.key   its key
//! roots.crt          the roots that the mesh trusts
//! root.key           in the founding cluster: the key of the first of them
//! ```
//! Everything is 0600 in a directory of 0700. Files only: nothing here opens a socket or reads a clock.

use std::path::{Path, PathBuf};

use isthmus_identity::state::{StateError, create_dir, from_pem, read_private, to_pem, write_private};
use isthmus_identity::{ClusterAuthority, KeyPair, RootAuthority};
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

const FACTS: &str = "cluster.json";
const CHAIN: &str = "intermediate.crt";
const KEY: &str = "intermediate.key";
const ROOTS: &str = "roots.crt";
const ROOT_KEY: &str = "root.key";

/// Who this cluster is, as decided when it was founded or joined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFacts {
    /// The mesh's name.
    pub mesh: String,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// The cluster's name.
    pub cluster: ClusterName,
    /// Its number; 1 for the founder.
    pub cluster_id: ClusterId,
    /// Whether it founded the mesh: its member writes the log's first entry.
    pub founder: bool,
    /// Members known at the time, to dial until the log says more.
    pub peers: Vec<KnownPeer>,
}

/// A member to dial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownPeer {
    /// Its name.
    pub cluster: ClusterName,
    /// Its number.
    pub cluster_id: ClusterId,
    /// Its gateways, `host:port`.
    pub gateways: Vec<String>,
}

/// A cluster's identity, with all that a gateway needs before it has heard anybody.
#[derive(Debug)]
pub struct ClusterFiles {
    /// Who it is.
    pub facts: ClusterFacts,
    /// Its intermediate, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The intermediate's key.
    pub key: KeyPair,
    /// Trusted roots.
    pub roots: Vec<CertificateDer<'static>>,
    /// The mesh's root, where its key is kept here.
    pub root: Option<RootAuthority>,
}

impl ClusterFiles {
    /// Whether `dir` holds an identity already.
    pub fn exist(dir: &Path) -> bool {
        dir.join(FACTS).exists()
    }

    /// Writes all files; `cluster.json` last, so that a half-written directory is not taken for an identity.
    ///
    /// # Errors
    /// [`StateError::Io`].
    pub fn save(&self, dir: &Path) -> Result<(), StateError> {
        create_dir(dir)?;
        write_private(&dir.join(KEY), self.key.to_pem().as_bytes())?;
        write_private(&dir.join(CHAIN), to_pem(&self.chain).as_bytes())?;
        write_private(&dir.join(ROOTS), to_pem(&self.roots).as_bytes())?;
        if let Some(root) = &self.root {
            write_private(&dir.join(ROOT_KEY), root.key_pem().as_bytes())?;
        }
        let facts = serde_json::to_vec_pretty(&self.facts)
            .map_err(|error| content(dir.join(FACTS), format!("cannot be written as JSON: {error}")))?;
        write_private(&dir.join(FACTS), &facts)
    }

    /// Reads them back.
    ///
    /// # Errors
    /// [`StateError`], naming the file: missing, readable by others, or not what it should be.
    pub fn load(dir: &Path) -> Result<Self, StateError> {
        let facts = serde_json::from_slice(&required(dir, FACTS)?)
            .map_err(|error| content(dir.join(FACTS), format!("not a cluster's facts: {error}")))?;
        let roots = certificates(dir, ROOTS)?;
        let root = match read_private(&dir.join(ROOT_KEY))? {
            Some(pem) => Some(RootAuthority::load(roots[0].clone(), key(dir, ROOT_KEY, pem)?)),
            None => None,
        };
        let chain = certificates(dir, CHAIN)?;
        Ok(Self { facts, chain, key: key(dir, KEY, required(dir, KEY)?)?, roots, root })
    }

    /// The intermediate, ready to issue.
    pub fn into_authority(self) -> ClusterAuthority {
        ClusterAuthority::load(self.chain, self.key, self.facts.trust_domain)
    }
}

fn required(dir: &Path, name: &str) -> Result<Vec<u8>, StateError> {
    let path = dir.join(name);
    read_private(&path)?.ok_or_else(|| {
        content(path, "is missing; `isthmus init` or `isthmus join` writes it, a backup restores it".into())
    })
}

/// At least one certificate.
fn certificates(dir: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, StateError> {
    from_pem(&required(dir, name)?, &dir.join(name))
}

fn key(dir: &Path, name: &str, pem: Vec<u8>) -> Result<KeyPair, StateError> {
    let broken = |what: String| content(dir.join(name), what);
    let pem = String::from_utf8(pem).map_err(|_| broken("not a PEM file".into()))?;
    KeyPair::from_pem(&pem).map_err(|_| broken("not a P-256 key in PKCS#8 form".into()))
}

fn content(path: PathBuf, what: String) -> StateError {
    StateError::Content { path, what }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn founder() -> ClusterFiles {
        let trust_domain: TrustDomain = "corp.example".parse().expect("valid");
        let cluster: ClusterName = "aws-eu".parse().expect("valid");
        let root = RootAuthority::create("corp", &trust_domain, 1_700_000_000).expect("a root");
        let key = KeyPair::generate().expect("a key");
        let csr = key.request().expect("a request");
        let intermediate = root.issue_intermediate(&csr, &cluster, &trust_domain, 1_700_000_000).expect("granted");
        let facts = ClusterFacts {
            mesh: "corp".into(),
            trust_domain,
            cluster,
            cluster_id: ClusterId(1),
            founder: true,
            peers: Vec::new(),
        };
        ClusterFiles {
            facts,
            chain: vec![intermediate],
            key,
            roots: vec![root.certificate().clone()],
            root: Some(root),
        }
    }

    #[test]
    fn an_identity_is_read_back_as_written_and_is_nobody_elses_to_read() {
        let dir = tempfile::tempdir().expect("writable");
        let identity = dir.path().join("identity");
        let written = founder();
        assert!(!ClusterFiles::exist(&identity));
        written.save(&identity).expect("saved");
        let read = ClusterFiles::load(&identity).expect("loaded");
        assert_eq!(read.facts, written.facts);
        assert_eq!((&read.chain, &read.roots), (&written.chain, &written.roots));
        assert_eq!(read.key.to_pem(), written.key.to_pem());
        assert!(read.root.is_some());
        for file in std::fs::read_dir(&identity).expect("readable") {
            let mode = file.expect("an entry").metadata().expect("metadata").permissions().mode() & 0o777;
            assert_eq!(mode, 0o600);
        }
    }

    #[test]
    fn a_missing_or_damaged_file_is_named() {
        let dir = tempfile::tempdir().expect("writable");
        founder().save(dir.path()).expect("saved");
        write_private(&dir.path().join(KEY), b"nonsense").expect("writable");
        let error = ClusterFiles::load(dir.path()).expect_err("no key").to_string();
        assert!(error.contains(KEY), "{error}");
        std::fs::remove_file(dir.path().join(CHAIN)).expect("there");
        let error = ClusterFiles::load(dir.path()).expect_err("no chain").to_string();
        assert!(error.contains(CHAIN) && error.contains("missing"), "{error}");
    }
}
