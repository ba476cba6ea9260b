//! What can go wrong while a lab is built or used.

use std::{io, path::PathBuf, time::Duration};

/// Why a lab could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// The kernel refused a namespace, a device or a setting.
    #[error("cannot {what}; the lab needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) for namespaces")]
    Kernel {
        /// What was being done, as a verb phrase.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A netlink request failed.
    #[error("netlink: cannot {what}")]
    Netlink {
        /// What was being done, as a verb phrase.
        what: String,
        /// The answer; boxed, as it is large.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// There is no interface of that name in the namespace.
    #[error("no interface {name} in namespace {netns}")]
    NoInterface {
        /// The interface.
        name: String,
        /// Where it was looked for.
        netns: String,
    },
    /// A cluster that the lab does not have.
    #[error("the lab has no cluster {0}")]
    NoCluster(String),
    /// The lab has no room for more of a kind.
    #[error("a lab holds at most {max} {what}")]
    Full {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A program could not be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The binary.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A process ended while something waited for it to be ready.
    #[error("{name} ended ({status}) before it was ready; the end of {}:\n{tail}", log.display())]
    Ended {
        /// The process.
        name: String,
        /// How it ended.
        status: String,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// A process did not become ready in time.
    #[error("{name} did not answer on {address} within {waited:?}; the end of {}:\n{tail}", log.display())]
    NotReady {
        /// The process.
        name: String,
        /// What was asked.
        address: String,
        /// How long it was asked.
        waited: Duration,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// A process did not end in time.
    #[error("{name} (pid {pid}) did not end within {waited:?}")]
    StillRunning {
        /// The process.
        name: String,
        /// Its id.
        pid: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file, socket or thread of the lab itself.
    #[error("cannot {what}")]
    Io {
        /// What was being done, as a verb phrase.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl LabError {
    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kernel { what: what.into(), source }
    }

    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |source| Self::Netlink { what: what.into(), source: Box::new(source) }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }
}
