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
