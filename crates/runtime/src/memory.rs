//! Keeps a daemon's memory at what it uses. A sidecar runs beside every workload: its megabytes count hundreds of times.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::time::Duration;

use nix::sys::mman::{MmapAdvise, madvise};

/// By then a daemon has read its config, made its keys and spoken to its peers.
const STARTED_AFTER: Duration = Duration::from_secs(10);

/// Gives the code that only starting needed back, once, a while from now. It stays in the page cache, which is not this
/// process's alone, and comes back page by page if it is run again.
pub async fn release_startup_code() {
    tokio::time::sleep(STARTED_AFTER).await;
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    let Ok(program) = std::env::current_exe() else { return };
    for (start, length) in code_of(&maps, &program.to_string_lossy()) {
        let Some(start) = NonNull::new(start as *mut c_void) else { continue };
        // SAFETY: the range is a mapping of our own program file that nobody can write to, so it holds nothing but
        // the file's bytes: the kernel reads them again when they are needed.
        let released = unsafe { madvise(start, length.get(), MmapAdvise::MADV_DONTNEED) };
        if let Err(error) = released {
            tracing::debug!(%error, "startup code stays mapped");
        }
    }
}

/// The executable mappings of `program` in `maps` (proc(5)): start and length. Those that may be written, or hold
/// relocated data, are none of them.
fn code_of(maps: &str, program: &str) -> Vec<(usize, NonZeroUsize)> {
    let range = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (range, permissions, path) = (words.next()?, words.next()?, words.nth(3)?);
        if permissions != "r-xp" || path != program {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        Some((start, NonZeroUsize::new(end.checked_sub(start)?)?))
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_unwritable_code_is_given_back() {
        let maps = "\
5500-5600 r--p 00000000 fe:00 7 /opt/isthmus
5600-9600 r-xp 00100000 fe:00 7 /opt/isthmus
9600-9700 rw-p 04100000 fe:00 7 /opt/isthmus
a000-b000 r-xp 00000000 fe:00 9 /usr/lib/libc.so.6
c000-d000 rwxp 00000000 00:00 0
";
        let found = code_of(maps, "/opt/isthmus");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0, found[0].1.get()), (0x5600, 0x4000));
        assert!(code_of("nonsense\n", "/opt/isthmus").is_empty());
    }

    /// KiB of this program's code in memory.
    fn resident_code() -> u64 {
        let program = std::env::current_exe().expect("a file");
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
        let mut ours = false;
        let mut sum = 0;
        for line in smaps.lines() {
            if line.contains(" r-xp ") || line.contains(" r--p ") || line.contains(" rw-p ") {
                ours = !code_of(line, &program.to_string_lossy()).is_empty();
            } else if let Some(rss) = line.strip_prefix("Rss:").filter(|_| ours) {
                sum += rss.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
            }
        }
        sum
    }

    #[tokio::test(start_paused = true)]
    async fn code_that_was_given_back_leaves_memory_and_the_program_goes_on() {
        let before = resident_code();
        release_startup_code().await;
        let after = resident_code();
        assert!(after > 0 && after < before, "{before} KiB before, {after} after");
    }
}
