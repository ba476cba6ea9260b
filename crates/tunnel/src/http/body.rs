//! A body as it comes off a stream, and the pump that puts one on.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use tokio::task::JoinHandle;

use super::HttpError;
use super::frame::{Event, FRAME_HEADER_LEN, FRAME_LEN_MAX, FrameDecoder, FrameKind, frame_header};
use super::head::{decode_headers, encode_trailers};
use crate::carrier::BoxError;
use crate::stream::{ByteReceiver, ByteSender, ResetCode};

/// As much as is taken from a stream at once; quinn gives what one packet or reassembly holds.
const CHUNK_MAX: usize = 256 * 1024;

/// Reads frames off a stream.
#[derive(Debug)]
pub(super) struct FrameReader {
    pub(super) recv: ByteReceiver,
    decoder: FrameDecoder,
}

impl FrameReader {
    pub(super) fn new(recv: ByteReceiver) -> Self {
        Self { recv, decoder: FrameDecoder::default() }
    }

    /// The next event, `None` at a clean end.
    pub(super) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Event>, HttpError>> {
        loop {
            if let Some(event) = self.decoder.next_event().map_err(HttpError::Protocol)? {
                return Poll::Ready(Ok(Some(event)));
            }
            match ready!(self.recv.poll_read_chunk(cx, CHUNK_MAX)).map_err(HttpError::from_io)? {
                Some(chunk) => self.decoder.push(chunk),
                None if self.decoder.at_boundary() => return Poll::Ready(Ok(None)),
                None => return Poll::Ready(Err(HttpError::Protocol("the stream ended within a frame"))),
            }
        }
    }

    pub(super) async fn event(&mut self) -> Result<Option<Event>, HttpError> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// The stream after its last frame, when it turns into bytes.
    pub(super) fn into_bytes(mut self) -> ByteReceiver {
        self.recv.unread(self.decoder.into_rest());
        self.recv
    }
}

/// A message's body as it arrives, with trailers. Dropped early, the sender is told to stop.
#[derive(Debug)]
pub struct StreamBody {
    reader: Option<FrameReader>,
    /// Still sending the request's body; ends with this response.
    pump: Option<Pump>,
    trailers_seen: bool,
}

impl StreamBody {
    pub(super) fn new(reader: FrameReader, pump: Option<Pump>) -> Self {
        Self { reader: Some(reader), pump, trailers_seen: false }
    }

    pub(super) fn empty() -> Self {
        Self { reader: None, pump: None, trailers_seen: false }
    }

    fn end(&mut self) {
        self.reader = None;
        if let Some(pump) = self.pump.take() {
            pump.finish_on_its_own();
        }
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = self.get_mut();
        let Some(reader) = &mut this.reader else { return Poll::Ready(None) };
        let event = ready!(reader.poll_event(cx));
        let frame = match event {
            Ok(Some(Event::Data(data))) if !this.trailers_seen => return Poll::Ready(Some(Ok(Frame::data(data)))),
            Ok(Some(Event::Trailers(bytes))) if !this.trailers_seen => {
                this.trailers_seen = true;
                match decode_headers(bytes) {
                    Ok(trailers) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                    Err(text) => Some(Err(HttpError::Protocol(text))),
                }
            }
            Ok(Some(_)) => Some(Err(HttpError::Protocol("a frame out of order"))),
            Ok(None) => None,
            Err(error) => Some(Err(error)),
        };
        this.end();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.reader.is_none() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}

/// A task that sends the rest of a request's body. Aborted when dropped, which resets the stream.
#[derive(Debug)]
pub(super) struct Pump(pub(super) Option<JoinHandle<Result<(), PumpError>>>);

impl Pump {
    /// Lets it run on: the response is complete, and the peer stops it if it wants no more.
    fn finish_on_its_own(mut self) {
        // Ends by itself: the body ends, or the peer's STOP_SENDING or the tunnel's end fails its next write.
        drop(self.0.take());
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Why a body was not sent to its end.
#[derive(Debug)]
pub(super) enum PumpError {
    /// The body itself failed.
    Body(BoxError),
    /// The stream did.
    Stream(HttpError),
}

/// Sends `body` to its end and FIN. On any error the stream is reset, for a cut body must not look whole.
pub(super) async fn pump<B>(body: B, sender: &mut ByteSender) -> Result<(), PumpError>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let mut body = std::pin::pin!(body);
    let mut headers = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx).map_err(Into::into)).await {
        let frame = frame.map_err(|error| {
            sender.reset(ResetCode::AppReset);
            PumpError::Body(error)
        })?;
        match frame.into_data() {
            Ok(data) => send_data(data, &mut headers, sender).await.map_err(PumpError::Stream)?,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    let frame = with_header(FrameKind::Trailers, |out| encode_trailers(&trailers, out))
                        .map_err(|error| PumpError::Stream(error.into()))?;
                    sender.write_chunk(frame).await.map_err(|error| PumpError::Stream(HttpError::from_io(error)))?;
                }
            }
        }
    }
    sender.finish();
    Ok(())
}

async fn send_data(mut data: Bytes, headers: &mut BytesMut, sender: &mut ByteSender) -> Result<(), HttpError> {
    while !data.is_empty() {
        let piece = data.split_to(data.len().min(FRAME_LEN_MAX));
        // Headers are cut from one allocation: a stream of small pieces costs one per 256.
        if headers.capacity() < FRAME_HEADER_LEN {
            headers.reserve(256 * FRAME_HEADER_LEN);
        }
        headers.put_slice(&frame_header(FrameKind::Data, piece.len()));
        let header = headers.split().freeze();
        sender.write_chunks(&mut [header, piece]).await.map_err(HttpError::from_io)?;
    }
    Ok(())
}

/// A frame whose content `encode` writes.
pub(super) fn with_header<E>(kind: FrameKind, encode: impl FnOnce(&mut BytesMut) -> Result<(), E>) -> Result<Bytes, E> {
    let mut out = BytesMut::with_capacity(512);
    append_frame(kind, &mut out, encode)?;
    Ok(out.freeze())
}

/// Appends a frame whose content `encode` writes.
pub(super) fn append_frame<E>(
    kind: FrameKind,
    out: &mut BytesMut,
    encode: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    let start = out.len();
    out.put_bytes(0, FRAME_HEADER_LEN);
    encode(out)?;
    let header = frame_header(kind, out.len() - start - FRAME_HEADER_LEN);
    out[start..start + FRAME_HEADER_LEN].copy_from_slice(&header);
    Ok(())
}
