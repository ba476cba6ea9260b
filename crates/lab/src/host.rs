//! A machine of the lab: where processes run.

use std::{fmt, io, net::IpAddr, sync::Arc, thread};

use crate::{LabError, Netns};

/// A machine in a cluster. Clones are the same machine.
#[derive(Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    cluster: String,
    local: IpAddr,
    listen: IpAddr,
    public: Option<IpAddr>,
    netns: Option<Netns>,
}

impl Host {
    pub(crate) fn new(
        cluster: &str,
        name: &str,
        local: IpAddr,
        listen: IpAddr,
        public: Option<IpAddr>,
        netns: Option<Netns>,
    ) -> Self {
        let (cluster, name) = (cluster.to_owned(), name.to_owned());
        Self { inner: Arc::new(Inner { name, cluster, local, listen, public, netns }) }
    }

    /// The machine that the lab itself runs on, for programs that need no network of their own.
    pub fn here() -> Self {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        Self::new("", "here", loopback, loopback, None, None)
    }

    /// Its name, unique in the lab: `cluster/name`.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its cluster.
    pub fn cluster(&self) -> &str {
        &self.inner.cluster
    }

    /// The address by which its own cluster reaches it. Overlaps between clusters when they are
    /// namespaces: all of them use 10.0.0.0/16.
    pub fn local(&self) -> IpAddr {
        self.inner.local
    }

    /// The address its servers bind: all addresses of a namespace, or the loopback address that
    /// belongs to this machine.
    pub fn listen(&self) -> IpAddr {
        self.inner.listen
    }

    /// The address by which other clusters reach it; workloads have none.
    pub fn public(&self) -> Option<IpAddr> {
        self.inner.public
    }

    /// Its namespace, if it has one of its own.
    pub fn netns(&self) -> Option<&Netns> {
        self.inner.netns.as_ref()
    }

    /// Runs `work` on a thread that is on this machine, and waits: sockets made there are here.
    ///
    /// # Errors
    /// [`LabError::Kernel`] if the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        match self.netns() {
            Some(netns) => netns.run(work),
            None => Ok(work()),
        }
    }

    /// Starts a thread that is on this machine for its whole life.
    ///
    /// # Errors
    /// The system's, if there is no thread to be had. A namespace that cannot be entered is an
    /// error of the thread's result.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<thread::JoinHandle<io::Result<T>>> {
        let host = self.clone();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Some(netns) = host.netns() {
                netns.enter()?;
            }
            Ok(work())
        })
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} ({})", self.inner.cluster, self.inner.name, self.inner.local)
    }
}
