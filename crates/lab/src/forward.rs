//! A door into a machine of the lab: a port outside that leads to a port inside.
//!
//! For a browser on the developer's desk that wants a dashboard inside a namespace. The listening
//! socket is made where the caller is, the connections to the target where the machine is.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    thread,
};

use tokio::{io::copy_bidirectional, net::TcpStream, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{Host, LabError};

/// An open door. Dropping it closes it, and the connections through it.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<io::Result<()>>>,
}

impl Forward {
    /// Leads `listen` (port 0 for any) to `target` as seen from `host`.
    ///
    /// # Errors
    /// [`LabError::Io`] if the address is taken.
    pub fn open(listen: SocketAddr, host: &Host, target: SocketAddr) -> Result<Self, LabError> {
        let bind = || -> io::Result<(TcpListener, SocketAddr)> {
            let listener = TcpListener::bind(listen)?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bind().map_err(LabError::io(format!("listen on {listen}")))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LabError::io("start a door's runtime"))?;
        let stop = CancellationToken::new();
        let token = stop.clone();
        let thread = host
            .spawn("lab-forward", move || runtime.block_on(serve(listener, target, token)))
            .map_err(LabError::io("start a door's thread"))?;
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener, target: SocketAddr, stop: CancellationToken) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => {
                let Ok((mut near, _)) = accepted else { continue };
                connections.spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    // Either side's error is the other side's end.
                    let _ = copy_bidirectional(&mut near, &mut far).await;
                });
            }
        }
    }
}

/// A browser opens six per page.
const CONNECTIONS_MAX: usize = 256;
