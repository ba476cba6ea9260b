//! Where a redirected connection was going.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt};

/// The destination that the workload dialled, from the kernel's NAT table; `None` if the connection
/// was made to `local` itself, or was never redirected.
///
/// `local` is the accepted socket's own address; on a socket for both families it may be an IPv4
/// address in IPv6 clothes.
///
/// # Errors
/// What the system says, other than "no such entry".
pub fn original_dst(socket: impl AsFd, local: SocketAddr) -> io::Result<Option<SocketAddr>> {
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    let found = match local {
        SocketAddr::V4(_) => getsockopt(&socket, sockopt::OriginalDst).map(from_v4),
        SocketAddr::V6(_) => getsockopt(&socket, sockopt::Ip6tOriginalDst).map(from_v6),
    };
    match found {
        Ok(destination) if destination == local => Ok(None),
        Ok(destination) => Ok(Some(destination)),
        // No entry, or no connection tracking in this kernel at all: nothing was redirected.
        Err(nix::Error::ENOENT | nix::Error::ENOPROTOOPT | nix::Error::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn from_v4(raw: libc::sockaddr_in) -> SocketAddr {
    let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
    SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into()
}

fn from_v6(raw: libc::sockaddr_in6) -> SocketAddr {
    let ip = Ipv6Addr::from(raw.sin6_addr.s6_addr);
    SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_that_was_not_redirected_has_no_original_destination() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                eprintln!("SKIPPED {address}: this host has no such address");
                continue;
            };
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let local = accepted.local_addr().unwrap();
            assert_eq!(original_dst(&accepted, local).unwrap(), None, "{address}");
        }
    }
}
