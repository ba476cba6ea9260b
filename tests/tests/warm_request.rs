//! A request on a warm tunnel costs the path's round trip, and nothing on top.

use std::time::Duration;

use isthmus_tests::{TWO_CLOUDS, ms, within};

#[test]
fn a_warm_request_adds_no_round_trip_at_50_ms() {
    TWO_CLOUDS("warm request", env!("CARGO_BIN_EXE_isthmus-sample")).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        let load = story.load("aws-eu/shopper", "cart")?.rate(100).connections(16);
        let running = story.start("aws-eu/shopper", load)?;
        std::thread::sleep(Duration::from_secs(5));
        let report = running.stop()?.between(Duration::from_secs(1), Duration::MAX);
        let verdict = story.judge(&report, "cart")?;
        assert!(verdict.is_flawless(), "{verdict:?}");
        let median = report.percentile(0.5);
        assert!(median >= ms(50), "{median:?} is faster than light here");
        assert!(median <= ms(50) + within(ms(2)), "{report}");
        Ok(())
    });
}
