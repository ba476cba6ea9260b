//! The control connections' way to the network: the router's own sockets.
//!
//! So their keep-alive holds the same NAT mapping open that forwarded packets use. What comes in was picked out by
//! the workers; what goes out leaves by the flow's dial socket if we dialled that address, else by the public port.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use isthmus_tunnel::route::FlowSocket;
use parking_lot::Mutex;
use quinn::{AsyncUdpSocket, UdpPoller};
use quinn_udp::{RecvMeta, Transmit};
use tokio::sync::mpsc;

use crate::router::{ControlDatagram, RouterShared};

/// What the links' QUIC endpoint sends to and receives from.
pub(super) struct LinkSocket {
    router: Arc<RouterShared>,
    incoming: Mutex<mpsc::Receiver<ControlDatagram>>,
    dialled: ArcSwap<Vec<SocketAddr>>,
}

impl LinkSocket {
    pub(super) fn new(router: Arc<RouterShared>, incoming: mpsc::Receiver<ControlDatagram>) -> Arc<Self> {
        Arc::new(Self { router, incoming: Mutex::new(incoming), dialled: ArcSwap::default() })
    }

    /// Addresses that we dial.
    pub(super) fn set_dialled(&self, addresses: Vec<SocketAddr>) {
        self.dialled.store(Arc::new(addresses));
    }
}

impl fmt::Debug for LinkSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkSocket")
    }
}

impl AsyncUdpSocket for LinkSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let dialled = self.dialled.load().contains(&transmit.destination);
        let socket = if dialled { FlowSocket::Dial(0) } else { FlowSocket::Public };
        // A full buffer is loss: forwarded packets share the socket and nobody waits for room on it. Control
        // traffic is sparse and repeats itself.
        match self.router.socket(socket, 0).send(transmit) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            sent => sent,
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut incoming = self.incoming.lock();
        let mut count = 0;
        while count < bufs.len().min(meta.len()) {
            let datagram = match incoming.poll_recv(cx) {
                Poll::Ready(Some(datagram)) => datagram,
                // The router has stopped; QUIC times out.
                Poll::Ready(None) | Poll::Pending => break,
            };
            let length = datagram.payload.len();
            let Some(buffer) = bufs[count].get_mut(..length) else { continue };
            buffer.copy_from_slice(&datagram.payload);
            meta[count] =
                RecvMeta { addr: datagram.from, len: length, stride: length, ecn: datagram.ecn, dst_ip: None };
            count += 1;
        }
        if count == 0 { Poll::Pending } else { Poll::Ready(Ok(count)) }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.router.public_address()
    }

    fn max_transmit_segments(&self) -> usize {
        self.router.socket(FlowSocket::Public, 0).gso_segments()
    }

    fn may_fragment(&self) -> bool {
        self.router.socket(FlowSocket::Public, 0).may_fragment()
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
