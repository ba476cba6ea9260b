//! The registry's messages on link streams: Raft, forwarded calls, following the log.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use isthmus_federation::member::{CallFuture, MemberHandle, Transport, TransportError};
use isthmus_model::ClusterId;
use isthmus_wire::federation::{Call, CallResult, FollowFrame, FollowRequest, RaftFrame};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::peers::{Class, FrameError, LinkHandle, LinkStream, PeersHandle, read_frame, write_frame};

/// Raft frames that wait for a slow link; Raft repeats what is dropped.
const RAFT_QUEUE: usize = 1_024;
/// A call that takes longer is given up; the caller tries another member.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before the log is followed over another link.
const FOLLOW_RETRY: Duration = Duration::from_millis(200);
/// A follower that hears nothing for this long tries another link; the server answers at least this often.
const FOLLOW_IDLE: Duration = Duration::from_secs(3);

/// The registry's way to other members: over whatever links stand.
#[derive(Default)]
pub struct LinkTransport {
    peers: OnceLock<PeersHandle>,
    raft: Mutex<BTreeMap<ClusterId, (u64, mpsc::Sender<RaftFrame>)>>,
}

impl LinkTransport {
    /// A transport without links: everything is dropped until some are attached.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Uses the links of `peers` from now on.
    pub fn attach(&self, peers: PeersHandle) {
        // Set once, at start; a second call would be the same handle.
        let _ = self.peers.set(peers);
    }
}

impl Transport for LinkTransport {
    fn send(&self, to: ClusterId, frame: RaftFrame) {
        if let Some((_, queue)) = self.raft.lock().get(&to) {
            let _ = queue.try_send(frame);
        }
    }

    fn call(&self, to: ClusterId, call: Call) -> CallFuture {
        let link = self.peers.get().and_then(|peers| peers.link_to(to));
        Box::pin(async move {
            let failed = |reason: String| TransportError { to, reason };
            let link = link.ok_or_else(|| failed("no link to it stands".into()))?;
            let answered = tokio::time::timeout(CALL_TIMEOUT, ask(&link, &call));
            match answered.await {
                Ok(Ok(result)) => Ok(result),
                Ok(Err(error)) => Err(failed(error.to_string())),
                Err(_) => Err(failed(format!("no answer within {CALL_TIMEOUT:?}"))),
            }
        })
    }
}

async fn ask(link: &LinkHandle, call: &Call) -> Result<CallResult, FrameError> {
    let mut stream = link.open_stream(Class::Call).await?;
    write_frame(&mut stream.send, call).await?;
    let _ = stream.send.finish();
    let end = || FrameError::from(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
    read_frame::<CallResult>(&mut stream.recv).await?.ok_or_else(end)
}

/// Sends this member's Raft frames over `link`, until it ends.
pub(super) async fn send_raft(transport: Arc<LinkTransport>, link: LinkHandle) {
    let Ok(mut stream) = link.open_stream(Class::Raft).await else { return };
    let (queue, mut next) = mpsc::channel(RAFT_QUEUE);
    transport.raft.lock().insert(link.id(), (link.number(), queue));
    loop {
        let frame = tokio::select! {
            () = link.closed() => break,
            frame = next.recv() => frame,
        };
        // None: a newer link to the same member has taken over.
        let Some(frame) = frame else { break };
        if write_frame(&mut stream.send, &frame).await.is_err() {
            break;
        }
    }
    let mut raft = transport.raft.lock();
    if raft.get(&link.id()).is_some_and(|(number, _)| *number == link.number()) {
        raft.remove(&link.id());
    }
}

/// Hands a peer's Raft frames to the member.
pub(super) async fn receive_raft(member: MemberHandle, link: LinkHandle, mut stream: LinkStream) {
    loop {
        match read_frame::<RaftFrame>(&mut stream.recv).await {
            Ok(Some(frame)) => {
                if let Err(error) = member.deliver(link.id(), frame).await {
                    tracing::debug!(%error, "raft frame refused");
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(cluster = %link.cluster(), %error, "raft stream ended");
                return;
            }
        }
    }
}

/// Answers one call.
pub(super) async fn answer_call(member: MemberHandle, mut stream: LinkStream) {
    let call = tokio::time::timeout(CALL_TIMEOUT, read_frame::<Call>(&mut stream.recv)).await;
    let Ok(Ok(Some(call))) = call else { return };
    let result = member.answer(call).await;
    if write_frame(&mut stream.send, &result).await.is_ok() {
        let _ = stream.send.finish();
    }
}

/// Serves the log to a follower: one frame for each of its requests, as soon as there is one.
pub(super) async fn serve_follow(member: MemberHandle, link: LinkHandle, mut stream: LinkStream) {
    let mut registry = member.registry();
    while let Ok(Some(request)) = read_frame::<FollowRequest>(&mut stream.recv).await {
        let frame = loop {
            registry.borrow_and_update();
            match member.serve_follow(request.clone()).await {
                Ok(frames) => match frames.into_iter().next() {
                    Some(frame) => break frame,
                    // Nothing new: an empty frame says that this gateway lives.
                    None => match tokio::time::timeout(FOLLOW_IDLE / 2, registry.changed()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return,
                        Err(_) => break FollowFrame::default(),
                    },
                },
                Err(error) => {
                    tracing::debug!(cluster = %link.cluster(), %error, "log not served");
                    return;
                }
            }
        };
        if write_frame(&mut stream.send, &frame).await.is_err() {
            return;
        }
    }
}

/// Follows the committed log over some link whenever the member wants to.
pub(super) async fn follow(member: MemberHandle, peers: PeersHandle, stop: CancellationToken) {
    let mut turn = 0;
    loop {
        let mut status = member.status_changes();
        tokio::select! {
            () = stop.cancelled() => return,
            wanted = status.wait_for(|status| status.wants_follow) => if wanted.is_err() { return },
        }
        let members: Vec<LinkHandle> = peers.links().into_iter().filter(LinkHandle::is_member).collect();
        turn += 1;
        if let Some(link) = members.get(turn % members.len().max(1)) {
            tokio::select! {
                () = stop.cancelled() => return,
                ended = follow_over(&member, link) => if let Err(error) = ended {
                    tracing::debug!(cluster = %link.cluster(), %error, "following the log ended");
                },
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(FOLLOW_RETRY) => {}
        }
    }
}

async fn follow_over(member: &MemberHandle, link: &LinkHandle) -> anyhow::Result<()> {
    let mut stream = link.open_stream(Class::Follow).await?;
    while member.status().wants_follow {
        let request = member.follow_request().await?;
        write_frame(&mut stream.send, &request).await?;
        let frame = tokio::time::timeout(FOLLOW_IDLE, read_frame::<FollowFrame>(&mut stream.recv)).await??;
        let Some(frame) = frame else { return Ok(()) };
        if frame.frame.is_some() {
            member.followed(link.id(), frame).await?;
        }
    }
    Ok(())
}
