//! Stream headers: what decodes encodes to the same bytes, and a longer input changes nothing.
#![no_main]

use isthmus_tunnel::stream::{HEADER_LEN_MAX, StreamHeader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match StreamHeader::decode(bytes) {
        Ok(Some((header, length))) => {
            assert!(length <= HEADER_LEN_MAX);
            // A host is lower-cased and loses a trailing dot as it is read, so compare what is read again.
            let again = StreamHeader::decode(&header.encode()).expect("our own").expect("whole");
            assert_eq!(again.0, header);
        }
        Ok(None) => assert!(bytes.len() < HEADER_LEN_MAX, "a header never needs more"),
        Err(_) => {}
    }
});
