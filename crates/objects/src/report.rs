//! What is wrong with a file, and what was not taken at its word.

use std::fmt;

use serde::Serialize;

/// Where in which file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// The file's name, as given to `read`.
    pub file: String,
    /// The line, from 1; 0 if the problem has none.
    pub line: u32,
    /// The column, from 1.
    pub column: u32,
    /// The field, as `spec.http[0].route[1].weight`; empty for the whole document.
    pub path: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "{}: ", self.path) }
    }
}

/// What sort of problem it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Problem {
    /// Not YAML, or not UTF-8.
    Syntax,
    /// A kind, or a version of one, that is not known.
    UnknownKind,
    /// A field that the kind does not have.
    UnknownField,
    /// A text where a number is wanted, and so on.
    WrongType,
    /// A value that cannot be.
    Impossible,
    /// A field that must be there is not.
    Missing,
    /// A key, a name or an object that is there twice.
    Duplicate,
    /// Known and meaningful, but not served by this version: refused, since ignoring it would mislead.
    NotSupported,
}

impl Problem {
    /// A fixed word for metric labels and status conditions.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Syntax => "syntax",
            Self::UnknownKind => "unknown_kind",
            Self::UnknownField => "unknown_field",
            Self::WrongType => "wrong_type",
            Self::Impossible => "impossible_value",
            Self::Missing => "missing_field",
            Self::Duplicate => "duplicate",
            Self::NotSupported => "not_supported",
        }
    }
}

/// Why a file is refused: one of its problems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{place}{message}; {fix}")]
pub struct Refusal {
    /// Where.
    pub place: Place,
    /// What sort of problem.
    pub problem: Problem,
    /// The value as written, shortened to 64 characters; `None` if something is missing.
    pub value: Option<String>,
    /// What is wrong, with the value.
    pub message: String,
    /// What to do about it.
    pub fix: String,
}

/// Something that holds, but may not do what its writer thinks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// `ISM1001` for a field without effect, `ISM1002` for a deprecated form, `ISM1003` for what other
    /// objects contradict, `ISM1004` for a value that is read in a way of our own.
    pub code: &'static str,
    /// Where.
    pub place: Place,
    /// What, and what to do.
    pub message: String,
}

/// A field without effect.
pub(crate) const NO_EFFECT: &str = "ISM1001";
/// A deprecated form.
pub(crate) const DEPRECATED: &str = "ISM1002";
/// Contradicted by other objects.
pub(crate) const CROSS: &str = "ISM1003";
/// Read in a way of our own.
pub(crate) const READ_AS: &str = "ISM1004";

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} ({})", self.place, self.message, self.code)
    }
}

/// Problems of one file while it is read. Bounded by [`REFUSALS_MAX`].
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) file: String,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) warnings: Vec<Warning>,
}

/// Problems that are reported of one file: nobody repairs more than these before trying again, and a
/// hostile file cannot make the answer large.
pub(crate) const REFUSALS_MAX: usize = 200;

impl Report {
    pub(crate) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), refusals: Vec::new(), warnings: Vec::new() }
    }

    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        if self.refusals.len() < REFUSALS_MAX {
            self.refusals.push(refusal);
        }
    }

    pub(crate) fn warn(&mut self, warning: Warning) {
        if self.warnings.len() < REFUSALS_MAX {
            self.warnings.push(warning);
        }
    }
}
