//! A request body that can be sent once more, as long as it is small.
//!
//! Keeps what was read, up to [`REPLAY_BYTES_MAX`]; a longer body cannot be replayed and costs nothing more.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use isthmus_tunnel::carrier::{Body, BoxError};
use parking_lot::Mutex;

/// Most of a body that is kept for another try: 1,000 requests in flight hold at most 64 MiB.
pub const REPLAY_BYTES_MAX: usize = 64 * 1024;

/// Gives out the body for each try.
#[derive(Clone)]
pub struct Replay(Arc<Mutex<Shared>>);

struct Shared {
    /// Whatever was not read yet; taken by the try that is running.
    rest: Option<Body>,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// The body was read beyond what can be kept.
    overflowed: bool,
    /// A try that waits for the one before to let go.
    waiting: Option<Waker>,
}

impl Replay {
    /// Around `body`, of which nothing was read yet.
    pub fn new(body: Body) -> Self {
        let ended = body.is_end_stream();
        let rest = Some(body);
        let (kept, trailers) = (Vec::new(), None);
        Self(Arc::new(Mutex::new(Shared {
            rest,
            kept,
            kept_bytes: 0,
            trailers,
            ended,
            overflowed: false,
            waiting: None,
        })))
    }

    /// Whether another try can be given the whole body.
    pub fn can_replay(&self) -> bool {
        !self.0.lock().overflowed
    }

    /// The body, from its start.
    pub fn body(&self) -> Body {
        Body::new(Try { shared: Arc::clone(&self.0), rest: None, position: 0, done: false })
    }
}

struct Try {
    shared: Arc<Mutex<Shared>>,
    rest: Option<Body>,
    position: usize,
    done: bool,
}

impl HttpBody for Try {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        if this.rest.is_none() {
            let mut shared = this.shared.lock();
            if let Some(kept) = shared.kept.get(this.position) {
                this.position += 1;
                return Poll::Ready(Some(Ok(Frame::data(kept.clone()))));
            }
            if shared.ended {
                this.done = true;
                return Poll::Ready(shared.trailers.clone().map(|trailers| Ok(Frame::trailers(trailers))));
            }
            if shared.overflowed {
                return Poll::Ready(Some(Err("the body is too long to be sent again".into())));
            }
            match shared.rest.take() {
                Some(rest) => this.rest = Some(rest),
                None => {
                    shared.waiting = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
        let Some(rest) = &mut this.rest else { return Poll::Pending };
        let frame = ready!(Pin::new(rest).poll_frame(cx));
        this.shared.lock().note(frame.as_ref());
        this.done = matches!(&frame, None | Some(Err(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.rest {
            Some(rest) => rest.is_end_stream(),
            None => {
                let shared = self.shared.lock();
                self.done || (shared.ended && self.position == shared.kept.len() && shared.trailers.is_none())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_some() || self.position > 0 {
            return SizeHint::default();
        }
        let shared = self.shared.lock();
        match &shared.rest {
            _ if shared.ended => SizeHint::with_exact(shared.kept_bytes as u64),
            Some(rest) => match rest.size_hint().exact() {
                Some(exact) => SizeHint::with_exact(shared.kept_bytes as u64 + exact),
                None => SizeHint::default(),
            },
            None => SizeHint::default(),
        }
    }
}

impl Shared {
    fn note(&mut self, frame: Option<&Result<Frame<Bytes>, BoxError>>) {
        match frame {
            None => self.ended = true,
            Some(Err(_)) => self.overflowed = true,
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.kept_bytes += data.len();
                    if self.overflowed || self.kept_bytes > REPLAY_BYTES_MAX {
                        self.overflowed = true;
                        self.kept = Vec::new();
                    } else {
                        self.kept.push(data.clone());
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.trailers = Some(trailers.clone());
                    self.ended = true;
                }
            }
        }
    }
}

impl Drop for Try {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        if let Some(rest) = self.rest.take() {
            shared.rest = Some(rest);
        }
        if let Some(waiting) = shared.waiting.take() {
            waiting.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn body(chunks: Vec<Bytes>) -> Body {
        let mut frames: Vec<Result<Frame<Bytes>, BoxError>> =
            chunks.into_iter().map(|chunk| Ok(Frame::data(chunk))).collect();
        frames.push(Ok(Frame::trailers(HeaderMap::from_iter([(
            http::HeaderName::from_static("grpc-status"),
            http::HeaderValue::from_static("0"),
        )]))));
        Body::new(StreamBody::new(futures_util::stream::iter(frames).boxed()))
    }

    #[tokio::test]
    async fn a_second_try_sends_what_the_first_read_and_the_rest() {
        let replay = Replay::new(body(vec![Bytes::from_static(b"ab"), Bytes::from_static(b"cd")]));
        let mut first = replay.body();
        first.frame().await.expect("a frame").expect("no error");
        drop(first);
        assert!(replay.can_replay());
        let second = replay.body().collect().await.expect("no error");
        assert!(second.trailers().is_some_and(|trailers| trailers.contains_key("grpc-status")));
        assert_eq!(second.to_bytes(), "abcd");
        let third = replay.body().collect().await.expect("no error");
        assert!(third.trailers().is_some());
        assert_eq!(third.to_bytes(), "abcd");
    }

    #[tokio::test]
    async fn a_try_waits_until_the_one_before_lets_go() {
        let replay = Replay::new(body(vec![Bytes::from_static(b"ab"), Bytes::from_static(b"cd")]));
        let mut first = replay.body();
        first.frame().await.expect("a frame").expect("no error");
        let release = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let (second, ()) = tokio::join!(replay.body().collect(), release);
        assert_eq!(second.expect("no error").to_bytes(), "abcd");
    }

    #[tokio::test]
    async fn a_long_body_passes_once_and_is_not_kept() {
        let chunk = Bytes::from(vec![7; 40 * 1024]);
        let replay = Replay::new(body(vec![chunk.clone(), chunk]));
        let first = replay.body().collect().await.expect("no error");
        assert_eq!(first.to_bytes().len(), 80 * 1024);
        assert!(!replay.can_replay());
        assert!(replay.0.lock().kept.is_empty());
    }
}
