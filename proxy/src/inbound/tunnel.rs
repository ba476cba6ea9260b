//! Tunnels from other clusters: each stream is a request or a TCP connection for the workload.

use std::sync::Arc;

use http_body_util::BodyExt;
use isthmus_identity::{PeerIdentity, SharedTrust};
use isthmus_tunnel::carrier::{Answer, Body};
use isthmus_tunnel::endpoint::{CloseReason, PendingStream};
use isthmus_tunnel::http::{Request, read_request};
use isthmus_tunnel::stream::{ByteStream, StreamHeader, StreamKind};
use isthmus_tunnel::{IncomingTunnel, ResetCode, TunnelEndpoint};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{distrusted, serve};
use crate::copy::{Copied, copy_both};
use crate::path::DataPath;

/// Informational responses of one request that may wait to be passed on.
const INFORMATIONAL_MAX: usize = 4;
/// How long the head of a request may take.
const HEAD_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Takes tunnels until `shutdown`; on return all of their streams have ended.
pub async fn run(
    path: Arc<DataPath>,
    endpoint: TunnelEndpoint<PeerIdentity>,
    trust: SharedTrust,
    trust_changed: watch::Receiver<u64>,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    loop {
        let tunnel = tokio::select! {
            () = shutdown.cancelled() => break,
            tunnel = endpoint.accept() => match tunnel {
                Some(tunnel) => tunnel,
                None => break,
            },
        };
        let (path, trust, changed) = (Arc::clone(&path), trust.clone(), trust_changed.clone());
        let streams = tasks.clone();
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = streams_of(&path, &tunnel, &streams) => {}
                () = distrusted(trust, changed, tunnel.peer()) => {
                    tracing::info!(peer = %tunnel.peer().spiffe, "tunnel closed: its peer is trusted no more");
                    tunnel.close(CloseReason::Denied);
                }
                () = shutdown.cancelled() => {}
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn streams_of(path: &Arc<DataPath>, tunnel: &IncomingTunnel<PeerIdentity>, tasks: &TaskTracker) {
    let peer = Arc::new(tunnel.peer().clone());
    tracing::debug!(peer = %peer.spiffe, cluster = ?peer.cluster, "tunnel accepted");
    while let Some(stream) = tunnel.accept_stream().await {
        // Bounded by the streams that the tunnel permits its peer.
        tasks.spawn(one_stream(Arc::clone(path), Arc::clone(&peer), stream));
    }
}

async fn one_stream(path: Arc<DataPath>, peer: Arc<PeerIdentity>, stream: PendingStream) {
    // A stream without a header is reset by the tunnel.
    let Ok((header, stream)) = stream.header().await else { return };
    match header.kind {
        StreamKind::Http => http(&path, &peer, &header, stream).await,
        StreamKind::Tcp => tcp(&path, &peer, &header, stream).await,
        _ => stream.reset(ResetCode::Refused),
    }
}

async fn tcp(path: &DataPath, peer: &PeerIdentity, header: &StreamHeader, stream: ByteStream) {
    let workload = match serve::admit(path, peer, &header.host, header.port) {
        Ok(served) => serve::dial(path, &served).await,
        Err(code) => Err(code),
    };
    match workload {
        Ok(workload) => serve::copy(path, Some(peer), &header.host, Box::new(stream), workload).await,
        Err(code) => stream.reset(code),
    }
}

async fn http(path: &Arc<DataPath>, peer: &PeerIdentity, header: &StreamHeader, stream: ByteStream) {
    let served = match serve::admit(path, peer, &header.host, header.port) {
        Ok(served) => served,
        Err(code) => return stream.reset(code),
    };
    let Ok(Ok(Request { request, mut responder })) = tokio::time::timeout(HEAD_TIMEOUT, read_request(stream)).await
    else {
        return;
    };
    let request = request.map(|body| Body::new(body.map_err(Into::into)));
    let (informed, mut informational) = mpsc::channel(INFORMATIONAL_MAX);
    // Full: the workload sends more than is worth passing on.
    let inform = move |response| drop(informed.try_send(response));
    let cancelled = responder.cancelled();
    let mut cancelled = std::pin::pin!(cancelled);
    let serving = serve::request(path, peer, &header.host, &served, request, inform);
    let mut serving = std::pin::pin!(serving);
    let mut wanted = true;
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut serving => break answer,
            Some(response) = informational.recv() => if responder.informational(response).await.is_err() { return },
            stopped = &mut cancelled, if wanted => match stopped {
                // The caller wants no answer any more: dropping the request cancels it at the workload.
                Some(_) => return,
                None => wanted = false,
            },
        }
    };
    match answer {
        Ok(Answer::Response(response)) => drop(responder.respond(response).await),
        Ok(Answer::Upgraded(head, mut workload)) => {
            if let Ok(mut caller) = responder.upgrade(head).await {
                // An error resets both by dropping them.
                let _ = copy_both(&mut caller, &mut workload, &mut Copied::default()).await;
            }
        }
        Err(code) => responder.reset(code),
    }
}
