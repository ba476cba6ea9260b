//! One line per request or connection, in Istio's default text format or as JSON.
//!
//! Writing never holds up traffic: lines go through a bounded queue to a thread of their own, and a
//! line that finds it full is dropped and counted. Whatever a caller or server chose (path, agent,
//! SNI, ...) is escaped: one event is one line, whatever it contains.

mod escape;
mod format;
mod writer;

pub use format::{Entry, Tunnel, render_json, render_text};
pub use writer::AccessLog;
