//! Frames on link streams: any bytes end in a message, a clean end or an error.
#![no_main]

use isthmus_tunnel::frame::read_frame;
use isthmus_wire::federation::{LinkControl, StreamOpen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut stream = bytes;
        let _ = read_frame::<StreamOpen>(&mut stream).await;
        while let Ok(Some(_)) = read_frame::<LinkControl>(&mut stream).await {}
    });
});
