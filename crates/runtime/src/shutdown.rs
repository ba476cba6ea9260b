//! SIGTERM and SIGINT as a [`CancellationToken`]; impatience is respected.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second signal: 128 + SIGINT, as shells report it.
const EXIT_IMPATIENT: i32 = 130;

/// Listens for SIGTERM and SIGINT: the first cancels the returned token, the second ends the process
/// at once with status 130.
///
/// Call once, early, inside a tokio runtime: from here on the signals no longer kill by themselves.
///
/// # Errors
/// If the handlers cannot be installed (the process is out of descriptors).
pub fn on_signals() -> io::Result<CancellationToken> {
    let mut signals =
        Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? };
    let token = CancellationToken::new();
    let cancelled = token.clone();
    // Nobody waits for this task: it lives as long as the process, and the runtime's end ends it.
    tokio::spawn(async move {
        let first = signals.next().await;
        tracing::info!(signal = first, "shutting down; a second signal ends at once");
        cancelled.cancel();
        let second = signals.next().await;
        tracing::warn!(signal = second, "ended before everything was drained");
        std::process::exit(EXIT_IMPATIENT);
    });
    Ok(token)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// The process that the test below sends signals to: it never drains.
    #[tokio::test]
    #[ignore = "started by a_first_signal_cancels_and_a_second_ends_the_process"]
    async fn a_process_that_never_drains() {
        let token = on_signals().unwrap();
        eprintln!("ready");
        token.cancelled().await;
        eprintln!("cancelled");
        std::future::pending::<()>().await;
    }

    fn send(signal: &str, child: &Child) {
        let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    #[test]
    fn a_first_signal_cancels_and_a_second_ends_the_process() {
        let name = "shutdown::tests::a_process_that_never_drains";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--ignored", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut wait_for = |word: &str| assert!(lines.any(|line| line.unwrap() == word), "{word} was never said");
        wait_for("ready");
        send("-TERM", &child);
        wait_for("cancelled");
        send("-INT", &child);
        assert_eq!(child.wait().unwrap().code(), Some(EXIT_IMPATIENT));
    }
}
