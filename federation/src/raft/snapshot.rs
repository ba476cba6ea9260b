//! The registry as bytes: zstd over JSON, with a form number in front.
//!
//! JSON, so that a snapshot can be read by a person in a bad hour; the log's positions and terms travel
//! beside it in Raft's own metadata.

use raft::eraftpb::{ConfState, Snapshot, SnapshotMetadata};

use crate::registry::Registry;

/// The form this build writes and the highest it reads.
const FORM: u8 = 1;
/// Longest registry that is unpacked: 1,000 clusters' worth with every quota a tenth used.
const UNPACKED_LEN_MAX: usize = 256 * 1024 * 1024;
/// zstd level: 1 packs 10:1 at some 300 MB/s.
const LEVEL: i32 = 1;

/// Why bytes are no snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a registry snapshot: {0}")]
pub struct SnapshotError(pub String);

/// Packs a registry.
///
/// # Errors
/// If it cannot be packed (it is longer than what a reader unpacks).
pub fn pack(registry: &Registry) -> Result<Vec<u8>, SnapshotError> {
    let json = serde_json::to_vec(registry).map_err(|error| SnapshotError(error.to_string()))?;
    if json.len() > UNPACKED_LEN_MAX {
        return Err(SnapshotError(format!("{} bytes, at most {UNPACKED_LEN_MAX}", json.len())));
    }
    let mut bytes = vec![FORM];
    bytes.extend(zstd::bulk::compress(&json, LEVEL).map_err(|error| SnapshotError(error.to_string()))?);
    Ok(bytes)
}

/// Unpacks a registry, never more than its bound.
///
/// # Errors
/// [`SnapshotError`]; never panics.
pub fn unpack(bytes: &[u8]) -> Result<Registry, SnapshotError> {
    match bytes.split_first() {
        Some((&FORM, packed)) => {
            let mut json = Vec::new();
            let decoder = zstd::Decoder::new(packed).map_err(|error| SnapshotError(error.to_string()))?;
            let bound = UNPACKED_LEN_MAX as u64 + 1;
            std::io::Read::read_to_end(&mut std::io::Read::take(decoder, bound), &mut json)
                .map_err(|error| SnapshotError(error.to_string()))?;
            if json.len() > UNPACKED_LEN_MAX {
                return Err(SnapshotError(format!("unpacks to more than {UNPACKED_LEN_MAX} bytes")));
            }
            serde_json::from_slice(&json).map_err(|error| SnapshotError(error.to_string()))
        }
        Some((form, _)) => Err(SnapshotError(format!("form {form}, this build reads {FORM}: upgrade this gateway"))),
        None => Err(SnapshotError("no bytes".into())),
    }
}

/// A snapshot for the library, at the registry's position.
///
/// # Errors
/// Those of [`pack`].
pub fn of(registry: &Registry, term: u64, group: ConfState) -> Result<Snapshot, SnapshotError> {
    let metadata = SnapshotMetadata { conf_state: Some(group), index: registry.index, term };
    Ok(Snapshot { data: pack(registry)?, metadata: Some(metadata) })
}
