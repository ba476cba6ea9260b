//! The connection of a join: TCP, TLS 1.3 with ALPN `isthmus-join/1`, the peer judged by the token's root.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use isthmus_identity::JoinToken;
use isthmus_identity::tls::{pinned_client_config, refusal, server_name};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::context::innermost;
use crate::failure::{Exit, Failure};

/// What gateways speak here.
const ALPN: &[u8] = b"isthmus-join/1";
/// A connect and a TLS handshake over the worst path worth joining over.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A gateway that answered and proved its root.
pub struct Reached {
    /// As written in the token.
    pub address: String,
    /// TCP's handshake: one round trip.
    pub connect_time: Duration,
    /// The connection.
    pub channel: Channel,
}

/// Tries the token's gateways in turn, each at all of its addresses.
///
/// # Errors
/// Every gateway with the reason why not it.
pub async fn connect(token: &JoinToken) -> Result<Reached, Failure> {
    let tls = TlsConnector::from(Arc::new(pinned_client_config(&token.root_fingerprint, &[ALPN])));
    let mut reasons = Vec::new();
    for gateway in &token.gateways {
        match reach(gateway, &tls).await {
            Ok((stream, connect_time)) => {
                let channel = channel(stream).await?;
                return Ok(Reached { address: gateway.clone(), connect_time, channel });
            }
            Err(reason) => reasons.push(format!("{gateway}: {reason}")),
        }
    }
    let failure = match reasons.is_empty() {
        true => Failure::new(Exit::Unreachable, "the token names no gateway")
            .fix("make it on a gateway that has `advertise` set in its gateway.yaml"),
        false => Failure::new(Exit::Unreachable, "no gateway of the token can be used")
            .cause(anyhow::anyhow!(reasons.join("\n         ")))
            .fix("check that TCP 15443 is open from here, and that the token is of the mesh you mean"),
    };
    Err(failure)
}

async fn reach(gateway: &str, tls: &TlsConnector) -> Result<(TlsStream<TcpStream>, Duration), String> {
    let addresses = lookup_host(gateway).await.map_err(|error| format!("name not resolved: {error}"))?;
    let mut reasons = Vec::new();
    for address in addresses {
        match timeout(HANDSHAKE_TIMEOUT, handshake(address, tls)).await {
            Ok(Ok(reached)) => return Ok(reached),
            Ok(Err(reason)) => reasons.push(format!("{address}: {reason}")),
            Err(_) => reasons.push(format!("{address}: no answer within {} s", HANDSHAKE_TIMEOUT.as_secs())),
        }
    }
    Err(if reasons.is_empty() { "the name has no address".into() } else { reasons.join(", ") })
}

async fn handshake(address: SocketAddr, tls: &TlsConnector) -> Result<(TlsStream<TcpStream>, Duration), String> {
    let started = Instant::now();
    let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
    let connect_time = started.elapsed();
    let stream = tls.connect(server_name(), stream).await.map_err(|error| why(&error))?;
    Ok((stream, connect_time))
}

/// What the verifier refused, in its own words; else what TLS says.
fn why(error: &std::io::Error) -> String {
    let tls = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>());
    match tls.and_then(refusal) {
        Some(refused) => refused.to_string(),
        None => format!("TLS: {}", innermost(error)),
    }
}

/// gRPC over the one stream at hand.
async fn channel(stream: TlsStream<TcpStream>) -> Result<Channel, Failure> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = stream.take().ok_or_else(|| std::io::Error::other("the gateway closed the connection"));
        async move { stream }
    });
    let endpoint = Endpoint::from_static("http://gateway.isthmus.invalid");
    Ok(endpoint.connect_with_connector(connector).await?)
}
