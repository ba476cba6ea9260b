//! Messages on the streams of a link: four bytes of length, then one protobuf message.

use bytes::{BufMut, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest message: a chunk of a snapshot, with room.
pub const FRAME_LEN_MAX: usize = 8 * 1024 * 1024;

/// Why no message was read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended, or the link is gone.
    #[error("the stream ended")]
    Io(#[from] std::io::Error),
    /// Longer than any honest message.
    #[error("a frame of {0} bytes; at most {FRAME_LEN_MAX} are allowed")]
    TooLong(usize),
    /// Not a message of this kind.
    #[error("not the message that belongs on this stream")]
    Decode(#[from] prost::DecodeError),
}

/// Reads one message; `None` at a clean end. Not cancel-safe: a reader that is dropped within a frame loses it.
///
/// # Errors
/// [`FrameError`].
pub async fn read_frame<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<M>, FrameError> {
    let mut length = [0; 4];
    match stream.read(&mut length[..1]).await? {
        0 => return Ok(None),
        _ => stream.read_exact(&mut length[1..]).await?,
    };
    let length = u32::from_be_bytes(length) as usize;
    if length > FRAME_LEN_MAX {
        return Err(FrameError::TooLong(length));
    }
    // Grows with what arrives, not with what is announced.
    let mut body = BytesMut::with_capacity(length.min(64 * 1024));
    while body.len() < length {
        let missing = length - body.len();
        if (&mut *stream).take(missing as u64).read_buf(&mut body).await? == 0 {
            return Err(FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(Some(M::decode(body)?))
}

/// Writes one message.
///
/// # Errors
/// [`FrameError`].
pub async fn write_frame<M: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > FRAME_LEN_MAX {
        return Err(FrameError::TooLong(length));
    }
    let mut frame = BytesMut::with_capacity(4 + length);
    frame.put_u32(length as u32);
    message.encode_raw(&mut frame);
    stream.write_all(&frame).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_wire::federation::Draining;

    #[tokio::test]
    async fn messages_follow_each_other_and_the_end_is_told_from_a_cut() {
        let mut wire = Vec::new();
        write_frame(&mut wire, &Draining { draining: true }).await.expect("fits");
        write_frame(&mut wire, &Draining { draining: false }).await.expect("fits");
        let mut stream = wire.as_slice();
        assert_eq!(read_frame::<Draining>(&mut stream).await.expect("whole"), Some(Draining { draining: true }));
        assert_eq!(read_frame::<Draining>(&mut stream).await.expect("whole"), Some(Draining { draining: false }));
        assert_eq!(read_frame::<Draining>(&mut stream).await.expect("the end"), None);
        for end in 1..6 {
            assert!(read_frame::<Draining>(&mut &wire[..end]).await.is_err(), "{end} bytes");
        }
    }

    #[tokio::test]
    async fn an_absurd_length_is_refused_before_anything_is_kept() {
        let error = read_frame::<Draining>(&mut &[0xff, 0xff, 0xff, 0xff, 0][..]).await.expect_err("4 GiB");
        assert!(matches!(error, FrameError::TooLong(_)));
    }
}
