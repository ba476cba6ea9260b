//! Port 15006: captured plaintext to the workload. Refused, unless a PeerAuthentication permits it for the port.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use isthmus_model::authn::{MtlsMode, effective_mode};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::serve;
use crate::capture::original_dst;
use crate::carrier::app::connect;
use crate::copy::{Copied, copy_both};
use crate::metrics::Direction;
use crate::path::DataPath;

/// Connections at once.
const CONNECTIONS_MAX: usize = 4096;
/// Out of descriptors, most likely: a pause lets open connections give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long the workload may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Takes connections until `shutdown`; on return all have ended.
pub async fn run(path: Arc<DataPath>, listener: TcpListener, shutdown: CancellationToken) {
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            () = path.draining.cancelled() => break,
            accepted = listener.accept(), if tasks.len() < CONNECTIONS_MAX => accepted,
            () = tokio::time::sleep(ACCEPT_PAUSE), if tasks.len() >= CONNECTIONS_MAX => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let (path, shutdown) = (Arc::clone(&path), shutdown.clone());
                tasks.spawn(async move {
                    tokio::select! {
                        ended = connection(&path, stream) => if let Err(error) = ended {
                            tracing::debug!(%error, "a plaintext connection ended");
                        },
                        () = shutdown.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn connection(path: &DataPath, mut caller: TcpStream) -> io::Result<()> {
    let _open = path.reports.metrics().connection_opened(Direction::Inbound);
    let dialled = original_dst(&caller, caller.local_addr()?)?;
    let Some(port) = dialled.map(|dialled| dialled.port()).filter(|port| !path.own_ports.contains(port)) else {
        path.reports.metrics().refused(Direction::Inbound, "not_captured");
        serve::reset(&caller);
        return Ok(());
    };
    if effective_mode(&path.mesh.view().peer_authentication, port) == MtlsMode::Strict {
        path.reports.metrics().refused(Direction::Inbound, "plaintext");
        let from = serve::shown(caller.peer_addr());
        tracing::info!(port, from, "plaintext refused: mTLS is STRICT here; a PeerAuthentication may permit it");
        serve::reset(&caller);
        return Ok(());
    }
    let mut workload = match connect((path.own.address, port).into(), CONNECT_TIMEOUT).await {
        Ok(workload) => workload,
        Err(error) => {
            serve::reset(&caller);
            return Err(io::Error::other(error));
        }
    };
    caller.set_nodelay(true)?;
    let result = copy_both(&mut caller, &mut workload, &mut Copied::default()).await;
    if result.is_err() {
        serve::reset(&caller);
        serve::reset(&workload);
    }
    result
}
