//! Persist before send, as a type.
//!
//! A [`Batch`] splits into what must be written ([`Persist`]) and what may be done once it is
//! ([`Promised`]). `Promised` gives up its messages only for a [`Durable`], and a `Durable` comes only from
//! a store that has made exactly that `Persist` safe. There is no other way to a message.

use raft::eraftpb::{Entry, Message, Snapshot};
use raft::{ReadState, Ready};

use crate::store::{Durable, Persist};

/// One turn of the consensus library.
#[must_use = "a batch that is not completed blocks the group"]
pub struct Batch {
    persist: Persist,
    promised: Promised,
}

/// What a batch will send and apply, out of reach until its [`Persist`] is safe.
pub struct Promised {
    number: u64,
    ready: Ready,
}

/// What a completed batch lets out.
#[derive(Debug, Default)]
pub struct Released {
    /// To send, in order.
    pub messages: Vec<Message>,
    /// To apply, in order.
    pub committed: Vec<Entry>,
    /// Linearizable reads that may be answered once their position is applied.
    pub reads: Vec<ReadState>,
    /// A snapshot that was installed: the registry is replaced by it before `committed`.
    pub installed: Option<Snapshot>,
}

impl Batch {
    pub(super) fn new(mut ready: Ready) -> Self {
        let number = ready.number();
        let install = (!ready.snapshot().is_empty()).then(|| ready.snapshot().clone());
        let persist = Persist {
            hard_state: ready.hs().cloned(),
            entries: ready.take_entries(),
            install,
            lazy: !ready.must_sync(),
            ..Persist::numbered(number)
        };
        Self { persist, promised: Promised { number, ready } }
    }

    /// The two halves.
    pub fn split(self) -> (Persist, Promised) {
        (self.persist, self.promised)
    }
}

impl Promised {
    /// The library's turn, for a proof that fits.
    ///
    /// # Panics
    /// If the proof is another batch's: a mistake in the driver, never reachable from input.
    pub(super) fn redeem(self, proof: &Durable) -> Ready {
        assert_eq!(self.number, proof.number(), "a proof redeems its own batch only");
        self.ready
    }
}
