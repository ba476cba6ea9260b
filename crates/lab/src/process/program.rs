//! How a program is started: what, where, as whom.

use std::{
    ffi::{OsStr, OsString},
    fs::OpenOptions,
    io,
    net::IpAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{
    Process,
    child::{Resolver, become_user, die_with, on_starter},
};
use crate::{Host, LabError};

/// How to start a program: what, with which arguments, as whom.
#[derive(Debug, Clone)]
pub struct Program {
    pub(super) name: String,
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    user: Option<u32>,
    net_admin: bool,
    resolver: Option<IpAddr>,
}

impl Program {
    /// A program by its binary; `name` is used for its log and in messages.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            args: Vec::new(),
            env: Vec::new(),
            user: None,
            net_admin: false,
            resolver: None,
        }
    }

    /// This very binary, for hidden subcommands.
    ///
    /// # Errors
    /// [`LabError::Io`] if the system does not know its path.
    pub fn itself(name: impl Into<String>) -> Result<Self, LabError> {
        let path = std::env::current_exe().map_err(LabError::io("find the path of this binary"))?;
        Ok(Self::new(name, path))
    }

    /// The same under another name.
    #[must_use]
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it under this uid and gid (needs root).
    #[must_use]
    pub fn user(mut self, id: u32) -> Self {
        self.user = Some(id);
        self
    }

    /// Keeps CAP_NET_ADMIN and CAP_NET_BIND_SERVICE in spite of [`Program::user`]: for a sidecar
    /// that sets its own capture rules.
    #[must_use]
    pub fn net_admin(mut self) -> Self {
        self.net_admin = true;
        self
    }

    /// Lets it ask this name server (port 53) instead of the machine's: `/etc/resolv.conf` is
    /// replaced in a mount namespace of its own (needs root).
    #[must_use]
    pub fn resolver(mut self, server: IpAddr) -> Self {
        self.resolver = Some(server);
        self
    }

    /// Starts it on a machine; its output goes to `LOGS/NAME.log`, appended over restarts.
    ///
    /// # Errors
    /// [`LabError::Start`] or [`LabError::Io`] (log file).
    pub fn start(&self, host: &Host, logs: &Path) -> Result<Process, LabError> {
        let log = logs.join(format!("{}.log", self.name.replace('/', "-")));
        let child = self.spawn(host, &log)?;
        Ok(Process::new(self.clone(), host.clone(), log, child))
    }

    /// Runs it to its end and gives what it said.
    ///
    /// # Errors
    /// [`LabError::Start`].
    pub fn output(&self, host: &Host) -> Result<std::process::Output, LabError> {
        let (program, host) = (self.clone(), host.clone());
        on_starter(move || {
            program.command(&host)?.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
        })
        .and_then(Child::wait_with_output)
        .map_err(|source| LabError::Start { program: self.path.clone(), source })
    }

    pub(super) fn spawn(&self, host: &Host, log: &Path) -> Result<Child, LabError> {
        let output = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .map_err(LabError::io(format!("open {}", log.display())))?;
        let (program, host) = (self.clone(), host.clone());
        on_starter(move || {
            let errors = output.try_clone()?;
            program.command(&host)?.stdin(Stdio::null()).stdout(output).stderr(errors).spawn()
        })
        .map_err(|source| LabError::Start { program: self.path.clone(), source })
    }

    fn command(&self, host: &Host) -> io::Result<Command> {
        let mut command = Command::new(&self.path);
        command.args(&self.args).envs(self.env.iter().map(|(key, value)| (key, value)));
        let parent = std::process::id();
        let host = host.clone();
        let (user, net_admin) = (self.user, self.net_admin);
        let resolver = self.resolver.map(Resolver::prepare).transpose()?;
        let enter = move || {
            if let Some(netns) = host.netns() {
                netns.enter()?;
            }
            if let Some(resolver) = &resolver {
                resolver.mount()?;
            }
            if let Some(id) = user {
                become_user(id, net_admin)?;
            }
            // Last: a change of uid clears it.
            die_with(parent)
        };
        // SAFETY: between fork and exec `enter` makes only system calls, on memory prepared before
        // the fork: it neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Netns, mesh::Capture, netns};

    fn as_sidecar(script: &str) -> Program {
        Program::new("sidecar", "/bin/sh").args(["-c", script]).user(1337)
    }

    fn said(program: &Program, host: &Host) -> String {
        let output = program.output(host).unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned()
    }

    #[test]
    fn a_user_keeps_the_network_capabilities_only_if_asked() {
        if let Err(reason) = netns::permitted() {
            println!("SKIPPED: no root here: {reason}");
            return;
        }
        let script = "id -u; id -G; grep CapEff /proc/self/status";
        let plain = said(&as_sidecar(script), &Host::here());
        assert_eq!(plain, "1337\n1337\nCapEff:\t0000000000000000");
        let admin = said(&as_sidecar(script).net_admin(), &Host::here());
        assert_eq!(admin, "1337\n1337\nCapEff:\t0000000000001400");
    }

    #[test]
    fn a_user_with_the_capability_captures_in_its_namespace() {
        let nft = "nft add table ip lab && nft list tables";
        let has_nft = Capture::best(crate::Mode::Namespaces) == Capture::Transparent;
        if let (Err(_), _) | (_, false) = (netns::permitted(), has_nft) {
            println!("SKIPPED: needs root and nft");
            return;
        }
        let local = IpAddr::from([10, 0, 0, 1]);
        let host = Host::new("a", "w", local, local, None, Some(Netns::create("w").unwrap()));
        assert_eq!(said(&as_sidecar(nft).net_admin(), &host), "table ip lab");
        assert_ne!(said(&as_sidecar(nft), &host), "table ip lab");
    }

    #[test]
    fn a_resolver_of_ones_own_is_seen_by_nobody_else() {
        if let Err(reason) = netns::permitted() {
            println!("SKIPPED: no root here: {reason}");
            return;
        }
        let before = std::fs::read("/etc/resolv.conf").unwrap();
        let program = Program::new("cat", "/bin/cat").arg("/etc/resolv.conf").resolver(IpAddr::from([10, 9, 8, 7]));
        assert!(said(&program, &Host::here()).starts_with("nameserver 10.9.8.7"));
        assert_eq!(std::fs::read("/etc/resolv.conf").unwrap(), before);
    }
}
