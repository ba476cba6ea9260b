//! Anonymous network namespaces, and code that runs inside them.
//!
//! A namespace is held by a descriptor and by the processes in it. It never gets a name in
//! `/run/netns`: when the lab's process ends, however it ends, the kernel takes the namespace and
//! everything in it (devices, routes, nftables rules) away.
//!
//! Namespaces belong to *threads*. Nothing here moves a thread of the caller: work that must happen
//! inside runs on a thread of its own. Sockets keep the namespace in which they were made.
//! Devices and routes are in [`crate::link`].

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::LabError;

/// A network namespace that lives as long as this value, or a process in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Makes an empty namespace: a loopback device that is down, and nothing else.
    ///
    /// `name` is for messages only.
    ///
    /// # Errors
    /// [`LabError::Kernel`] without CAP_SYS_ADMIN.
    pub fn create(name: impl Into<String>) -> Result<Self, LabError> {
        let name = name.into();
        let file = on_thread("netns-create", || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        })
        .map_err(LabError::kernel(format!("create the network namespace of {name}")))?;
        Ok(Self { name, file })
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor, for `setns`.
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `work` on a thread inside the namespace and waits for it.
    ///
    /// # Errors
    /// [`LabError::Kernel`] if the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let enter = || -> io::Result<T> {
            self.enter()?;
            Ok(work())
        };
        on_thread("netns-run", enter).map_err(LabError::kernel(format!("enter the namespace of {}", self.name)))
    }

    /// Moves the *current thread* into the namespace, for threads that live there for good.
    ///
    /// # Errors
    /// The kernel's, without CAP_SYS_ADMIN.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether this process may make network namespaces; the reason if not.
///
/// # Errors
/// The kernel's refusal.
pub fn permitted() -> io::Result<()> {
    on_thread("netns-probe", || Ok(unshare(CloneFlags::CLONE_NEWNET)?))
}

/// Runs `work` on a fresh thread, so that whatever it does to its namespace ends with it.
fn on_thread<T: Send>(name: &str, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work)?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn two_namespaces_bind_the_same_port_and_the_caller_stays_where_it_was() {
        if let Err(reason) = permitted() {
            println!("SKIPPED: no network namespaces here: {reason}");
            return;
        }
        let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (a, b) = (Netns::create("a").unwrap(), Netns::create("b").unwrap());
        let bind = || TcpListener::bind("0.0.0.0:4711").unwrap();
        let _first = a.run(bind).unwrap();
        let _second = b.run(bind).unwrap();
        assert_eq!(before, std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    }
}
