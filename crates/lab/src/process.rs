//! Starts, watches and ends programs on the lab's machines. No process outlives its owner.
//!
//! A child dies with the lab (`PR_SET_PDEATHSIG`), also when the lab is killed. That signal is tied
//! to the *thread* that started the child, so all children are started by one thread that lives
//! until the end ([`on_starter`]). Blocking: waits poll every few milliseconds.

use std::{
    ffi::{CString, OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::{ffi::OsStrExt, net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Host, LabError};

/// How to start a program: what, with which arguments, as whom.
#[derive(Debug, Clone)]
pub struct Program {
    name: String,
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
        Ok(Process { program: self.clone(), host: host.clone(), log, child, ended: None })
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

    fn spawn(&self, host: &Host, log: &Path) -> Result<Child, LabError> {
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

/// A running (or ended) program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    program: Program,
    host: Host,
    log: PathBuf,
    child: Child,
    ended: Option<ExitStatus>,
}

/// How to know that a program is ready.
#[derive(Debug, Clone)]
pub enum Probe {
    /// A TCP port accepts.
    Tcp(SocketAddr),
    /// `GET path` answers 2xx.
    Http(SocketAddr, String),
    /// A unix socket accepts.
    Unix(PathBuf),
}

impl Process {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.program.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it runs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        self.status().is_none()
    }

    /// How it ended, once it has.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap_or(None);
        }
        self.ended
    }

    /// Waits until it answers the probe, asking from its own machine.
    ///
    /// # Errors
    /// [`LabError::Ended`] at once if it ends, [`LabError::NotReady`] after `deadline`; both with
    /// the end of its log.
    pub fn wait_ready(&mut self, probe: &Probe, deadline: Duration) -> Result<Duration, LabError> {
        let start = Instant::now();
        let host = self.host.clone();
        loop {
            if let Some(status) = self.status() {
                let (name, log, tail) = (self.name().to_owned(), self.log.clone(), self.tail(LINES_ON_FAILURE));
                return Err(LabError::Ended { name, status: status.to_string(), log, tail });
            }
            if host.run(|| probe.ask())? {
                return Ok(start.elapsed());
            }
            if start.elapsed() >= deadline {
                let (name, log, tail) = (self.name().to_owned(), self.log.clone(), self.tail(LINES_ON_FAILURE));
                return Err(LabError::NotReady { name, address: probe.to_string(), waited: deadline, log, tail });
            }
            thread::sleep(POLL);
        }
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) {
        // Asked first: an ended and reaped child's id may belong to another process.
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.pid() as i32), signal);
        }
    }

    /// Kills it at once (SIGKILL) and reaps it.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    /// Stops it in time (SIGTERM), and says how it ended.
    ///
    /// # Errors
    /// [`LabError::StillRunning`] after `deadline`; it goes on running.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus, LabError> {
        self.signal(Signal::SIGTERM);
        self.wait(deadline)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`LabError::StillRunning`] after `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus, LabError> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.status() {
                return Ok(status);
            }
            if start.elapsed() >= deadline {
                let name = self.name().to_owned();
                return Err(LabError::StillRunning { name, pid: self.pid(), waited: deadline });
            }
            thread::sleep(POLL);
        }
    }

    /// Starts it anew with the same arguments on the same machine, killing what still runs.
    ///
    /// # Errors
    /// As [`Program::start`].
    pub fn restart(&mut self) -> Result<(), LabError> {
        self.kill();
        self.child = self.program.spawn(&self.host, &self.log)?;
        self.ended = None;
        Ok(())
    }

    /// Waits until its log holds `text` at least `times` times.
    ///
    /// # Errors
    /// [`LabError::NotReady`] after `deadline`.
    pub fn wait_log(&self, text: &str, times: usize, deadline: Duration) -> Result<(), LabError> {
        let start = Instant::now();
        while fs::read_to_string(&self.log).unwrap_or_default().matches(text).count() < times {
            if start.elapsed() >= deadline {
                let (name, log, tail) = (self.name().to_owned(), self.log.clone(), self.tail(LINES_ON_FAILURE));
                let address = format!("its log with {text:?}");
                return Err(LabError::NotReady { name, address, waited: deadline, log, tail });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Probe {
    /// An HTTP probe.
    pub fn http(address: IpAddr, port: u16, path: &str) -> Self {
        Self::Http(SocketAddr::new(address, port), path.to_owned())
    }

    /// Asks once, from the calling thread's namespace.
    pub fn ask(&self) -> bool {
        match self {
            Self::Tcp(address) => TcpStream::connect_timeout(address, PROBE_TIMEOUT).is_ok(),
            Self::Unix(path) => UnixStream::connect(path).is_ok(),
            Self::Http(address, path) => http_is_ok(*address, path).unwrap_or(false),
        }
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp {address}"),
            Self::Http(address, path) => write!(f, "http://{address}{path}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

fn http_is_ok(address: SocketAddr, path: &str) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    Ok(status.starts_with(b"HTTP/1.1 2"))
}

/// The last lines of a file, as far as its last 16 KiB hold them.
pub fn tail(path: &Path, lines: usize) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_else(|error| format!("(no log: {error})"));
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs `start` on the one thread whose death kills the children: it ends with this process.
fn on_starter<T: Send + 'static>(start: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    type Job = Box<dyn FnOnce() + Send>;
    static STARTER: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let run = move || inbox.into_iter().for_each(|job| job());
        thread::Builder::new().name("lab-starter".into()).spawn(run).ok().map(|_| jobs)
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (answer, answered) = mpsc::channel();
    let job = Box::new(move || {
        let _ = answer.send(start());
    });
    starter.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}

fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: both calls only concern the calling process.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the call: then nobody would send the signal.
        if libc::getppid() as u32 != parent {
            libc::_exit(1);
        }
    }
    Ok(())
}

/// Gives up root for good; keeps the network capabilities across the exec if asked to.
fn become_user(id: u32, net_admin: bool) -> io::Result<()> {
    const CAP_NET_BIND_SERVICE: u32 = 10;
    const CAP_NET_ADMIN: u32 = 12;
    const MASK: u32 = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_NET_ADMIN;
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let check = |answer: libc::c_long| if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on this process, with pointers to locals of the kernel's layout
    // (capget(2): version 3 takes one header and two triples).
    unsafe {
        if net_admin {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1).into())?;
        }
        check(libc::setgroups(0, std::ptr::null()).into())?;
        check(libc::setresgid(id, id, id).into())?;
        check(libc::setresuid(id, id, id).into())?;
        if net_admin {
            let header = Header { version: VERSION_3, pid: 0 };
            let low = Sets { effective: MASK, permitted: MASK, inheritable: MASK };
            let sets = [low, Sets { effective: 0, permitted: 0, inheritable: 0 }];
            check(libc::syscall(libc::SYS_capset, &header, &sets))?;
            for capability in [CAP_NET_BIND_SERVICE, CAP_NET_ADMIN] {
                let raise = libc::PR_CAP_AMBIENT_RAISE;
                check(libc::prctl(libc::PR_CAP_AMBIENT, raise, capability as libc::c_ulong, 0, 0).into())?;
            }
        }
    }
    Ok(())
}

/// A `resolv.conf` of one's own, laid over the machine's.
struct Resolver {
    file: CString,
}

impl Resolver {
    fn prepare(server: IpAddr) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("isthmus-lab-{}-resolv-{server}", std::process::id()));
        fs::write(&path, format!("nameserver {server}\noptions timeout:1 attempts:2\n"))?;
        Ok(Self { file: CString::new(path.as_os_str().as_bytes())? })
    }

    fn mount(&self) -> io::Result<()> {
        let target = c"/etc/resolv.conf";
        let check = |answer: libc::c_int| if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: system calls with NUL-terminated strings that live across them; the mounts are
        // seen by this process only, since its mount namespace is new and private.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()))?;
            check(libc::mount(self.file.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()))
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        // The mount keeps the file's content alive; the name is no longer needed after the exec.
        if let Ok(path) = self.file.to_str() {
            let _ = fs::remove_file(path);
        }
    }
}

const POLL: Duration = Duration::from_millis(10);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
const LINES_ON_FAILURE: usize = 20;
const TAIL_BYTES: u64 = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(name: &str, logs: &Path) -> Process {
        Program::new(name, "/bin/sh").args(["-c", "echo up; exec sleep 60"]).start(&Host::here(), logs).unwrap()
    }

    #[test]
    fn a_killed_process_starts_again_and_appends_to_its_log() {
        let dir = crate::rundir::RunDir::create(&std::env::temp_dir()).unwrap();
        let mut process = sleeper("again", dir.path());
        let first = process.pid();
        process.wait_log("up", 1, Duration::from_secs(5)).unwrap();
        process.kill();
        assert!(!process.is_running());
        process.restart().unwrap();
        assert!(process.is_running());
        assert_ne!(process.pid(), first);
        process.wait_log("up", 2, Duration::from_secs(5)).unwrap();
        process.stop(Duration::from_secs(5)).unwrap();
        assert_eq!(process.tail(5), "up\nup");
    }

    #[test]
    fn a_process_that_ends_early_is_reported_with_its_log() {
        let dir = crate::rundir::RunDir::create(&std::env::temp_dir()).unwrap();
        let program = Program::new("early", "/bin/sh").args(["-c", "echo no key >&2; exit 3"]);
        let mut process = program.start(&Host::here(), dir.path()).unwrap();
        let probe = Probe::Unix("/nonexistent".into());
        let error = process.wait_ready(&probe, Duration::from_secs(5)).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("no key"), "{error}");
    }

    #[test]
    fn dropping_a_process_kills_it() {
        let dir = crate::rundir::RunDir::create(&std::env::temp_dir()).unwrap();
        let process = sleeper("dropped", dir.path());
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }
}
