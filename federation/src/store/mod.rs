//! What must survive a crash.

/// Why the store cannot be used. The member stops voting and keeps serving what it knows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file is damaged.
    #[error("{file} is damaged: {what}. Restore it with `isthmus store restore --dir {dir}`")]
    Corrupt {
        /// Which file.
        file: String,
        /// Its directory.
        dir: String,
        /// Where and what.
        what: String,
    },
    /// Reading or writing failed; a failed write is never tried again.
    #[error("{file}: {what}")]
    Io {
        /// Which file.
        file: String,
        /// The system's words.
        what: String,
    },
}
