//! How the story is told: a line a step for people, one object for machines.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use serde::Serialize;

use crate::render;

/// One step of the story: what happened, what was measured, and whether it held.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// A fixed word.
    pub name: &'static str,
    /// What happened, in one sentence.
    pub text: String,
    /// The figures, for people.
    pub figures: String,
    /// The figure that was judged, in milliseconds.
    pub measured_ms: f64,
    /// Requests that failed meanwhile.
    pub failed: usize,
    /// Whether it is as it must be.
    pub held: bool,
    /// Why not; empty if it held.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
}

impl Step {
    /// A step that took `measured`; it holds if that is at most `limit`.
    pub fn within(name: &'static str, text: impl Into<String>, measured: Duration, limit: Duration) -> Self {
        let held = measured <= limit;
        let why = if held { String::new() } else { format!("more than {}", shown(limit)) };
        Self {
            name,
            text: text.into(),
            figures: shown(measured),
            measured_ms: measured.as_secs_f64() * 1_000.0,
            failed: 0,
            held,
            why,
        }
    }

    /// More figures, behind the judged one.
    #[must_use]
    pub fn and(mut self, figures: impl AsRef<str>) -> Self {
        self.figures = format!("{}, {}", self.figures, figures.as_ref());
        self
    }

    /// How many requests failed meanwhile; more than `allowed` do not hold.
    #[must_use]
    pub fn failures(mut self, failed: usize, sent: usize, allowed: usize) -> Self {
        self.failed = failed;
        self.figures = format!("{}, {failed} of {sent} requests failed", self.figures);
        if failed > allowed {
            self.held = false;
            self.why = format!("more than {allowed} requests failed");
        }
        self
    }

    /// What else must be true.
    #[must_use]
    pub fn only_if(mut self, condition: bool, otherwise: impl Into<String>) -> Self {
        if !condition {
            self.held = false;
            self.why = otherwise.into();
        }
        self
    }
}

/// A duration as people read it.
pub fn shown(duration: Duration) -> String {
    match duration.as_secs_f64() * 1_000.0 {
        ms if ms < 10_000.0 => render::latency_ms(Some(ms)),
        ms => format!("{:.1}s", ms / 1_000.0),
    }
}

/// Where the story goes.
#[derive(Debug)]
pub struct Teller {
    json: bool,
    steps: Vec<Step>,
}

impl Teller {
    /// For people, or for machines.
    pub fn new(json: bool) -> Self {
        Self { json, steps: Vec::new() }
    }

    /// Something that is neither measured nor judged.
    pub fn say(&self, text: &str) {
        if self.json { render::note(text) } else { render::line(text) }
    }

    /// What is about to happen; replaced by its step on a terminal.
    pub fn begin(&self, text: &str) {
        if !self.json && std::io::stdout().is_terminal() {
            let _ = write!(std::io::stdout(), "\r\x1b[2K   {text} …");
            let _ = std::io::stdout().flush();
        }
    }

    /// A step that is done.
    pub fn tell(&mut self, step: Step) {
        if !self.json {
            if std::io::stdout().is_terminal() {
                let _ = write!(std::io::stdout(), "\r\x1b[2K");
            }
            let mark = render::mark(step.held);
            let why = if step.held { String::new() } else { format!("  ← {}", step.why) };
            render::line(&format!(" {mark} {:<62} {}{why}", step.text, step.figures));
        }
        self.steps.push(step);
    }

    /// Whether every step held.
    pub fn all_held(&self) -> bool {
        self.steps.iter().all(|step| step.held)
    }

    /// All that was told.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_holds_only_if_everything_in_it_does() {
        let ms = Duration::from_millis;
        assert!(Step::within("a", "", ms(100), ms(100)).held);
        assert!(!Step::within("a", "", ms(101), ms(100)).held);
        assert!(Step::within("a", "", ms(1), ms(2)).failures(1, 9, 1).held);
        let failed = Step::within("a", "", ms(1), ms(2)).failures(2, 9, 1);
        assert!(!failed.held && failed.why.contains("more than 1"), "{failed:?}");
        assert!(!Step::within("a", "", ms(1), ms(2)).only_if(false, "no answer").held);
    }
}
