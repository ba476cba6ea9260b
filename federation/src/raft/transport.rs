//! Raft messages between clusters: read, checked against everything that could make the library panic.
//!
//! The library trusts its messages: an unknown enum number, an entry that contradicts a committed one or a
//! commit beyond the log's end aborts the process. Links are authenticated, but one bad member must not
//! stop the others. Every rule here names what it guards.

use isthmus_model::ClusterId;
use isthmus_wire::federation::RaftFrame;
use prost011::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
    Message, MessageType,
};

use crate::member::FrameError;

/// The version of the frames that this build reads and writes.
pub const FRAME_VERSION: u32 = 1;
/// Longest raft message: what a link frame holds, less its own fields.
pub const MESSAGE_LEN_MAX: usize = 8 * 1024 * 1024 - 1024;
/// Members of a group, joint ones included: 5 voters before, 5 after, and the learners.
const GROUP_MAX: usize = 32;
/// Terms that a message may be ahead: each takes an election, so this is years of them.
const TERM_LEAP_MAX: u64 = 1 << 20;
/// No log of ours is longer; keeps sums of positions from overflowing.
const INDEX_MAX: u64 = 1 << 48;

/// Wraps a message for the link.
pub fn frame(mesh: &str, message: &Message) -> RaftFrame {
    RaftFrame {
        version: FRAME_VERSION,
        mesh: mesh.to_owned(),
        from: message.from,
        to: message.to,
        message: message.encode_to_vec(),
    }
}

/// What the receiver knows, for [`checked`].
#[derive(Debug, Clone, Copy)]
pub struct Receiver<'a> {
    /// Its mesh.
    pub mesh: &'a str,
    /// Its number.
    pub id: u64,
}

/// Reads a frame and checks everything that does not depend on the log.
///
/// # Errors
/// [`FrameError`]; never panics.
pub fn checked(receiver: Receiver<'_>, link: ClusterId, frame: &RaftFrame) -> Result<Message, FrameError> {
    let refuse = |reason, detail: String| FrameError { from: link, reason, detail };
    if frame.version != FRAME_VERSION {
        return Err(refuse("version", format!("frame version {}, this build speaks {FRAME_VERSION}", frame.version)));
    }
    if frame.mesh != receiver.mesh {
        let other: String = frame.mesh.chars().take(64).collect();
        return Err(refuse("mesh", format!("for mesh {other:?}, this is {:?}", receiver.mesh)));
    }
    if frame.from != u64::from(link.0) || frame.to != receiver.id {
        let text = format!("from {} to {} on a link of {link} at {}", frame.from, frame.to, receiver.id);
        return Err(refuse("address", text));
    }
    if frame.message.len() > MESSAGE_LEN_MAX {
        return Err(refuse("length", format!("{} bytes, at most {MESSAGE_LEN_MAX}", frame.message.len())));
    }
    let message = Message::decode(frame.message.as_slice()).map_err(|error| refuse("malformed", error.to_string()))?;
    if message.from != frame.from || message.to != frame.to {
        return Err(refuse("address", format!("message from {} to {}", message.from, message.to)));
    }
    check(&message).map_err(|detail| refuse("malformed", detail))?;
    Ok(message)
}

/// Everything in a message that the library takes on trust, as far as the message alone tells.
fn check(message: &Message) -> Result<(), String> {
    let kind = MessageType::from_i32(message.msg_type).ok_or(format!("message type {}", message.msg_type))?;
    match kind {
        MessageType::MsgAppend
        | MessageType::MsgAppendResponse
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeat
        | MessageType::MsgHeartbeatResponse
        | MessageType::MsgSnapshot
        | MessageType::MsgTimeoutNow => {}
        // Local ones, and those that forward: proposals and reads travel as calls.
        other => return Err(format!("{} does not travel", other.as_str_name())),
    }
    if message.term == 0 {
        return Err("term 0 means a local message".into());
    }
    if message.request_snapshot != 0 {
        return Err("request_snapshot is not in use".into());
    }
    if [message.index, message.commit, message.reject_hint].iter().any(|index| *index > INDEX_MAX) {
        return Err("a position beyond any log".into());
    }
    if kind != MessageType::MsgAppend && !message.entries.is_empty() {
        return Err("entries in a message that carries none".into());
    }
    check_entries(message)?;
    match (&message.snapshot, kind) {
        (Some(snapshot), MessageType::MsgSnapshot) => {
            let meta = snapshot.metadata.as_ref().ok_or("a snapshot without metadata")?;
            if meta.index == 0 || meta.index > INDEX_MAX || meta.term == 0 || meta.term > message.term {
                return Err(format!("snapshot at {} of term {}", meta.index, meta.term));
            }
            check_group(meta.conf_state.as_ref().ok_or("a snapshot without its group")?)
        }
        (None, MessageType::MsgSnapshot) => Err("a snapshot message without one".into()),
        _ => Ok(()),
    }
}

/// Entries follow each other, terms do not fall, and changes of the group can be read.
fn check_entries(message: &Message) -> Result<(), String> {
    let mut last = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != last.0 + 1 || entry.term < last.1 || entry.term == 0 || entry.term > message.term {
            return Err(format!("entry {} of term {} after {} of term {}", entry.index, entry.term, last.0, last.1));
        }
        last = (entry.index, entry.term);
        if EntryType::from_i32(entry.entry_type).ok_or(format!("entry type {}", entry.entry_type))?
            != EntryType::EntryNormal
        {
            conf_change(entry)?;
        }
    }
    Ok(())
}

/// A snapshot's group: the library aborts on one that it cannot rebuild.
pub fn check_group(group: &ConfState) -> Result<(), String> {
    let mut ids: Vec<u64> = group.voters.iter().chain(&group.learners).copied().collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    let sound = !group.voters.is_empty() && ids.len() == count && count <= GROUP_MAX && ids.first() != Some(&0);
    // Snapshots are only written outside joint changes.
    let joint = !group.voters_outgoing.is_empty() || !group.learners_next.is_empty() || group.auto_leave;
    if sound && !joint { Ok(()) } else { Err("a group that cannot be".into()) }
}

/// Reads a change of the group, of either form, refusing what the library would panic on.
///
/// # Errors
/// A text for the log.
pub fn conf_change(entry: &Entry) -> Result<ConfChangeV2, String> {
    let change = match EntryType::from_i32(entry.entry_type) {
        Some(EntryType::EntryConfChangeV2) => {
            ConfChangeV2::decode(entry.data.as_slice()).map_err(|error| error.to_string())?
        }
        Some(EntryType::EntryConfChange) => {
            let one = ConfChange::decode(entry.data.as_slice()).map_err(|error| error.to_string())?;
            ConfChangeType::from_i32(one.change_type).ok_or(format!("change type {}", one.change_type))?;
            let single = ConfChangeSingle { change_type: one.change_type, node_id: one.node_id };
            ConfChangeV2 { changes: vec![single], context: one.context, ..ConfChangeV2::default() }
        }
        other => return Err(format!("not a change of the group: {other:?}")),
    };
    ConfChangeTransition::from_i32(change.transition).ok_or(format!("transition {}", change.transition))?;
    if change.changes.len() > GROUP_MAX {
        return Err(format!("{} changes at once", change.changes.len()));
    }
    for one in &change.changes {
        ConfChangeType::from_i32(one.change_type).ok_or(format!("change type {}", one.change_type))?;
        if one.node_id == 0 {
            return Err("member 0".into());
        }
    }
    Ok(change)
}

/// What the receiver's log knows, for [`fits`].
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// Its term.
    pub term: u64,
    /// Its commit position.
    pub committed: u64,
    /// Its log's last position.
    pub last: u64,
}

/// The rest: what depends on the receiver's own log.
///
/// # Errors
/// A text; the message is then dropped as if the network had lost it.
pub fn fits(message: &Message, own: Standing, term_at: impl Fn(u64) -> Option<u64>) -> Result<(), String> {
    if message.term > own.term.saturating_add(TERM_LEAP_MAX) {
        return Err(format!("term {} after {}", message.term, own.term));
    }
    match MessageType::from_i32(message.msg_type) {
        // "to_commit is out of range": a leader only commits what it knows the follower has.
        Some(MessageType::MsgHeartbeat) if message.commit > own.last => {
            Err(format!("heartbeat commits {} beyond the log's end {}", message.commit, own.last))
        }
        // An acknowledgement beyond the leader's own log would have it read past its end.
        Some(MessageType::MsgAppendResponse) if !message.reject && message.index > own.last => {
            Err(format!("acknowledges {} beyond the log's end {}", message.index, own.last))
        }
        // "entry conflict with committed entry": committed is committed, whatever a leader says.
        Some(MessageType::MsgAppend) => {
            let clash = |entry: &&Entry| {
                entry.index <= own.committed && term_at(entry.index).is_some_and(|term| term != entry.term)
            };
            match message.entries.iter().find(clash) {
                Some(entry) => Err(format!("entry {} contradicts a committed one", entry.index)),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{Snapshot, SnapshotMetadata};

    use super::*;

    const OWN: Receiver<'_> = Receiver { mesh: "m", id: 1 };

    fn append() -> Message {
        let entry = Entry { index: 6, term: 3, ..Entry::default() };
        let msg_type = MessageType::MsgAppend as i32;
        Message { msg_type, from: 2, to: 1, term: 3, index: 5, log_term: 2, entries: vec![entry], ..Message::default() }
    }

    fn take(message: &Message) -> Result<Message, FrameError> {
        checked(OWN, ClusterId(2), &frame("m", message))
    }

    #[test]
    fn a_sound_message_passes() {
        assert_eq!(take(&append()).unwrap(), append());
    }

    #[test]
    fn alien_frames_are_refused_each_by_its_reason() {
        let refused = |frame: &RaftFrame, link| checked(OWN, ClusterId(link), frame).unwrap_err().reason;
        let sound = frame("m", &append());
        assert_eq!(refused(&RaftFrame { mesh: "other".into(), ..sound.clone() }, 2), "mesh");
        assert_eq!(refused(&RaftFrame { version: 9, ..sound.clone() }, 2), "version");
        assert_eq!(refused(&sound, 3), "address", "sent over another cluster's link");
        assert_eq!(refused(&RaftFrame { message: vec![0xff; 9], ..sound.clone() }, 2), "malformed");
        let inner = Message { from: 7, ..append() };
        let smuggled = RaftFrame { message: inner.encode_to_vec(), ..sound };
        assert_eq!(refused(&smuggled, 2), "address");
    }

    #[test]
    fn whatever_the_library_would_panic_on_is_refused() {
        let entry = |index, term, entry_type, data: &[u8]| Entry {
            index,
            term,
            entry_type,
            data: data.to_vec(),
            ..Entry::default()
        };
        let with = |entry| Message { entries: vec![entry], ..append() };
        let unknown_change =
            ConfChangeV2 { changes: vec![ConfChangeSingle { change_type: 77, node_id: 4 }], ..ConfChangeV2::default() };
        let snapshot = |index, voters: &[u64], outgoing: &[u64]| {
            let group =
                ConfState { voters: voters.to_vec(), voters_outgoing: outgoing.to_vec(), ..ConfState::default() };
            let metadata = SnapshotMetadata { index, term: 3, conf_state: Some(group) };
            let snapshot = Snapshot { metadata: Some(metadata), data: vec![] };
            let msg_type = MessageType::MsgSnapshot as i32;
            Message { msg_type, snapshot: Some(snapshot), entries: vec![], ..append() }
        };
        let cases = [
            ("unknown type", Message { msg_type: 99, ..append() }),
            ("local type", Message { msg_type: MessageType::MsgHup as i32, entries: vec![], ..append() }),
            ("forwarded proposal", Message { msg_type: MessageType::MsgPropose as i32, ..append() }),
            ("term 0", Message { term: 0, ..append() }),
            ("index near overflow", Message { index: u64::MAX, ..append() }),
            ("snapshot requested", Message { request_snapshot: 4, ..append() }),
            ("gap", with(entry(9, 3, 0, b""))),
            ("term falls", with(entry(6, 1, 0, b""))),
            ("term ahead of the message", with(entry(6, 4, 0, b""))),
            ("unknown entry type", with(entry(6, 3, 42, b""))),
            ("change that cannot be read", with(entry(6, 3, 2, b"\xff\xff"))),
            ("unknown change", with(entry(6, 3, 2, &unknown_change.encode_to_vec()))),
            ("empty group", snapshot(9, &[], &[])),
            ("member 0", snapshot(9, &[0, 1], &[])),
            ("member twice", snapshot(9, &[1, 1], &[])),
            ("joint group", snapshot(9, &[1], &[2])),
            ("snapshot at 0", snapshot(0, &[1], &[])),
        ];
        for (what, message) in cases {
            assert_eq!(take(&message).unwrap_err().reason, "malformed", "{what}");
        }
        take(&snapshot(9, &[1, 2], &[])).unwrap();
    }

    #[test]
    fn messages_that_contradict_the_log_are_dropped() {
        let own = Standing { term: 3, committed: 6, last: 8 };
        let term_at = |index| (index <= 8).then_some(2);
        assert!(fits(&append(), own, term_at).is_err(), "another term at a committed position");
        let heartbeat =
            |commit| Message { msg_type: MessageType::MsgHeartbeat as i32, commit, entries: vec![], ..append() };
        assert!(fits(&heartbeat(9), own, term_at).is_err());
        assert!(fits(&heartbeat(8), own, term_at).is_ok());
        let acknowledge = Message { msg_type: MessageType::MsgAppendResponse as i32, index: 9, ..append() };
        assert!(fits(&acknowledge, own, term_at).is_err());
        assert!(fits(&Message { term: 1 << 40, ..append() }, own, term_at).is_err());
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut rng = crate::rng::Rng::new(7);
        let sound = append().encode_to_vec();
        for _ in 0..20_000 {
            let mut bytes = sound.clone();
            for _ in 0..=rng.below(6) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.draw() as u8;
            }
            bytes.truncate(rng.below(bytes.len() as u64 + 1) as usize);
            let _ = checked(OWN, ClusterId(2), &RaftFrame { message: bytes, ..frame("m", &append()) });
        }
    }
}
