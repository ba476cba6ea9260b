//! HTTP on one stream of a tunnel: heads, data, trailers, informational responses, upgrades.
//!
//! After the stream header come frames ([`frame`]); a body ends with FIN. Upgrade and CONNECT turn the stream into
//! bytes after 101 or 2xx. The client half is [`send`], the server half [`read_request`]. Hop-by-hop headers are the
//! business of whoever speaks HTTP to the application; nothing is added or taken away here.

pub mod body;
pub mod client;
pub mod frame;
pub mod head;
pub mod server;

pub use body::StreamBody;
pub use client::{Answer, SendError, send};
pub use head::HeadError;
pub use server::{Request, Responder, read_request};

use crate::stream::ResetCode;

/// Why a message did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The peer ended the stream.
    #[error("the peer ended the stream: {0}")]
    Reset(ResetCode),
    /// The tunnel is gone.
    #[error("the tunnel is gone")]
    Lost(#[source] std::io::Error),
    /// The peer broke the framing.
    #[error("the peer broke the framing: {0}")]
    Protocol(&'static str),
    /// Our own head is over the limits.
    #[error("the head cannot be sent")]
    Head(#[from] HeadError),
}

impl HttpError {
    /// Whether the peer says that its workload never saw the request.
    pub fn not_processed(&self) -> bool {
        match self {
            Self::Reset(code) => code.not_processed(),
            Self::Head(_) => true,
            Self::Lost(_) | Self::Protocol(_) => false,
        }
    }

    pub(crate) fn from_io(error: std::io::Error) -> Self {
        match crate::stream::reset_code(&error) {
            Some(code) => Self::Reset(code),
            None => Self::Lost(error),
        }
    }
}
