//! Log lines on stderr, as text or JSON, with a filter that can be changed while running.

use std::sync::Arc;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Not a filter.
    #[error(
        "log filter {filter:?} is not understood ({cause}); use a level such as `info`, or `warn,isthmus_proxy=debug`"
    )]
    Filter {
        /// As it was given.
        filter: String,
        /// What the parser said.
        cause: String,
    },
    /// A subscriber is already there.
    #[error("logging is already set up in this process")]
    AlreadySet,
}

/// Changes the filter of a running process. Cheap to clone.
#[derive(Clone)]
pub struct LogHandle(Arc<Switch>);

/// `None` asks for the filter, `Some` replaces it; answers with the filter in force.
type Switch = dyn Fn(Option<&str>) -> Result<String, LogError> + Send + Sync;

impl std::fmt::Debug for LogHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LogHandle").field(&self.filter()).finish()
    }
}

impl LogHandle {
    /// The filter in force.
    pub fn filter(&self) -> String {
        (self.0)(None).unwrap_or_default()
    }

    /// Puts `filter` in force at once.
    ///
    /// # Errors
    /// [`LogError::Filter`]; the old filter then stays.
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        (self.0)(Some(filter)).map(drop)
    }
}

/// Sets up logging for the whole process: `filter` in the syntax of `RUST_LOG`.
///
/// # Errors
/// [`LogError`] if the filter is not understood or logging is already set up.
pub fn init(filter: &str, format: LogFormat) -> Result<LogHandle, LogError> {
    let (layer, handle) = reload::Layer::<EnvFilter, Registry>::new(parse(filter)?);
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(true);
    let subscriber = tracing_subscriber::registry().with(layer);
    match format {
        LogFormat::Text => subscriber.with(lines.with_ansi(false)).try_init(),
        LogFormat::Json => subscriber.with(lines.json().flatten_event(true)).try_init(),
    }
    .map_err(|_| LogError::AlreadySet)?;
    Ok(handle_over(handle))
}

fn handle_over(handle: reload::Handle<EnvFilter, Registry>) -> LogHandle {
    LogHandle(Arc::new(move |wanted| match wanted {
        None => Ok(handle.with_current(ToString::to_string).unwrap_or_default()),
        Some(text) => {
            let filter = parse(text)?;
            handle.reload(filter).map_err(|_| LogError::AlreadySet)?;
            Ok(text.to_owned())
        }
    }))
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter)
        .map_err(|error| LogError::Filter { filter: filter.chars().take(64).collect(), cause: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_replaced_at_run_time_and_a_bad_one_leaves_the_old() {
        let (_layer, handle) = reload::Layer::<EnvFilter, Registry>::new(parse("info").unwrap());
        let handle = handle_over(handle);
        handle.set_filter("warn,isthmus_proxy=debug").unwrap();
        assert_eq!(handle.filter(), "isthmus_proxy=debug,warn");
        let error = handle.set_filter("isthmus=shout").expect_err("no such level");
        assert!(error.to_string().contains("isthmus=shout"), "{error}");
        assert_eq!(handle.filter(), "isthmus_proxy=debug,warn");
    }
}
