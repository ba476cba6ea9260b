//! What a command ends with when it does not succeed: an exit code scripts can rely on, what happened,
//! and what to do next.

use std::fmt;
use std::process::ExitCode;

/// Exit codes; part of the command line's interface, listed in `isthmus --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The mesh or the machine said no.
    Failed = 1,
    /// The command line or a file makes no sense (clap's own code too).
    Usage = 2,
    /// The gateway was not reached.
    Unreachable = 3,
    /// It answered, but what was waited for did not come.
    Waiting = 4,
}

/// A command's failure.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    message: String,
    fix: Option<String>,
    cause: Option<anyhow::Error>,
}

impl Failure {
    /// It failed, and `message` says what.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), fix: None, cause: None }
    }

    /// What to do next.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// What lies behind it; its chain is printed once.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// A chain of errors: the first is what happened, the others are its causes.
    pub fn from_chain(exit: Exit, error: &anyhow::Error) -> Self {
        let mut chain = error.chain().map(ToString::to_string);
        let message = chain.next().unwrap_or_default();
        let causes: Vec<String> = chain.collect();
        let cause = (!causes.is_empty()).then(|| anyhow::anyhow!(causes.join("\n  cause: ")));
        Self { exit, message, fix: None, cause }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        for cause in self.cause.iter().flat_map(anyhow::Error::chain) {
            write!(f, "\n  cause: {cause}")?;
        }
        match &self.fix {
            Some(fix) => write!(f, "\n  fix: {fix}"),
            None => Ok(()),
        }
    }
}

/// Whatever a library complains about, its message first and its sources as causes.
impl<E: std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let message = error.to_string();
        let mut causes = Vec::new();
        let mut source = error.source();
        while let Some(error) = source {
            causes.push(error.to_string());
            source = error.source();
        }
        let cause = (!causes.is_empty()).then(|| anyhow::anyhow!(causes.join(": ")));
        Self { exit: Exit::Failed, message, fix: None, cause }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_why_and_what_to_do() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let failure = Failure::new(Exit::Unreachable, "no gateway").cause(io).fix("start one");
        assert_eq!(failure.to_string(), "error: no gateway\n  cause: no such file\n  fix: start one");
    }

    #[test]
    fn a_library_error_is_printed_once_with_its_sources() {
        let error = isthmus_gateway::config::ConfigError::Read {
            path: "gateway.yaml".into(),
            source: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file"),
        };
        let text = Failure::from(error).to_string();
        assert_eq!(text.matches("no such file").count(), 1, "{text}");
    }
}
