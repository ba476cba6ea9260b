//! Timeouts, windows and sizes of tunnels, and what quinn is told of them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt};

use super::CidMint;
use super::mint::Generator;

/// With 10 segments a GSO batch must stay below 65,507 bytes, else every send fails silently.
const MTU_MAX: u16 = 6550;
/// What every UDP path must carry (RFC 9000 §14).
const MTU_MIN: u16 = 1200;
/// quinn's own default bound on what it accepts.
const UDP_PAYLOAD_DEFAULT: u16 = 1472;
/// Handshakes waiting to be accepted.
const INCOMING_MAX: usize = 1024;
/// Streams a peer may open at first; each permitted one costs memory at once (45 KiB a tunnel with 100).
pub(super) const STREAMS_FIRST: u32 = 100;
/// Streams it may have at most; then a second tunnel is due.
pub(super) const STREAMS_MAX: u32 = 4096;

/// Settings of a sidecar's tunnels.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// A tunnel that hears nothing for this long is closed (RFC 9000 §10.1).
    pub idle_timeout: Duration,
    /// How often a tunnel with open streams makes sure that it is heard.
    pub keep_alive: Duration,
    /// How long a connection ID is used; must be shorter than the overlap of two key generations.
    pub cid_lifetime: Duration,
    /// Largest UDP payload to try, 1200-6550.
    pub mtu_max: u16,
    /// How long a dial may take.
    pub dial_timeout: Duration,
    /// Bytes of one stream that may wait at the receiver. With more than 2.5 MB, loss can leave 1,024 gaps in a
    /// stream, at which quinn closes the whole connection.
    pub stream_receive_window: u32,
    /// Bytes of all streams that may wait at the receiver.
    pub receive_window: u32,
    /// Bytes that may be unacknowledged.
    pub send_window: u64,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(10),
            cid_lifetime: Duration::from_secs(3600),
            mtu_max: 1452,
            dial_timeout: Duration::from_secs(10),
            stream_receive_window: 2_500_000,
            receive_window: 16_000_000,
            send_window: 16_000_000,
        }
    }
}

impl TunnelConfig {
    pub(super) fn endpoint(&self, mint: &Arc<CidMint>) -> EndpointConfig {
        let mut config = EndpointConfig::default();
        let (mint, lifetime) = (mint.clone(), self.cid_lifetime);
        config.cid_generator(move || Box::new(Generator { mint: mint.clone(), lifetime }));
        if self.mtu_max > UDP_PAYLOAD_DEFAULT {
            config.max_udp_payload_size(self.mtu_max.min(MTU_MAX)).expect("at least 1200");
        }
        config
    }

    pub(super) fn server(&self, tls: Arc<rustls::ServerConfig>) -> io::Result<ServerConfig> {
        let crypto = QuicServerConfig::try_from(tls).map_err(unfit)?;
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(self.transport())).max_incoming(INCOMING_MAX);
        Ok(config)
    }

    pub(super) fn client(&self, tls: Arc<rustls::ClientConfig>) -> io::Result<ClientConfig> {
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(unfit)?));
        config.transport_config(Arc::new(self.transport()));
        Ok(config)
    }

    fn transport(&self) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu_max.clamp(MTU_MIN, MTU_MAX));
        let mut transport = TransportConfig::default();
        transport
            .max_idle_timeout(Some(IdleTimeout::try_from(self.idle_timeout).unwrap_or(VarInt::from_u32(60_000).into())))
            // Kept alive by hand, only while streams are open.
            .keep_alive_interval(None)
            .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_FIRST))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .stream_receive_window(VarInt::from_u32(self.stream_receive_window))
            .receive_window(VarInt::from_u32(self.receive_window))
            .send_window(self.send_window)
            .mtu_discovery_config(Some(discovery))
            // CUBIC and NewReno collapse at 1 % loss (2.6 Mbit/s at 50 ms); quinn's BBR keeps 80 of 100.
            .congestion_controller_factory(Arc::new(BbrConfig::default()));
        transport
    }
}

fn unfit(error: quinn::crypto::rustls::NoInitialCipherSuite) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}
