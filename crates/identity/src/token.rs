//! Tokens: one string that lets a cluster join, or a workload enrol, once.
//!
//! A token is a kind prefix, base64 of JSON, and a checksum, so that a truncated copy is named as such
//! instead of failing somewhere later. What the mesh keeps is a hash of the secret.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use isthmus_model::{ClusterName, ServiceAccount};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

/// Longest token that is looked at: 16 addresses of 260 bytes and the rest, in base64.
const TOKEN_LEN_MAX: usize = 8 * 1024;
const CHECKSUM_LEN: usize = 4;

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Another kind of token, or none.
    #[error("this is not a {wanted}: it must start with `{prefix}`; make one with `{fix}`")]
    Kind {
        /// What was expected.
        wanted: &'static str,
        /// Its prefix.
        prefix: &'static str,
        /// How to make one.
        fix: &'static str,
    },
    /// Cut short or changed on the way.
    #[error(
        "the token is incomplete or was changed on the way (its checksum does not match); copy the whole line again"
    )]
    Damaged,
}

impl TokenError {
    /// A fixed word for statuses and metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Kind { .. } => "token_kind",
            Self::Damaged => "token_damaged",
        }
    }
}

/// A secret: printed by nothing but [`Secret::reveal`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// 32 random bytes as text.
    pub fn generate() -> Self {
        let bytes: [u8; 32] = rand::random();
        Self(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the secret under a domain of its own: what is stored.
    pub fn hash(&self) -> [u8; 32] {
        let mut out = [0; 32];
        out.copy_from_slice(digest(&SHA256, format!("isthmus workload token\0{}", self.0).as_bytes()).as_ref());
        out
    }

    /// Whether `hash` is this secret's, in constant time.
    pub fn matches(&self, hash: &[u8; 32]) -> bool {
        self.hash().ct_eq(hash).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Lets one cluster of one name join, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinToken {
    /// The mesh.
    pub mesh: String,
    /// The only name it serves.
    pub cluster: ClusterName,
    /// Names it in tables and in `isthmus token revoke`.
    pub id: String,
    /// Gateways that admit, `host:port`.
    pub gateways: Vec<String>,
    /// The root that their certificates end in, `sha256:<hex>`.
    pub root_fingerprint: String,
    /// What is shown to them.
    pub secret: Secret,
}

/// Lets one workload enrol, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadToken {
    /// The cluster it belongs to.
    pub cluster: ClusterName,
    /// Whom it makes the bearer.
    pub account: ServiceAccount,
    /// The root that its gateways' certificates end in, `sha256:<hex>`.
    pub root_fingerprint: String,
    /// What is shown to them.
    pub secret: Secret,
}

impl JoinToken {
    const PREFIX: &'static str = "ism1.";

    /// Reads a token.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let kind = TokenError::Kind { wanted: "join token", prefix: Self::PREFIX, fix: "isthmus token create CLUSTER" };
        decode(text, Self::PREFIX, kind)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        encode(f, Self::PREFIX, self)
    }
}

impl WorkloadToken {
    const PREFIX: &'static str = "isw1.";

    /// Reads a token.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let kind = TokenError::Kind {
            wanted: "workload token",
            prefix: Self::PREFIX,
            fix: "isthmus token create --workload ns/NS/sa/SA",
        };
        decode(text, Self::PREFIX, kind)
    }
}

impl fmt::Display for WorkloadToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        encode(f, Self::PREFIX, self)
    }
}

fn encode(f: &mut fmt::Formatter<'_>, prefix: &str, token: &impl Serialize) -> fmt::Result {
    let mut bytes = serde_json::to_vec(token).map_err(|_| fmt::Error)?;
    let checksum = digest(&SHA256, &bytes);
    bytes.extend_from_slice(&checksum.as_ref()[..CHECKSUM_LEN]);
    write!(f, "{prefix}{}", URL_SAFE_NO_PAD.encode(bytes))
}

fn decode<T: DeserializeOwned>(text: &str, prefix: &str, kind: TokenError) -> Result<T, TokenError> {
    let text = text.trim();
    let body = text.strip_prefix(prefix).ok_or(kind)?;
    if text.len() > TOKEN_LEN_MAX {
        return Err(TokenError::Damaged);
    }
    let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
    let at = bytes.len().checked_sub(CHECKSUM_LEN).ok_or(TokenError::Damaged)?;
    let (json, checksum) = bytes.split_at(at);
    if &digest(&SHA256, json).as_ref()[..CHECKSUM_LEN] != checksum {
        return Err(TokenError::Damaged);
    }
    serde_json::from_slice(json).map_err(|_| TokenError::Damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            mesh: "demo".into(),
            cluster: "gcp-us".parse().expect("valid"),
            id: "t1".into(),
            gateways: vec!["gw.example.com:15443".into()],
            root_fingerprint: "sha256:00".into(),
            secret: Secret::generate(),
        }
    }

    #[test]
    fn a_token_is_read_back_as_written() {
        let token = token();
        assert_eq!(JoinToken::decode(&token.to_string()), Ok(token));
    }

    #[test]
    fn every_truncation_and_every_changed_character_is_named() {
        let text = token().to_string();
        for len in JoinToken::PREFIX.len()..text.len() {
            assert_eq!(JoinToken::decode(&text[..len]), Err(TokenError::Damaged), "{len}");
        }
        for at in JoinToken::PREFIX.len()..text.len() - 1 {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("ASCII");
            assert!(JoinToken::decode(&changed).is_err(), "{at}");
        }
        assert!(matches!(WorkloadToken::decode(&text), Err(TokenError::Kind { .. })));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let token = token();
        assert!(!format!("{token:?}").contains(token.secret.reveal()));
    }
}
