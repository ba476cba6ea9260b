//! Whether the workload takes connections on the ports it serves: asked once a second.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use isthmus_wire::discovery::HealthReport;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often the workload is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long it may take to answer: it is on this host.
const TIMEOUT: Duration = Duration::from_millis(900);
/// Answers missed in a row before a silent port counts as down. One that refuses counts at once.
const MISSED_MAX: u32 = 2;

/// How a port answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    Open,
    Refused,
    Silent,
}

/// Judges probes. Pure.
#[derive(Debug, Default)]
struct Judge {
    missed: u32,
}

impl Judge {
    fn healthy(&mut self, probes: &[Probe]) -> bool {
        if probes.contains(&Probe::Refused) {
            return false;
        }
        self.missed = if probes.contains(&Probe::Silent) { self.missed + 1 } else { 0 };
        self.missed < MISSED_MAX
    }
}

/// Probes what `ports` gives until `shutdown`, and reports changes.
pub async fn run(
    workload: IpAddr,
    ports: impl Fn() -> Vec<u16>,
    report: &watch::Sender<HealthReport>,
    shutdown: CancellationToken,
) {
    let mut judge = Judge::default();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let ports = ports();
        let probes = ports.iter().map(|port| probe(SocketAddr::new(workload, *port)));
        let probes = futures_util::future::join_all(probes).await;
        let healthy = judge.healthy(&probes);
        report.send_if_modified(|report| {
            let changed = report.healthy != healthy;
            if changed {
                tracing::info!(healthy, ?ports, "the workload's health changed");
            }
            report.healthy = healthy;
            changed
        });
    }
}

async fn probe(address: SocketAddr) -> Probe {
    match tokio::time::timeout(TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Probe::Open,
        Ok(Err(_)) => Probe::Refused,
        Err(_) => Probe::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_counts_at_once_and_silence_only_when_it_lasts() {
        let mut judge = Judge::default();
        assert!(judge.healthy(&[]), "nothing served");
        assert!(judge.healthy(&[Probe::Open, Probe::Open]));
        assert!(!judge.healthy(&[Probe::Open, Probe::Refused]));
        assert!(judge.healthy(&[Probe::Open, Probe::Silent]), "missed once");
        assert!(!judge.healthy(&[Probe::Open, Probe::Silent]), "missed twice");
        assert!(judge.healthy(&[Probe::Open, Probe::Open]));
    }
}
