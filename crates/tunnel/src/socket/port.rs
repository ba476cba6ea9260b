//! A UDP socket as this crate wants it.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

/// What one socket should be able to hold: 40 ms at 1 Gbit/s. Without it bursts are dropped at the receiver
/// (8,700-15,400 of 10 s of bulk were, with the kernel's default).
pub const BUFFER_WANTED: usize = 4 * 1024 * 1024;

/// A bound, non-blocking UDP socket: GSO, GRO and ECN where the kernel has them, never fragmenting.
#[derive(Debug)]
pub struct UdpPort {
    socket: UdpSocket,
    state: UdpSocketState,
    recv_buffer: usize,
    send_buffer: usize,
}

impl UdpPort {
    /// Binds `address`. With `shared`, several sockets may bind it and the kernel spreads flows over them.
    ///
    /// # Errors
    /// As the system says; the address is the caller's to name.
    pub fn bind(address: SocketAddr, shared: bool) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_reuse_port(shared)?;
        socket.bind(&address.into())?;
        Self::from_socket(socket.into())
    }

    /// Takes over a bound socket, as one passed on by an older process.
    ///
    /// # Errors
    /// As the system says.
    pub fn from_socket(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        grow(&socket, libc::SO_RCVBUFFORCE);
        grow(&socket, libc::SO_SNDBUFFORCE);
        // The kernel reports twice what it was asked for; without the right to force, it cuts silently.
        let (mut recv_buffer, mut send_buffer) =
            (state.recv_buffer_size((&socket).into())? / 2, state.send_buffer_size((&socket).into())? / 2);
        if recv_buffer < BUFFER_WANTED || send_buffer < BUFFER_WANTED {
            state.set_recv_buffer_size((&socket).into(), BUFFER_WANTED)?;
            state.set_send_buffer_size((&socket).into(), BUFFER_WANTED)?;
            recv_buffer = state.recv_buffer_size((&socket).into())? / 2;
            send_buffer = state.send_buffer_size((&socket).into())? / 2;
        }
        let port = Self { socket, state, recv_buffer, send_buffer };
        if recv_buffer < BUFFER_WANTED {
            tracing::warn!(
                bytes = recv_buffer,
                wanted = BUFFER_WANTED,
                "UDP receive buffer is small; bursts will be dropped: sysctl -w net.core.rmem_max={BUFFER_WANTED}"
            );
        }
        if port.gso_segments() == 1 || port.gro_segments() == 1 {
            tracing::warn!("UDP segmentation offload is off: expect 2-4 times the CPU per byte");
        }
        Ok(port)
    }

    /// The bound address.
    ///
    /// # Errors
    /// As the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Sends one batch. Errors other than a full socket buffer are the network's and count as loss.
    ///
    /// # Errors
    /// `WouldBlock` if the buffer is full; others (`EMSGSIZE` for one) as the system says.
    pub fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.state.try_send((&self.socket).into(), transmit)
    }

    /// As [`UdpPort::try_send`], but only `WouldBlock` is an error: what QUIC wants, which sees loss by itself.
    ///
    /// # Errors
    /// `WouldBlock` only.
    pub fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.state.send((&self.socket).into(), transmit)
    }

    /// Sends one small datagram; a failure is a lost datagram.
    pub fn send_small(&self, destination: SocketAddr, contents: &[u8]) {
        let transmit = Transmit { destination, ecn: None, contents, segment_size: None, src_ip: None };
        // Probes and notices are repeated by those who wait for them.
        let _ = self.state.try_send((&self.socket).into(), &transmit);
    }

    /// Receives up to `meta.len()` batches.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; else as the system says.
    pub fn recv(&self, bufs: &mut [io::IoSliceMut<'_>], meta: &mut [RecvMeta]) -> io::Result<usize> {
        self.state.recv((&self.socket).into(), bufs, meta)
    }

    /// Datagrams that one send may carry; 1 is without offload.
    pub fn gso_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// Datagrams that one receive may bring; 1 is without offload.
    pub fn gro_segments(&self) -> usize {
        self.state.gro_segments()
    }

    /// Whether the system may still fragment.
    pub fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Receive and send buffer in bytes, for the metric beside [`BUFFER_WANTED`].
    pub fn buffers(&self) -> (usize, usize) {
        (self.recv_buffer, self.send_buffer)
    }

    /// The socket, to wait on.
    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }
}

/// Asks past `net.core.*mem_max`, which needs CAP_NET_ADMIN; without it nothing happens.
fn grow(socket: &UdpSocket, option: libc::c_int) {
    let bytes = BUFFER_WANTED as libc::c_int;
    // SAFETY: the descriptor is open, and the option takes one int.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}
