//! The frames of an HTTP stream: one byte of type, three of length (big-endian), then that many bytes.
//!
//! Pure, and a fuzz target. A DATA frame is passed on as its bytes arrive, so its length bounds no buffer; heads and
//! trailers are collected whole and bounded by [`HEAD_LEN_MAX`].

use bytes::{Buf, Bytes, BytesMut};

/// Longest encoded head or trailer section.
pub const HEAD_LEN_MAX: usize = 64 * 1024;
/// Longest frame that three bytes can say.
pub const FRAME_LEN_MAX: usize = (1 << 24) - 1;
/// Type and length.
pub const FRAME_HEADER_LEN: usize = 4;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// The head of the request, or of the final response.
    Head = 1,
    /// A piece of the body.
    Data = 2,
    /// Trailers; nothing but FIN follows.
    Trailers = 3,
    /// The head of an informational response.
    Informational = 4,
}

/// What the decoder found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A whole head.
    Head(Bytes),
    /// A whole informational head.
    Informational(Bytes),
    /// Some bytes of the body.
    Data(Bytes),
    /// The whole trailer section.
    Trailers(Bytes),
}

/// The bytes that announce a frame of `length`, which is at most [`FRAME_LEN_MAX`].
pub fn frame_header(kind: FrameKind, length: usize) -> [u8; FRAME_HEADER_LEN] {
    debug_assert!(length <= FRAME_LEN_MAX);
    let length = (length as u32).to_be_bytes();
    [kind as u8, length[1], length[2], length[3]]
}

/// Takes chunks as they arrive and gives frames out; keeps at most one head and one chunk.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    chunk: Bytes,
    /// A frame header or head that began in an earlier chunk.
    partial: BytesMut,
    /// What is left of the current DATA frame.
    data_left: usize,
}

impl FrameDecoder {
    /// Hands over the next chunk. Call only when [`FrameDecoder::next_event`] has returned `None`.
    pub fn push(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty());
        self.chunk = chunk;
    }

    /// Whether the stream may end here: between two frames.
    pub fn at_boundary(&self) -> bool {
        self.chunk.is_empty() && self.partial.is_empty() && self.data_left == 0
    }

    /// What is left after the last frame, when the stream turns into bytes.
    pub fn into_rest(mut self) -> Bytes {
        if self.partial.is_empty() {
            return self.chunk;
        }
        self.partial.extend_from_slice(&self.chunk);
        self.partial.freeze()
    }

    /// The next event, or `None` if another chunk is needed.
    ///
    /// # Errors
    /// A fixed text if the peer broke the framing; the stream is of no more use.
    pub fn next_event(&mut self) -> Result<Option<Event>, &'static str> {
        loop {
            if self.data_left > 0 {
                if self.chunk.is_empty() {
                    return Ok(None);
                }
                let data = self.chunk.split_to(self.data_left.min(self.chunk.len()));
                self.data_left -= data.len();
                return Ok(Some(Event::Data(data)));
            }
            let Some((kind, length)) = self.peek_header()? else { return Ok(None) };
            if kind == FrameKind::Data {
                self.take(FRAME_HEADER_LEN);
                self.data_left = length;
                continue;
            }
            let Some(mut frame) = self.collect(FRAME_HEADER_LEN + length) else { return Ok(None) };
            frame.advance(FRAME_HEADER_LEN);
            return Ok(Some(match kind {
                FrameKind::Head => Event::Head(frame),
                FrameKind::Informational => Event::Informational(frame),
                FrameKind::Trailers | FrameKind::Data => Event::Trailers(frame),
            }));
        }
    }

    fn peek_header(&mut self) -> Result<Option<(FrameKind, usize)>, &'static str> {
        let mut header = [0; FRAME_HEADER_LEN];
        let have = self.partial.len().min(FRAME_HEADER_LEN);
        header[..have].copy_from_slice(&self.partial[..have]);
        let more = (FRAME_HEADER_LEN - have).min(self.chunk.len());
        header[have..have + more].copy_from_slice(&self.chunk[..more]);
        if have + more < FRAME_HEADER_LEN {
            self.keep();
            return Ok(None);
        }
        let length = u32::from_be_bytes([0, header[1], header[2], header[3]]) as usize;
        let kind = match header[0] {
            1 => FrameKind::Head,
            2 => FrameKind::Data,
            3 => FrameKind::Trailers,
            4 => FrameKind::Informational,
            _ => return Err("unknown frame type"),
        };
        if kind != FrameKind::Data && length > HEAD_LEN_MAX {
            return Err("a head or trailer section over 64 KiB");
        }
        Ok(Some((kind, length)))
    }

    /// `length` bytes as one piece, without copying where one chunk holds them.
    fn collect(&mut self, length: usize) -> Option<Bytes> {
        if self.partial.is_empty() && self.chunk.len() >= length {
            return Some(self.chunk.split_to(length));
        }
        let missing = length.saturating_sub(self.partial.len());
        if self.chunk.len() < missing {
            self.keep();
            return None;
        }
        let rest = self.chunk.split_to(missing);
        self.partial.extend_from_slice(&rest);
        Some(self.partial.split_to(length).freeze())
    }

    /// Drops `length` bytes from the front.
    fn take(&mut self, length: usize) {
        let kept = length.min(self.partial.len());
        self.partial.advance(kept);
        self.chunk.advance(length - kept);
    }

    fn keep(&mut self) {
        self.partial.extend_from_slice(&self.chunk);
        self.chunk = Bytes::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> Vec<u8> {
        let mut wire = Vec::new();
        for (kind, body) in [
            (FrameKind::Informational, &b"early"[..]),
            (FrameKind::Head, b"head"),
            (FrameKind::Data, b"some data"),
            (FrameKind::Data, b""),
            (FrameKind::Data, b"more"),
            (FrameKind::Trailers, b"end"),
        ] {
            wire.extend(frame_header(kind, body.len()));
            wire.extend(body);
        }
        wire
    }

    fn decode(chunks: impl Iterator<Item = Bytes>) -> Result<(Vec<Event>, Vec<u8>, bool), &'static str> {
        let (mut decoder, mut events, mut data) = (FrameDecoder::default(), Vec::new(), Vec::new());
        for chunk in chunks {
            decoder.push(chunk);
            while let Some(event) = decoder.next_event()? {
                match event {
                    Event::Data(bytes) => data.extend(bytes),
                    other => events.push(other),
                }
            }
        }
        Ok((events, data, decoder.at_boundary()))
    }

    #[test]
    fn frames_are_the_same_however_the_bytes_are_cut() {
        let wire = wire();
        for size in 1..=wire.len() {
            let (events, data, whole) = decode(wire.chunks(size).map(Bytes::copy_from_slice)).expect("valid");
            assert_eq!(data, b"some datamore", "chunks of {size}");
            assert_eq!(
                events,
                [Event::Informational("early".into()), Event::Head("head".into()), Event::Trailers("end".into())]
            );
            assert!(whole, "chunks of {size}");
        }
    }

    #[test]
    fn a_cut_frame_is_no_boundary() {
        let wire = wire();
        let (_, _, whole) = decode([Bytes::copy_from_slice(&wire[..wire.len() - 1])].into_iter()).expect("a prefix");
        assert!(!whole);
    }

    #[test]
    fn an_unknown_type_and_an_endless_head_are_refused_before_they_are_buffered() {
        assert!(decode([Bytes::from_static(&[9, 0, 0, 0])].into_iter()).is_err());
        assert!(decode([Bytes::from_static(&[1, 1, 0, 1])].into_iter()).is_err(), "64 KiB and one");
    }
}
