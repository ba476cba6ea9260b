//! The lab's only files: one directory per run, removed with it.
//!
//! A run that was killed leaves its directory; the next run removes those whose process is gone.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::LabError;

/// A directory for state, configs and logs (0700 unless shared, removed on drop unless kept).
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    /// Makes `BASE/isthmus-lab-PID-N` and removes leftovers of dead runs beside it.
    ///
    /// # Errors
    /// [`LabError::Io`].
    pub fn create(base: &Path) -> Result<Self, LabError> {
        sweep(base);
        let pid = std::process::id();
        for number in 0..DIRS_PER_PROCESS_MAX {
            let path = base.join(format!("{PREFIX}{pid}-{number}"));
            // 0711: daemons under another uid reach their own files by name, nobody lists them.
            match fs::DirBuilder::new().mode(0o711).create(&path) {
                Ok(()) => return Ok(Self { path, keep: false }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(LabError::io(format!("make {}", path.display()))(error)),
            }
        }
        Err(LabError::Full { what: "run directories a process", max: DIRS_PER_PROCESS_MAX })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the directory behind on drop, to be read after a failure; later runs leave it too.
    pub fn keep(&mut self) {
        self.keep = true;
        // Without the marker a later run removes it: a pity, not an error.
        let _ = fs::write(self.path.join(KEPT), b"");
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes the run directories of processes that are gone.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
            && !entry.path().join(KEPT).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

const PREFIX: &str = "isthmus-lab-";
/// Marks a directory that somebody wants to read.
const KEPT: &str = "kept";
/// Tests of one process run side by side, each with a lab of its own.
const DIRS_PER_PROCESS_MAX: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_removes_its_directory_and_those_of_dead_runs_only() {
        let base = std::env::temp_dir().join(format!("rundir-test-{}", std::process::id()));
        // Above the kernel's highest pid.
        let dead = base.join(format!("{PREFIX}{}-0", u32::MAX));
        let alive = base.join(format!("{PREFIX}1-0"));
        let kept = base.join(format!("{PREFIX}{}-1", u32::MAX));
        fs::create_dir_all(kept.join(KEPT)).unwrap();
        for dir in [&dead, &alive] {
            fs::create_dir_all(dir.join("inner")).unwrap();
        }
        let run = RunDir::create(&base).unwrap();
        let path = run.path().to_owned();
        assert!(path.exists() && alive.exists() && kept.exists() && !dead.exists());
        drop(run);
        assert!(!path.exists());
        fs::remove_dir_all(base).unwrap();
    }
}
