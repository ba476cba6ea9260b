//! A daemon's config file: read, as written, as proven. All problems of a file come in one go.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a config file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The text is not what such a config looks like.
    #[error("{path}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and cause.
        message: String,
    },
    /// Values that cannot be.
    #[error("{path}: {}", problems.join("\n  "))]
    Values {
        /// The file.
        path: PathBuf,
        /// Each with path, value and fix.
        problems: Vec<String>,
    },
}

/// The text of `path`.
///
/// # Errors
/// [`ConfigError::Read`].
pub fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Reads `text` as `Raw` and lets `prove` make a config of it, given the file's folder, where relative paths start.
///
/// # Errors
/// [`ConfigError`], with every problem that `prove` has noted.
pub fn parse<Raw: DeserializeOwned, Proven>(
    text: &str,
    path: &Path,
    prove: impl FnOnce(Raw, &Path, &mut Vec<String>) -> Option<Proven>,
) -> Result<Proven, ConfigError> {
    let raw = serde_saphyr::from_str(text)
        .map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })?;
    let mut problems = Vec::new();
    let config = prove(raw, path.parent().unwrap_or(Path::new(".")), &mut problems);
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(ConfigError::Values { path: path.to_owned(), problems }),
    }
}
