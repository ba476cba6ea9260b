//! A lab that is killed leaves no process, no namespace, and only a directory that the next one removes.

#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use isthmus_lab::{Lab, Mode, Program};

const VICTIM: &str = "LAB_ORPHANS_VICTIM";

/// Not a test by itself: the process that [`a_killed_lab_leaves_nothing`] starts and kills.
#[test]
fn victim() {
    if std::env::var_os(VICTIM).is_none() {
        println!("SKIPPED: only run by the test that kills it");
        return;
    }
    let (mode, _) = Mode::detect();
    let mut lab = Lab::new(mode, 1).unwrap();
    lab.add_cluster("a").unwrap();
    let host = lab.add_workload("a", "w").unwrap();
    let child = Program::new("child", "/bin/sleep").arg("600").start(&host, lab.dir()).unwrap();
    println!("VICTIM {} {}", child.pid(), lab.dir().display());
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_killed_lab_leaves_nothing() {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["victim", "--exact", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let line =
        lines.map(|line| line.unwrap()).find_map(|line| line.split_once("VICTIM ").map(|(_, rest)| rest.to_owned()));
    let (child, dir) = line.as_ref().and_then(|line| line.split_once(' ')).expect("it says whom it started");
    assert!(is_alive(child) && Path::new(dir).exists());

    victim.kill().unwrap();
    victim.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_alive(child) {
        assert!(Instant::now() < deadline, "process {child} outlives its lab");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(Path::new(dir).exists(), "nobody was left to remove it");
    drop(Lab::new(Mode::Loopback, 1).unwrap());
    assert!(!Path::new(dir).exists(), "the next lab does");
}

/// Whether the process runs; a zombie that nobody reaped yet does not.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}
