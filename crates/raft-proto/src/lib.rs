//! The message types of the `raft` crate, generated ahead of time.
//!
//! The published crate of this name runs `protoc` in its build script. This one replaces it through
//! `[patch.crates-io]`: the same messages, their code committed, no build script. The files under
//! `protos/` come from `eraftpb.proto` 0.7.0 by `protobuf-build` 0.14 with `prost-codec`; the raft
//! crate is frozen, so they are not expected to change.

mod confchange;

pub use confchange::{conf_state_eq, new_conf_change_single, ConfChangeI};
pub use protos::eraftpb;

#[allow(clippy::all, dead_code, missing_docs)]
#[rustfmt::skip]
mod protos {
    pub mod eraftpb {
        include!("protos/eraftpb.rs");
        include!("protos/wrapper_eraftpb.rs");
    }
}

impl eraftpb::Snapshot {
    /// Whether this is the empty snapshot, which says "nothing to install".
    pub fn is_empty(&self) -> bool {
        self.get_metadata().index == 0
    }
}

/// The types most users of the crate want.
pub mod prelude {
    pub use crate::eraftpb::{
        ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
        HardState, Message, MessageType, Snapshot, SnapshotMetadata,
    };
}

/// Conversions used by the raft crate.
pub mod util {
    use crate::eraftpb::ConfState;

    impl<V, L> From<(V, L)> for ConfState
    where
        V: IntoIterator<Item = u64>,
        L: IntoIterator<Item = u64>,
    {
        fn from((voters, learners): (V, L)) -> Self {
            Self { voters: voters.into_iter().collect(), learners: learners.into_iter().collect(), ..Self::default() }
        }
    }
}
