//! An open-loop load: requests at a fixed rate over keep-alive connections, each with an id.
//!
//! A request's latency counts from when it was *due*, not from when a connection was free for it:
//! a service that stops for a second is charged for every request of that second (no coordinated
//! omission). Nothing is retried; what fails is an [`Outcome`] with its reason.
//!
//! Runs on threads of its own, on the machine that is told ([`Host`]), so that its sockets are
//! captured there as any client's.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    sync::{Mutex as AsyncMutex, mpsc},
    task::JoinSet,
    time::{MissedTickBehavior, interval_at, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Host, LabError, Ledger,
    ledger::{Answered, Failure, Outcome},
    sample::Answer,
};

/// What to send, how often, to whom.
#[derive(Debug, Clone)]
pub struct Load {
    target: SocketAddr,
    authority: String,
    absolute: bool,
    path: String,
    method: Method,
    body_bytes: usize,
    rate: u32,
    connections: usize,
    patience: Duration,
}

impl Load {
    /// `GET http://authority/` by connecting to `target`.
    pub fn direct(target: SocketAddr, authority: impl Into<String>) -> Self {
        Self {
            target,
            authority: authority.into(),
            absolute: false,
            path: "/".into(),
            method: Method::GET,
            body_bytes: 0,
            rate: 100,
            connections: 16,
            patience: Duration::from_secs(10),
        }
    }

    /// To another port than the service's first.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        if self.absolute {
            self.authority = format!("{}:{port}", self.authority);
        } else {
            self.target.set_port(port);
        }
        self
    }

    /// `GET http://authority/` by an HTTP proxy, as `curl -x` does.
    pub fn via_proxy(proxy: SocketAddr, authority: impl Into<String>) -> Self {
        Self { absolute: true, ..Self::direct(proxy, authority) }
    }

    /// Another path.
    #[must_use]
    pub fn path(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// POST with a body of this length.
    #[must_use]
    pub fn post(mut self, body_bytes: usize) -> Self {
        self.method = Method::POST;
        self.body_bytes = body_bytes;
        self
    }

    /// Requests per second, evenly spaced.
    #[must_use]
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = per_second.max(1);
        self
    }

    /// Connections, and so the most requests in flight; more wait, and their waiting counts.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// How long a request may take before it counts as failed.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts it on a machine; it goes on until stopped.
    ///
    /// # Errors
    /// [`LabError::Io`] without a thread or a runtime.
    pub fn start(self, host: &Host) -> Result<RunningLoad, LabError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LabError::io("start the load's runtime"))?;
        let outcomes = Arc::new(Mutex::new(Vec::new()));
        let (shared, stop, started) = (outcomes.clone(), CancellationToken::new(), Instant::now());
        let run = Run { load: Arc::new(self), outcomes: shared, started };
        let token = stop.clone();
        let thread =
            host.spawn("lab-load", move || runtime.block_on(run.run(token))).map_err(LabError::io("start a load"))?;
        Ok(RunningLoad { outcomes, stop, started, thread: Some(thread) })
    }

    /// Runs it for a while.
    ///
    /// # Errors
    /// As [`Load::start`].
    pub fn run_for(self, host: &Host, duration: Duration) -> Result<LoadReport, LabError> {
        let running = self.start(host)?;
        thread::sleep(duration);
        running.stop()
    }

    /// Sends one request on a connection of its own.
    ///
    /// # Errors
    /// [`LabError`] if it cannot be sent from that machine; what it meets is in the [`Outcome`].
    pub fn once(self, host: &Host) -> Result<Outcome, LabError> {
        host.run(|| -> Result<Outcome, LabError> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(LabError::io("start a request's runtime"))?;
            let run = Run { load: Arc::new(self), outcomes: Arc::default(), started: Instant::now() };
            Ok(runtime.block_on(run.one(&mut None, Duration::ZERO)))
        })?
    }
}

/// A load under way. Dropping it stops it and forgets what it saw.
#[derive(Debug)]
pub struct RunningLoad {
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    stop: CancellationToken,
    started: Instant,
    thread: Option<thread::JoinHandle<std::io::Result<()>>>,
}

impl RunningLoad {
    /// Time since it began: the clock of [`Outcome::at`].
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// What happened so far.
    pub fn report(&self) -> LoadReport {
        LoadReport { outcomes: self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).clone() }
    }

    /// Waits until some answer satisfies `wanted`; gives the time since now, or `None` after `deadline`.
    pub fn wait_for(&self, deadline: Duration, wanted: impl Fn(&Outcome) -> bool) -> Option<Duration> {
        let start = Instant::now();
        let mut read = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner).len();
        while start.elapsed() < deadline {
            {
                let outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
                if outcomes[read..].iter().any(&wanted) {
                    return Some(start.elapsed());
                }
                read = outcomes.len();
            }
            thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// Sends no more, waits for the answers under way, and reports.
    ///
    /// # Errors
    /// [`LabError::Io`] if its thread could not enter its machine.
    pub fn stop(mut self) -> Result<LoadReport, LabError> {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            ended.map_err(LabError::io("run a load on its machine"))?;
        }
        Ok(self.report())
    }
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// What became of all requests of a load.
#[derive(Debug, Clone, Default)]
pub struct LoadReport {
    /// In the order in which they ended.
    pub outcomes: Vec<Outcome>,
}

impl LoadReport {
    /// A ledger to hold against what the backends saw.
    pub fn ledger(&self) -> Ledger {
        Ledger::new(self.outcomes.clone())
    }

    /// The good answers.
    pub fn answered(&self) -> impl Iterator<Item = (&Outcome, &Answered)> {
        self.outcomes.iter().filter_map(|outcome| Some((outcome, outcome.result.as_ref().ok()?)))
    }

    /// The others.
    pub fn failed(&self) -> impl Iterator<Item = (&Outcome, &Failure)> {
        self.outcomes.iter().filter_map(|outcome| Some((outcome, outcome.result.as_ref().err()?)))
    }

    /// The part that was due in a span of the load's clock.
    #[must_use]
    pub fn between(&self, from: Duration, until: Duration) -> Self {
        let due = |outcome: &&Outcome| (from..until).contains(&outcome.at);
        Self { outcomes: self.outcomes.iter().filter(due).cloned().collect() }
    }

    /// The latency that this share (0.5 is the median) of good answers stayed below; zero if none.
    pub fn percentile(&self, share: f64) -> Duration {
        Duration::from_micros(self.latencies().value_at_quantile(share))
    }

    /// The slowest good answer.
    pub fn slowest(&self) -> Duration {
        self.answered().map(|(outcome, _)| outcome.latency).max().unwrap_or_default()
    }

    fn latencies(&self) -> Histogram<u64> {
        let mut histogram = Histogram::new_with_bounds(1, LATENCY_MICROS_MAX, 3).expect("constant bounds are legal");
        for (outcome, _) in self.answered() {
            histogram.saturating_record(outcome.latency.as_micros() as u64);
        }
        histogram
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, failed) = (self.outcomes.len(), self.failed().count());
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let (p50, p99, max) = (self.percentile(0.5), self.percentile(0.99), self.slowest());
        write!(
            f,
            "{all} requests, {failed} failed, p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
            ms(p50),
            ms(p99),
            ms(max)
        )
    }
}

struct Run {
    load: Arc<Load>,
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    started: Instant,
}

type Connection = Option<SendRequest<Full<Bytes>>>;

impl Run {
    async fn run(self, stop: CancellationToken) {
        let run = Arc::new(self);
        let (due, queue) = mpsc::channel::<Duration>(WAITING_MAX);
        let queue = Arc::new(AsyncMutex::new(queue));
        let mut workers = JoinSet::new();
        for _ in 0..run.load.connections {
            let (run, queue) = (run.clone(), queue.clone());
            workers.spawn(async move {
                let mut connection = None;
                loop {
                    let Some(at) = queue.lock().await.recv().await else { return };
                    let outcome = run.one(&mut connection, at).await;
                    run.note(outcome);
                }
            });
        }
        run.tick(due, stop).await;
        // The queue is closed: workers end when it is empty and their last answer is in.
        while workers.join_next().await.is_some() {}
    }

    async fn tick(&self, due: mpsc::Sender<Duration>, stop: CancellationToken) {
        let gap = Duration::from_secs(1) / self.load.rate;
        let mut ticks = interval_at(tokio::time::Instant::from_std(self.started) + gap, gap);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        loop {
            let tick = tokio::select! {
                () = stop.cancelled() => return,
                tick = ticks.tick() => tick,
            };
            // A request counts from when it was due, however long it waits for a connection; but the timer's own
            // grain is nobody's latency.
            let (tick, now) = (tick.into_std(), Instant::now());
            let at = if now.saturating_duration_since(tick) < TIMER_GRAIN { now } else { tick };
            let at = at.saturating_duration_since(self.started);
            if due.try_send(at).is_err() {
                let id = next_id();
                let failure = Failure::Broken("too many requests wait for a connection".into());
                self.note(Outcome { request_id: id, at, latency: Duration::ZERO, result: Err(failure) });
            }
        }
    }

    fn note(&self, outcome: Outcome) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        if outcomes.len() < OUTCOMES_MAX {
            outcomes.push(outcome);
        }
    }

    async fn one(&self, connection: &mut Connection, at: Duration) -> Outcome {
        let request_id = next_id();
        let result = match timeout(self.load.patience, self.exchange(connection, &request_id)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(Failure::Timeout),
        };
        if matches!(result, Err(Failure::Timeout | Failure::Connect(_) | Failure::Broken(_))) {
            *connection = None;
        }
        Outcome { request_id, at, latency: self.started.elapsed().saturating_sub(at), result }
    }

    async fn exchange(&self, connection: &mut Connection, id: &str) -> Result<Answered, Failure> {
        let broken = |error: hyper::Error| Failure::Broken(chain(&error));
        let sender = self.connected(connection).await?;
        let response = sender.send_request(self.request(id)).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| Failure::Broken(error.to_string()))?.to_bytes();
        let start = || String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        if !status.is_success() {
            return Err(Failure::Status { status: status.as_u16(), body: start() });
        }
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| Failure::Foreign(start()))?;
        Ok(answer.into())
    }

    /// The connection if it still lives, else a new one: a server may close an idle one, and no
    /// request was on it.
    async fn connected<'c>(&self, connection: &'c mut Connection) -> Result<&'c mut SendRequest<Full<Bytes>>, Failure> {
        let is_usable = match connection.as_mut() {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !is_usable {
            let refused = |error: &dyn std::error::Error| Failure::Connect(chain(error));
            let stream = TcpStream::connect(self.load.target).await.map_err(|error| refused(&error))?;
            let _ = stream.set_nodelay(true);
            let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
            let (sender, driver) = handshake.map_err(|error| refused(&error))?;
            // Ends when the sender is dropped, at the latest with this load's runtime.
            tokio::spawn(driver);
            *connection = Some(sender);
        }
        connection.as_mut().ok_or_else(|| Failure::Connect("no connection".into()))
    }

    fn request(&self, id: &str) -> Request<Full<Bytes>> {
        let load = &self.load;
        let prefix = if load.absolute { format!("http://{}", load.authority) } else { String::new() };
        Request::builder()
            .method(&load.method)
            .uri(format!("{prefix}{}", load.path))
            .header("host", &load.authority)
            .header("x-request-id", id)
            .body(Full::new(vec![b'x'; load.body_bytes].into()))
            .expect("authorities and paths of a load are written by its author")
    }
}

/// An id that no other request of this machine has.
fn next_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:x}-{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// 20 minutes at 1,000/s; what comes after is sent but not remembered.
const OUTCOMES_MAX: usize = 1_200_000;
/// Timers fire at the next millisecond, and a moment later on a busy machine.
const TIMER_GRAIN: Duration = Duration::from_millis(3);
/// Requests without a connection: 50 s at 200/s.
const WAITING_MAX: usize = 10_000;
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// A minute: six times the default patience.
const LATENCY_MICROS_MAX: u64 = 60_000_000;
