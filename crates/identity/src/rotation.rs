//! When to renew a certificate: at half its life, then again with a bounded back-off. Sans-IO.

use std::time::Duration;

/// First pause after a failed renewal; doubled up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest pause: a certificate of an hour still gets many tries in its second half.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// The renewal clock of one certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    due: u64,
    failures: u32,
}

impl Renewal {
    /// For a certificate valid from `not_before` to `not_after` (Unix seconds). `jitter` in 0-1 spreads
    /// renewals over a tenth of the life, so that a thousand sidecars do not ask in the same second.
    pub fn new(not_before: u64, not_after: u64, jitter: f64) -> Self {
        let life = not_after.saturating_sub(not_before);
        let spread = (life as f64 / 10.0 * jitter.clamp(0.0, 1.0)) as u64;
        Self { due: (not_before + life / 2).saturating_sub(spread), failures: 0 }
    }

    /// When to renew next, Unix seconds.
    pub fn due(&self) -> u64 {
        self.due
    }

    /// How long until then.
    pub fn wait(&self, now: u64) -> Duration {
        Duration::from_secs(self.due.saturating_sub(now))
    }

    /// The renewal failed: try again later.
    pub fn failed(&mut self, now: u64) {
        let pause = RETRY_MIN.saturating_mul(1 << self.failures.min(6)).min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.due = now + pause.as_secs();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_half_life_and_spread_before_it() {
        assert_eq!(Renewal::new(1_000, 2_000, 0.0).due(), 1_500);
        assert_eq!(Renewal::new(1_000, 2_000, 1.0).due(), 1_400);
    }

    #[test]
    fn failures_back_off_to_a_minute() {
        let mut renewal = Renewal::new(0, 100, 0.0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            renewal.failed(1_000);
            pauses.push(renewal.due() - 1_000);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
    }
}
