//! Tokens: one string that lets a cluster join, or a workload enrol, once.
//!
//! A token is a kind prefix, base64 of JSON, and a checksum, so that a truncated copy is named as such
//! instead of failing somewhere later. What the mesh keeps is a hash of the secret.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use isthmus_model::{ClusterName, ServiceAccount};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroize as _;

/// Longest token that is looked at: 16 addresses of 260 bytes and the rest, in base64.
const TOKEN_LEN_MAX: usize = 8 * 1024;
const CHECKSUM_LEN: usize = 4;
/// Most gateway addresses in a token.
const GATEWAYS_MAX: usize = 16;

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
    /// A token of the other kind.
    #[error("this is a {found}, but a {wanted} is needed: make one with `{fix}`")]
    OtherKind {
        /// What it is.
        found: &'static str,
        /// What was expected.
        wanted: &'static str,
        /// How to make one.
        fix: &'static str,
    },
    /// Cut short.
    #[error("the token is cut short (its end is missing); copy the whole line that `isthmus token create` printed")]
    Truncated,
    /// Changed on the way.
    #[error("the token was changed on the way (its checksum does not match); copy the whole line again")]
    Damaged,
    /// Whole, but not usable by this version.
    #[error("the token is whole but {0}; make a new one with the version of isthmus that runs here")]
    Malformed(String),
}

impl TokenError {
    /// A fixed word for statuses and metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Kind { .. } | Self::OtherKind { .. } => "token_kind",
            Self::Truncated => "token_truncated",
            Self::Malformed(_) => "token_malformed",
            Self::Damaged => "token_damaged",
        }
    }
}

/// A secret: printed by nothing but [`Secret::reveal`], wiped when dropped.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Secret {
    /// 32 random bytes as text.
    pub fn generate() -> Self {
        let bytes: [u8; 32] = rand::random();
        Self(ENCODING.encode(bytes))
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

/// What tells the kinds of tokens apart.
struct Kind {
    prefix: &'static str,
    name: &'static str,
    fix: &'static str,
}

const JOIN: Kind = Kind { prefix: "ism1.", name: "join token", fix: "isthmus token create CLUSTER" };
const WORKLOAD: Kind =
    Kind { prefix: "isw1.", name: "workload token", fix: "isthmus token create --workload ns/NS/sa/SA" };

impl JoinToken {
    /// Reads a token; blanks and line breaks around and within do not matter.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let token: Self = decode(text, &JOIN)?;
        match token.gateways.len() {
            1..=GATEWAYS_MAX => {}
            count => {
                return Err(TokenError::Malformed(format!("names {count} gateways instead of 1 to {GATEWAYS_MAX}")));
            }
        }
        let is_address = |text: &&String| match text.rsplit_once(':') {
            Some((host, port)) => !host.is_empty() && port.parse().is_ok_and(|port: u16| port > 0),
            None => false,
        };
        match token.gateways.iter().find(|address| !is_address(address)) {
            Some(bad) => Err(TokenError::Malformed(format!("its gateway address {bad:?} is not host:port"))),
            None => check_fingerprint(&token.root_fingerprint).map(|()| token),
        }
    }
}

impl fmt::Display for JoinToken {
    /// The text to paste. It contains the secret: for the operator's terminal, never for a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        encode(f, &JOIN, self)
    }
}

impl WorkloadToken {
    /// Reads a token; blanks and line breaks around and within do not matter.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let token: Self = decode(text, &WORKLOAD)?;
        check_fingerprint(&token.root_fingerprint).map(|()| token)
    }
}

impl fmt::Display for WorkloadToken {
    /// The text to paste. It contains the secret: for the operator's terminal, never for a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        encode(f, &WORKLOAD, self)
    }
}

fn check_fingerprint(text: &str) -> Result<(), TokenError> {
    match text.strip_prefix("sha256:").map(|digits| hex::decode_to_slice(digits, &mut [0; 32])) {
        Some(Ok(())) => Ok(()),
        _ => Err(TokenError::Malformed(format!("its root fingerprint {text:?} is not sha256: and 64 digits"))),
    }
}

fn encode(f: &mut fmt::Formatter<'_>, kind: &Kind, token: &impl Serialize) -> fmt::Result {
    let mut bytes = serde_json::to_vec(token).map_err(|_| fmt::Error)?;
    let checksum = digest(&SHA256, &bytes);
    bytes.extend_from_slice(&checksum.as_ref()[..CHECKSUM_LEN]);
    write!(f, "{}{}", kind.prefix, ENCODING.encode(bytes))
}

fn decode<T: DeserializeOwned>(text: &str, kind: &Kind) -> Result<T, TokenError> {
    if text.len() > TOKEN_LEN_MAX {
        return Err(TokenError::Damaged);
    }
    let text: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let body = text.strip_prefix(kind.prefix).ok_or_else(|| not(kind, &text))?;
    // The last of a group's characters, if alone, holds no whole byte: there only if the rest was cut off.
    let whole = if body.len() % 4 == 1 { body.len() - 1 } else { body.len() };
    let bytes = ENCODING.decode(&body.as_bytes()[..whole]).map_err(|_| TokenError::Damaged)?;
    let json = json_before_checksum(&bytes)?;
    let content = serde_json::from_slice(json);
    content.map_err(|error| TokenError::Malformed(format!("its content is not understood: {error}")))
}

fn not(wanted: &Kind, text: &str) -> TokenError {
    match [JOIN, WORKLOAD].into_iter().find(|kind| text.starts_with(kind.prefix)) {
        Some(found) => TokenError::OtherKind { found: found.name, wanted: wanted.name, fix: wanted.fix },
        None => TokenError::Kind { wanted: wanted.name, prefix: wanted.prefix, fix: wanted.fix },
    }
}

/// Checks the checksum; tells a missing end from changed characters by where the JSON ends.
fn json_before_checksum(bytes: &[u8]) -> Result<&[u8], TokenError> {
    if let Some((json, checksum)) = bytes.split_last_chunk::<CHECKSUM_LEN>()
        && digest(&SHA256, json).as_ref()[..CHECKSUM_LEN] == *checksum
    {
        return Ok(json);
    }
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<serde::de::IgnoredAny>();
    match values.next() {
        None => Err(TokenError::Truncated),
        Some(Err(error)) if error.is_eof() => Err(TokenError::Truncated),
        Some(Ok(_)) if bytes.len() < values.byte_offset() + CHECKSUM_LEN => Err(TokenError::Truncated),
        Some(_) => Err(TokenError::Damaged),
    }
}

/// Bits behind the last whole byte are ignored: a text cut off anywhere decodes up to there.
const ENCODING: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::RequireNone)
        .with_decode_allow_trailing_bits(true),
);

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            mesh: "demo".into(),
            cluster: "gcp-us".parse().expect("valid"),
            id: "t1".into(),
            gateways: vec!["gw.example.com:15443".into()],
            root_fingerprint: format!("sha256:{}", "0".repeat(64)),
            secret: Secret::generate(),
        }
    }

    #[test]
    fn a_token_is_read_back_as_written() {
        let token = token();
        assert_eq!(JoinToken::decode(&token.to_string()), Ok(token));
    }

    #[test]
    fn a_token_cut_off_anywhere_is_called_cut_off() {
        let text = token().to_string();
        for len in JOIN.prefix.len()..text.len() {
            assert_eq!(JoinToken::decode(&text[..len]), Err(TokenError::Truncated), "{len} of {}", text.len());
        }
    }

    #[test]
    fn a_changed_character_is_found() {
        let token = token();
        let text = token.to_string();
        for at in JOIN.prefix.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("ASCII");
            // The last character may differ in bits that hold nothing.
            let read = JoinToken::decode(&changed);
            assert!(read.is_err() || (at + 1 == text.len() && read.as_ref() == Ok(&token)), "{at}");
        }
    }

    #[test]
    fn tokens_of_the_other_kind_and_other_texts_are_named_with_the_command_that_helps() {
        let text = token().to_string();
        let refused = WorkloadToken::decode(&text).expect_err("another kind");
        assert!(matches!(refused, TokenError::OtherKind { .. }));
        assert!(refused.to_string().contains("isthmus token create --workload"), "{refused}");
        assert!(matches!(JoinToken::decode("hello"), Err(TokenError::Kind { .. })));
        assert!(matches!(JoinToken::decode(""), Err(TokenError::Kind { .. })));
        assert_eq!(JoinToken::decode(&"ism1.".repeat(4096)), Err(TokenError::Damaged));
    }

    #[test]
    fn a_paste_with_line_breaks_is_read() {
        let token = token();
        let mut text = token.to_string();
        text.insert(40, '\n');
        assert_eq!(JoinToken::decode(&format!("  {text}\r\n")), Ok(token));
    }

    #[test]
    fn whole_tokens_with_impossible_content_are_refused() {
        for gateways in [vec![], vec!["gw".to_owned()], vec!["gw:0".into()], vec!["gw:1".into(); 17]] {
            let bad = JoinToken { gateways, ..token() };
            assert!(matches!(JoinToken::decode(&bad.to_string()), Err(TokenError::Malformed(_))), "{bad:?}");
        }
        let bad = JoinToken { root_fingerprint: "sha256:00".into(), ..token() };
        assert!(matches!(JoinToken::decode(&bad.to_string()), Err(TokenError::Malformed(_))));
    }

    #[test]
    fn hashes_are_compared_whole() {
        let (secret, other) = (Secret::generate(), Secret::generate());
        assert!(secret.matches(&secret.hash()));
        assert!(!secret.matches(&other.hash()));
        assert_ne!(secret, other);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_decoding_panic(text in "\\PC{0,200}", body in "(ism1|isw1)\\.[A-Za-z0-9_=-]{0,200}") {
            for text in [text, body] {
                let _ = JoinToken::decode(&text);
                let _ = WorkloadToken::decode(&text);
            }
        }

        #[test]
        fn no_content_makes_decoding_panic(mut json in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let checksum = digest(&SHA256, &json);
            json.extend_from_slice(&checksum.as_ref()[..CHECKSUM_LEN]);
            let text = format!("ism1.{}", ENCODING.encode(json));
            proptest::prop_assert!(JoinToken::decode(&text).is_err());
        }
    }

    #[test]
    fn a_secret_is_not_printed() {
        let token = token();
        assert!(!format!("{token:?}").contains(token.secret.reveal()));
    }
}
