//! Membership changes: one view over both wire forms, and equality of configurations.

use std::borrow::Cow;

use crate::eraftpb::{ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};

/// One step of a membership change.
pub fn new_conf_change_single(node_id: u64, change_type: ConfChangeType) -> ConfChangeSingle {
    let mut single = ConfChangeSingle { node_id, ..Default::default() };
    single.set_change_type(change_type);
    single
}

/// Either wire form of a membership change.
pub trait ConfChangeI {
    /// The joint-consensus form.
    fn into_v2(self) -> ConfChangeV2;
    /// The joint-consensus form, borrowed where it already is one.
    fn as_v2(&self) -> Cow<'_, ConfChangeV2>;
    /// The single-step form, if this is one.
    fn as_v1(&self) -> Option<&ConfChange>;
}

impl ConfChangeI for ConfChange {
    fn into_v2(self) -> ConfChangeV2 {
        let change = new_conf_change_single(self.node_id, self.get_change_type());
        ConfChangeV2 { changes: vec![change], context: self.context, ..Default::default() }
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Owned(self.clone().into_v2())
    }

    fn as_v1(&self) -> Option<&ConfChange> {
        Some(self)
    }
}

impl ConfChangeI for ConfChangeV2 {
    fn into_v2(self) -> ConfChangeV2 {
        self
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Borrowed(self)
    }

    fn as_v1(&self) -> Option<&ConfChange> {
        None
    }
}

impl ConfChangeV2 {
    /// Whether this change goes through a joint configuration, and if so whether it leaves it by itself.
    pub fn enter_joint(&self) -> Option<bool> {
        match self.get_transition() {
            ConfChangeTransition::Explicit => Some(false),
            ConfChangeTransition::Implicit => Some(true),
            // A single change needs no joint phase.
            ConfChangeTransition::Auto => (self.changes.len() > 1).then_some(true),
        }
    }

    /// Whether this is the empty change that ends a joint configuration.
    pub fn leave_joint(&self) -> bool {
        self.changes.is_empty() && self.get_transition() == ConfChangeTransition::Auto
    }
}

/// Whether both describe the same configuration, in whatever order their members are listed.
#[must_use]
pub fn conf_state_eq(left: &ConfState, right: &ConfState) -> bool {
    fn sorted(members: &[u64]) -> Vec<u64> {
        let mut members = members.to_vec();
        members.sort_unstable();
        members
    }
    sorted(&left.voters) == sorted(&right.voters)
        && sorted(&left.learners) == sorted(&right.learners)
        && sorted(&left.voters_outgoing) == sorted(&right.voters_outgoing)
        && sorted(&left.learners_next) == sorted(&right.learners_next)
        && left.auto_leave == right.auto_leave
}
