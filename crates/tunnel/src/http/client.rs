//! The asking half: one request on one stream.

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode, header};
use http_body::Body;

use super::HttpError;
use super::body::{FrameReader, Pump, PumpError, StreamBody, append_frame, pump};
use super::frame::{Event, FrameKind};
use super::head::{decode_response, encode_request};
use crate::carrier::BoxError;
use crate::stream::{ByteStream, ResetCode};

/// What came back.
#[derive(Debug)]
pub enum Answer {
    /// A response; its body goes on streaming.
    Response(http::Response<StreamBody>),
    /// 101, or 2xx to CONNECT: from here on the stream is bytes.
    Upgraded(http::Response<()>, ByteStream),
}

/// Why a request got no answer.
#[derive(Debug)]
pub enum SendError {
    /// The stream or the peer.
    Http(HttpError),
    /// The request's own body failed.
    Body(BoxError),
}

impl From<HttpError> for SendError {
    fn from(error: HttpError) -> Self {
        Self::Http(error)
    }
}

/// More informational responses than this before the answer are an attack.
const INFORMATIONAL_MAX: usize = 16;

/// Whether the request asks that the stream turn into bytes.
pub(super) fn wants_upgrade(method: &Method, headers: &http::HeaderMap) -> bool {
    *method == Method::CONNECT || headers.contains_key(header::UPGRADE)
}

/// Sends `request` on a fresh stream, `prefix` (the stream header) before it, and waits for the answer's head.
///
/// The request's body is sent on meanwhile and afterwards, for as long as the response's body lives. A request that
/// asks for an upgrade carries no body: its stream stays open for the bytes that follow.
///
/// # Errors
/// [`SendError`]; [`HttpError::not_processed`] says whether another endpoint may be asked.
pub async fn send<B>(
    stream: ByteStream,
    prefix: &[u8],
    request: http::Request<B>,
    on_informational: &mut (dyn FnMut(http::Response<()>) + Send),
) -> Result<Answer, SendError>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let ByteStream { mut send, recv } = stream;
    let (head, body) = request.into_parts();
    let mut first = BytesMut::with_capacity(512);
    first.extend_from_slice(prefix);
    append_frame(FrameKind::Head, &mut first, |out| encode_request(&head, out)).map_err(HttpError::Head)?;
    let mut reader = FrameReader::new(recv);
    // A peer that refuses may stop reading before all is sent; its reason then comes with the answer's direction.
    let sent = send.write_chunk(first.freeze()).await;

    if wants_upgrade(&head.method, &head.headers) {
        let response = read_head(&mut reader, on_informational).await?;
        let upgraded = response.status == StatusCode::SWITCHING_PROTOCOLS
            || (head.method == Method::CONNECT && response.status.is_success());
        if upgraded {
            let stream = ByteStream { send, recv: reader.into_bytes() };
            return Ok(Answer::Upgraded(http::Response::from_parts(response, ()), stream));
        }
        send.finish();
        return Ok(Answer::Response(http::Response::from_parts(response, StreamBody::new(reader, None))));
    }

    let mut running = None;
    if sent.is_ok() {
        if body.is_end_stream() {
            send.finish();
        } else {
            let mut sending = Box::pin(async move { pump(body, &mut send).await });
            // Most bodies are at hand: only one that waits is worth a task. Aborted when the response is dropped.
            match futures_util::poll!(&mut sending) {
                std::task::Poll::Ready(done) => body_failed(done)?,
                std::task::Poll::Pending => running = Some(Pump(Some(tokio::spawn(sending)))),
            }
        }
    }
    let response = await_head(&mut reader, &mut running, on_informational).await?;
    Ok(Answer::Response(http::Response::from_parts(response, StreamBody::new(reader, running))))
}

/// Waits for the head while the body is being sent.
async fn await_head(
    reader: &mut FrameReader,
    running: &mut Option<Pump>,
    on_informational: &mut (dyn FnMut(http::Response<()>) + Send),
) -> Result<http::response::Parts, SendError> {
    let Some(task) = running.as_mut().and_then(|pump| pump.0.as_mut()) else {
        return Ok(read_head(reader, on_informational).await?);
    };
    let head = read_head(reader, on_informational);
    let mut head = std::pin::pin!(head);
    tokio::select! {
        biased;
        head = &mut head => return Ok(head?),
        done = task => if let Ok(done) = done { body_failed(done)? },
    }
    *running = None;
    Ok(head.await?)
}

/// Only a failed body is an error here: if the peer stopped reading, its answer says why.
fn body_failed(done: Result<(), PumpError>) -> Result<(), SendError> {
    match done {
        Err(PumpError::Body(error)) => Err(SendError::Body(error)),
        Err(PumpError::Stream(error @ HttpError::Head(_))) => Err(error.into()),
        Err(PumpError::Stream(_)) | Ok(()) => Ok(()),
    }
}

async fn read_head(
    reader: &mut FrameReader,
    on_informational: &mut (dyn FnMut(http::Response<()>) + Send),
) -> Result<http::response::Parts, HttpError> {
    for _ in 0..INFORMATIONAL_MAX {
        match reader.event().await? {
            Some(Event::Head(bytes)) => return decode_response(bytes).map_err(HttpError::Protocol),
            Some(Event::Informational(bytes)) => {
                let head = decode_response(bytes).map_err(HttpError::Protocol)?;
                on_informational(http::Response::from_parts(head, ()));
            }
            Some(Event::Data(_) | Event::Trailers(_)) => return Err(HttpError::Protocol("a body before its head")),
            // FIN without a word: a sidecar that ended between taking and answering.
            None => return Err(HttpError::Protocol("the stream ended before the response")),
        }
    }
    reader.recv.stop(ResetCode::Internal);
    Err(HttpError::Protocol("too many informational responses"))
}
