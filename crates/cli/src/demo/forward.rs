//! Brings a gateway's dashboard to this machine's browser: the gateway's loopback is in a namespace of its
//! own, so connections to an address here are carried there, byte for byte.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use isthmus_lab::Host;

/// Connections at once: a browser holds six, and there may be a few browsers.
const CONNECTIONS_MAX: usize = 64;

/// Where the dashboard of a gateway on `host` can be opened from here.
///
/// The threads that carry connections end with the process, which is what ends the demo.
///
/// # Errors
/// The system's, if no port can be bound.
pub fn dashboard(host: &Host, inside: SocketAddr) -> io::Result<SocketAddr> {
    if host.netns().is_none() {
        return Ok(inside);
    }
    // The usual port if it is free: people keep the tab open from one demo to the next.
    let listener = TcpListener::bind(("127.0.0.1", inside.port())).or_else(|_| TcpListener::bind("127.0.0.1:0"))?;
    let outside = listener.local_addr()?;
    let host = host.clone();
    thread::Builder::new().name("demo-dashboard".into()).spawn(move || accept(&listener, &host, inside))?;
    Ok(outside)
}

fn accept(listener: &TcpListener, host: &Host, inside: SocketAddr) {
    let open = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming().flatten() {
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (host, open) = (host.clone(), open.clone());
        let counted = open.clone();
        let carried = thread::Builder::new().name("demo-dashboard".into()).spawn(move || {
            // A gateway that is down (the story kills some) refuses; the browser tries again.
            if let Ok(Ok(server)) = host.run(|| TcpStream::connect(inside)) {
                let _ = carry(&client, &server);
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
        if carried.is_err() {
            counted.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Copies both ways until both have ended.
fn carry(client: &TcpStream, server: &TcpStream) -> io::Result<()> {
    let back = (server.try_clone()?, client.try_clone()?);
    let answers = thread::Builder::new().name("demo-dashboard".into()).spawn(move || copy(&back.0, &back.1))?;
    copy(client, server);
    let _ = answers.join();
    Ok(())
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
