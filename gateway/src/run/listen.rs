//! The gateway's listeners: bound at once, so that a taken port is said at the start; served until told to stop.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use isthmus_identity::SharedIdentity;
use isthmus_identity::state::create_dir;
use isthmus_identity::tls::server_config;
use isthmus_wire::discovery::discovery_server::DiscoveryServer;
use isthmus_wire::join::join_server::JoinServer;
use isthmus_wire::operator::operator_server::OperatorServer;
use isthmus_wire::replica::replication_server::ReplicationServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;

use crate::distribution::server::DiscoveryService;
use crate::issue::Issuer;
use crate::join::JoinService;
use crate::operator::OperatorService;
use crate::replication::ReplicationService;
use crate::tls_incoming;

pub(super) async fn bind_tcp(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot bind TCP {address}; is another gateway running?"))
}

pub(super) fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(folder) = path.parent() {
        create_dir(folder)?;
    }
    // A socket left by a killed process is nobody's; one that answers belongs to a running gateway.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("another gateway answers on {}", path.display());
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("cannot bind {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

pub(super) fn serve_operators(
    operator: OperatorService,
    socket: UnixListener,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) {
    let stopped = stop.clone();
    tasks.spawn(async move {
        let incoming = UnixListenerStream::new(socket);
        let server = tonic::transport::Server::builder().add_service(OperatorServer::new(operator));
        let served = server.serve_with_incoming_shutdown(incoming, stopped.cancelled_owned()).await;
        report("operator service", served);
    });
}

pub(super) fn serve_sessions(
    identity: &SharedIdentity,
    issuer: &Issuer,
    discovery: DiscoveryService,
    replication: Option<ReplicationService>,
    listener: TcpListener,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) {
    let config = Arc::new(server_config(identity, issuer.shared(), None, &[b"h2"]));
    let incoming = tls_incoming::accept(listener, move || config.clone(), tasks, stop.clone());
    let stopped = stop.clone();
    tasks.spawn(async move {
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(2)))
            .http2_keepalive_timeout(Some(Duration::from_secs(4)))
            .add_service(DiscoveryServer::new(discovery))
            .add_optional_service(replication.map(ReplicationServer::new));
        let served =
            server.serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopped.cancelled_owned()).await;
        report("session service", served);
    });
}

pub(super) fn serve_joins(
    identity: &SharedIdentity,
    issuer: &Issuer,
    join: JoinService,
    listener: TcpListener,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) {
    let config = Arc::new(server_config(identity, issuer.shared(), None, &[b"isthmus-join/1"]));
    let incoming = tls_incoming::accept(listener, move || config.clone(), tasks, stop.clone());
    let stopped = stop.clone();
    tasks.spawn(async move {
        let server = tonic::transport::Server::builder().add_service(JoinServer::new(join));
        let served =
            server.serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopped.cancelled_owned()).await;
        report("join service", served);
    });
}

fn report(what: &str, served: Result<(), tonic::transport::Error>) {
    if let Err(error) = served {
        tracing::error!(%error, "{what} ended");
    }
}
