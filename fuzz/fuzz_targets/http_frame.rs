//! HTTP frames: the same events however the bytes are cut, bounded memory, and heads that survive a round trip.
#![no_main]

use bytes::{Bytes, BytesMut};
use isthmus_tunnel::http::frame::{Event, FrameDecoder};
use isthmus_tunnel::http::head;
use libfuzzer_sys::fuzz_target;

type Decoded = (Vec<Event>, Vec<u8>, Option<&'static str>);

fn decode(bytes: &[u8], size: usize) -> Decoded {
    let (mut decoder, mut events, mut data) = (FrameDecoder::default(), Vec::new(), Vec::new());
    for chunk in bytes.chunks(size.max(1)) {
        decoder.push(Bytes::copy_from_slice(chunk));
        loop {
            match decoder.next_event() {
                Ok(Some(Event::Data(piece))) => data.extend_from_slice(&piece),
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (events, data, Some(error)),
            }
        }
    }
    (events, data, None)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let whole = decode(bytes, bytes.len());
    assert_eq!(decode(bytes, usize::from(size)), whole);
    for event in whole.0 {
        let (Event::Head(body) | Event::Informational(body) | Event::Trailers(body) | Event::Data(body)) = event;
        let _ = head::decode_response(body.clone());
        let _ = head::decode_headers(body.clone());
        if let Ok(parts) = head::decode_request(body) {
            let mut again = BytesMut::new();
            head::encode_request(&parts, &mut again).expect("within the limits it came in by");
            let again = head::decode_request(again.freeze()).expect("our own");
            assert_eq!((again.method, again.uri, again.headers), (parts.method, parts.uri, parts.headers));
        }
    }
});
