//! Starts, watches and ends programs on the lab's machines. No process outlives its owner.
//!
//! A child dies with the lab (`PR_SET_PDEATHSIG`), also when the lab is killed. That signal is tied
//! to the *thread* that started the child, so all children are started by one thread that lives
//! until the end (`child`). Blocking: waits poll every few milliseconds.

mod child;
mod program;

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

pub use program::Program;

use crate::{Host, LabError};

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
    fn new(program: Program, host: Host, log: PathBuf, child: Child) -> Self {
        Self { program, host, log, child, ended: None }
    }

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
