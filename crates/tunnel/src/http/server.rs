//! The answering half: one request on one stream.

use bytes::Bytes;
use http_body::Body;

use super::HttpError;
use super::body::{FrameReader, PumpError, StreamBody, pump, with_header};
use super::client::wants_upgrade;
use super::frame::{Event, FrameKind};
use super::head::{decode_request, encode_response};
use crate::carrier::BoxError;
use crate::stream::{ByteReceiver, ByteSender, ByteStream, ResetCode};

/// A request and the way to answer it.
#[derive(Debug)]
pub struct Request {
    /// The request; its body goes on streaming.
    pub request: http::Request<StreamBody>,
    /// Answers it.
    pub responder: Responder,
}

/// Answers one request. Dropped unanswered, the stream is reset with [`ResetCode::Cancelled`].
#[derive(Debug)]
pub struct Responder {
    send: ByteSender,
    /// Kept back from a request that asks for an upgrade.
    recv: Option<ByteReceiver>,
}

/// Reads the request's head off a stream whose header was taken already.
///
/// # Errors
/// [`HttpError`]. The stream is reset by then; a deadline is the caller's.
pub async fn read_request(stream: ByteStream) -> Result<Request, HttpError> {
    let ByteStream { mut send, recv } = stream;
    let mut reader = FrameReader::new(recv);
    let head = match reader.event().await {
        Ok(Some(Event::Head(bytes))) => decode_request(bytes).map_err(HttpError::Protocol),
        Ok(_) => Err(HttpError::Protocol("no request head")),
        Err(error) => Err(error),
    };
    let head = head.inspect_err(|_| send.reset(ResetCode::Internal))?;
    if wants_upgrade(&head.method, &head.headers) {
        let request = http::Request::from_parts(head, StreamBody::empty());
        return Ok(Request { request, responder: Responder { send, recv: Some(reader.into_bytes()) } });
    }
    let request = http::Request::from_parts(head, StreamBody::new(reader, None));
    Ok(Request { request, responder: Responder { send, recv: None } })
}

impl Responder {
    /// Sends an informational response (100, 103) ahead of the answer.
    ///
    /// # Errors
    /// [`HttpError`] if the caller is gone or the head over the limits.
    pub async fn informational(&mut self, response: http::Response<()>) -> Result<(), HttpError> {
        self.head(FrameKind::Informational, &response).await
    }

    /// Sends the response to its end.
    ///
    /// # Errors
    /// [`HttpError`] if the caller is gone; the stream is reset if the body failed, so that the caller sees it cut.
    pub async fn respond<B>(mut self, response: http::Response<B>) -> Result<(), HttpError>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let (head, body) = response.into_parts();
        self.head(FrameKind::Head, &http::Response::from_parts(head, ())).await?;
        match pump(body, &mut self.send).await {
            Ok(()) => Ok(()),
            Err(PumpError::Stream(error)) => Err(error),
            Err(PumpError::Body(_)) => Err(HttpError::Reset(ResetCode::AppReset)),
        }
    }

    /// Sends the head of an upgrade (101, or 2xx to CONNECT); from here on the stream is bytes.
    ///
    /// # Errors
    /// [`HttpError::Protocol`] if the request asked for none; else as [`Responder::informational`].
    pub async fn upgrade(mut self, response: http::Response<()>) -> Result<ByteStream, HttpError> {
        let recv = self.recv.take().ok_or(HttpError::Protocol("the request asked for no upgrade"))?;
        self.head(FrameKind::Head, &response).await?;
        Ok(ByteStream { send: self.send, recv })
    }

    /// Ends the stream without an answer. [`ResetCode::not_processed`] codes promise that the workload saw nothing.
    pub fn reset(mut self, code: ResetCode) {
        self.send.reset(code);
        if let Some(recv) = &mut self.recv {
            recv.stop(code);
        }
    }

    /// Waits until the caller wants no answer any more.
    pub fn cancelled(&self) -> impl Future<Output = Option<ResetCode>> + Send + 'static {
        self.send.stopped()
    }

    async fn head(&mut self, kind: FrameKind, response: &http::Response<()>) -> Result<(), HttpError> {
        let frame = with_header(kind, |out| encode_response(response.status(), response.headers(), out))?;
        self.send.write_chunk(frame).await.map_err(HttpError::from_io)
    }
}
