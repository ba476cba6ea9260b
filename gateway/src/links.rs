//! stub
use isthmus_federation::member::*;
use isthmus_model::ClusterId;
use isthmus_wire::federation::{Call, RaftFrame};
use std::sync::Arc;
pub struct LinkTransport;
impl LinkTransport {
    pub fn new() -> Arc<Self> {
        Arc::new(Self)
    }
}
impl Transport for LinkTransport {
    fn send(&self, _: ClusterId, _: RaftFrame) {}
    fn call(&self, to: ClusterId, _: Call) -> CallFuture {
        Box::pin(async move { Err(TransportError { to, reason: "x".into() }) })
    }
}
#[derive(Clone)]
pub struct LinksHandle;
impl LinksHandle {
    pub fn table(&self) -> Vec<crate::summary::Link> {
        Vec::new()
    }
}
pub struct LinkGlue {
    pub hub: Arc<crate::hub::Hub>,
    pub sidecars: Arc<crate::distribution::sidecars::Sidecars>,
    pub issuer: Arc<crate::issue::Issuer>,
    pub identity: isthmus_identity::SharedIdentity,
    pub member: MemberHandle,
    pub keys: tokio::sync::watch::Receiver<crate::keys::TunnelKeys>,
    pub facts: crate::cluster_files::ClusterFacts,
    pub replica: u8,
    pub advertised: Vec<String>,
}
impl LinkGlue {
    pub fn start(
        self,
        _: crate::router::Router,
        _: &Arc<LinkTransport>,
        _: &mut tokio::task::JoinSet<()>,
        _: tokio_util::sync::CancellationToken,
    ) -> anyhow::Result<LinksHandle> {
        Ok(LinksHandle)
    }
}
