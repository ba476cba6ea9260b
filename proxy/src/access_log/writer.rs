//! Takes lines off the data path's hands: a bounded queue, and a thread that writes.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use tokio::sync::oneshot;

use super::format::{Entry, render_json, render_text};
use crate::config::LogFormat;
use crate::metrics::Metrics;

/// Lines waiting at most: a second of 4,096 requests, which is longer than a log reader pauses.
const LINES_MAX: usize = 4096;
/// Bytes waiting at most: 4,096 lines of a usual kilobyte. Long lines must not multiply memory.
const QUEUED_BYTES_MAX: usize = 4 << 20;
/// Lines are written together up to this size: one system call for a burst.
const BATCH_BYTES: usize = 64 << 10;

/// Writes the access log. Cheap to clone; the writing thread ends with the last clone.
#[derive(Debug, Clone)]
pub struct AccessLog {
    queue: SyncSender<Item>,
    queued_bytes: Arc<AtomicUsize>,
    format: LogFormat,
    metrics: Metrics,
}

#[derive(Debug)]
enum Item {
    Line(String),
    /// Everything before it is written when it answers.
    Flush(oneshot::Sender<()>),
}

impl AccessLog {
    /// Starts writing to `sink`, which may block as long as it likes.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(format: LogFormat, sink: impl Write + Send + 'static, metrics: Metrics) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(LINES_MAX);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&queued_bytes);
        // Nobody joins this thread: it may hang in a write to a pipe that is never read, and must not
        // keep the process from ending. `flush` is how an owner waits for its lines.
        thread::Builder::new().name("access-log".into()).spawn(move || write_all(&lines, sink, &left))?;
        Ok(Self { queue, queued_bytes, format, metrics })
    }

    /// Queues the line of `entry`, or drops and counts it where the reader is too slow. Never blocks.
    pub fn log(&self, entry: &Entry<'_>) {
        if self.queued_bytes.load(Relaxed) >= QUEUED_BYTES_MAX {
            return self.metrics.log_line_dropped();
        }
        let line = match self.format {
            LogFormat::Text => render_text(entry),
            LogFormat::Json => render_json(entry),
        };
        let bytes = line.len();
        self.queued_bytes.fetch_add(bytes, Relaxed);
        if self.queue.try_send(Item::Line(line)).is_err() {
            self.queued_bytes.fetch_sub(bytes, Relaxed);
            self.metrics.log_line_dropped();
        }
    }

    /// Waits until all lines logged so far are written, at the end of a process. The caller bounds
    /// the wait. With the queue full it returns at once: its reader is not reading.
    pub async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            let _ = written.await;
        }
    }
}

fn write_all(lines: &Receiver<Item>, mut sink: impl Write, queued_bytes: &AtomicUsize) {
    let mut batch = String::new();
    while let Ok(first) = lines.recv() {
        let mut flushed = Vec::new();
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Line(line) => batch.push_str(&line),
                Item::Flush(done) => flushed.push(done),
            }
            next = if batch.len() < BATCH_BYTES { lines.try_recv().ok() } else { None };
        }
        // A closed pipe or a full disk: the lines are lost, the traffic goes on, and the next batch
        // tries again. A log of the failure would go the same way.
        let _ = sink.write_all(batch.as_bytes()).and_then(|()| sink.flush());
        queued_bytes.fetch_sub(batch.len(), Relaxed);
        batch.clear();
        for done in flushed {
            let _ = done.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc;
    use std::time::Duration;

    use parking_lot::Mutex;
    use prometheus::Registry;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Writes nothing until it is let go.
    struct Stuck(mpsc::Receiver<()>, Memory);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn dropped(registry: &Registry) -> usize {
        let text = isthmus_runtime::metrics::text(registry);
        let line = text.lines().find(|line| line.starts_with("isthmus_proxy_access_log_dropped_total "));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("exported")
    }

    #[tokio::test]
    async fn lines_are_written_in_order() {
        let memory = Memory::default();
        let log = AccessLog::start(LogFormat::Json, memory.clone(), Metrics::new(&Registry::new())).unwrap();
        for path in ["/1", "/2", "/3"] {
            log.log(&Entry { path, ..Entry::default() });
        }
        log.flush().await;
        let written = String::from_utf8(memory.0.lock().clone()).unwrap();
        let paths: Vec<_> = written
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["path"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(paths, ["/1", "/2", "/3"]);
    }

    #[tokio::test]
    async fn a_reader_that_stands_still_costs_lines_and_no_time_or_memory() {
        let (go, stuck) = mpsc::channel();
        let memory = Memory::default();
        let registry = Registry::new();
        let log = AccessLog::start(LogFormat::Text, Stuck(stuck, memory.clone()), Metrics::new(&registry)).unwrap();
        let agent = "x".repeat(10_000);
        let sent = 3 * LINES_MAX;
        for _ in 0..sent {
            log.log(&Entry { user_agent: &agent, path: &agent, ..Entry::default() });
        }
        assert!(log.queued_bytes.load(Relaxed) <= QUEUED_BYTES_MAX + 16 * 1024);
        let lost = dropped(&registry);
        assert!(lost > sent / 2, "{lost} dropped");
        drop(go);
        tokio::time::timeout(Duration::from_secs(20), log.flush()).await.expect("goes on");
        let written = memory.0.lock().iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(written + lost, sent, "every line is written or counted as dropped");
    }
}
