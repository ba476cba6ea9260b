//! Puts rules in force through `nft`, in one transaction, and takes them away again.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use super::rules::{Rules, TABLE};

/// Why connections are not captured. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The process may not change the packet filter.
    #[error(
        "capture: transparent needs CAP_NET_ADMIN, which this process does not have; start it as root, \
         give it the capability, or set `capture: explicit` and use the sidecar as an HTTP proxy"
    )]
    Capability,
    /// `nft` is not installed.
    #[error(
        "capture: transparent needs the program `nft`, which is not on the PATH; install the package \
         nftables, or set `capture: explicit` and use the sidecar as an HTTP proxy"
    )]
    Missing,
    /// `nft` could not be started or spoken to.
    #[error("`nft` could not be run")]
    Run(#[source] io::Error),
    /// The kernel refused the rules.
    #[error(
        "the packet filter refused the rules of table inet {TABLE} ({0}); is the kernel's nf_tables with NAT there?"
    )]
    Refused(String),
    /// The group could not be entered.
    #[error("cannot change to group {group}; the process needs CAP_SETGID, or start it with that group")]
    Group {
        /// The group.
        group: u32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl CaptureError {
    /// A fixed word for metric labels and status conditions.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Capability => "no_capability",
            Self::Missing => "nft_missing",
            Self::Run(_) => "nft_failed",
            Self::Refused(_) => "refused",
            Self::Group { .. } => "no_group",
        }
    }
}

/// Rules in force. Dropping it takes them away; a process that is killed leaves them, and the
/// workload's connections are then refused until it is back: never plaintext by accident.
#[derive(Debug)]
pub struct Capture(());

impl Capture {
    /// Puts `rules` in force, in place of those of an earlier run: all of them, or none.
    ///
    /// Runs `nft` and waits for it, some milliseconds: call it at start, before traffic.
    ///
    /// # Errors
    /// [`CaptureError`]; what was in force before then still is.
    pub fn apply(rules: &Rules) -> Result<Self, CaptureError> {
        if !has_net_admin() {
            return Err(CaptureError::Capability);
        }
        nft(&rules.text())?;
        Ok(Self(()))
    }

    /// Takes the rules away.
    ///
    /// # Errors
    /// [`CaptureError`] if they may still be there.
    pub fn remove(self) -> Result<(), CaptureError> {
        std::mem::forget(self);
        nft(&Rules::removal())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Err(error) = nft(&Rules::removal()) {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "rules are left: `nft delete table inet {TABLE}` removes them"
            );
        }
    }
}

/// Changes the group of all threads: sockets made from here on are the sidecar's own to the rules.
///
/// Call it before anything opens a socket. User, capabilities and supplementary groups stay.
///
/// # Errors
/// [`CaptureError::Group`] without `CAP_SETGID`, unless the process has that group already.
pub fn enter_group(group: u32) -> Result<(), CaptureError> {
    let gid = nix::unistd::Gid::from_raw(group);
    if nix::unistd::getegid() == gid {
        return Ok(());
    }
    // Only the effective group: the real one stays what whoever started us gave.
    nix::unistd::setegid(gid).map_err(|error| CaptureError::Group { group, source: error.into() })
}

/// Whether the effective capabilities of this process include `CAP_NET_ADMIN`.
fn has_net_admin() -> bool {
    /// linux/capability.h
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits & (1 << CAP_NET_ADMIN) != 0)
}

fn nft(text: &str) -> Result<(), CaptureError> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => CaptureError::Missing,
        _ => CaptureError::Run(error),
    })?;
    // Rules are far below a pipe's buffer: writing cannot wait for the reader. Dropping it ends the input.
    let written = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let output = child.wait_with_output().map_err(CaptureError::Run)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(CaptureError::Refused(
            said.lines().next().unwrap_or("no reason given").chars().take(200).collect(),
        ));
    }
    written.map_err(CaptureError::Run)
}
