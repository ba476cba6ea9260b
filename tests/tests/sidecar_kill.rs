//! A remote sidecar dies: others take over at once, and nothing that may have run runs twice.

use std::time::Duration;

use isthmus_lab::ledger::Failure;
use isthmus_tests::{THREE_CLOUDS, ms};

#[test]
fn posts_in_flight_answer_503_once_and_new_requests_go_elsewhere_within_500_ms() {
    THREE_CLOUDS("sidecar kill", env!("CARGO_BIN_EXE_isthmus-sample")).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        // Each takes 400 ms, so about forty are in flight at any time.
        let load = story.load("aws-eu/shopper", "cart")?.path("/delay/400").post(256).rate(100).connections(80);
        let running = story.start("aws-eu/shopper", load)?;
        std::thread::sleep(ms(2000));
        let first = running.report().answered().last().map(|(_, answered)| answered.cluster.clone());
        let first = first.expect("answers before the kill");
        story.workload(&format!("{first}/cart-1")).sidecar.kill();
        let killed = running.elapsed();
        std::thread::sleep(Duration::from_secs(3));
        let report = running.stop()?;
        let verdict = story.judge(&report, "cart")?;
        assert!(verdict.is_honest(), "{verdict:?}");
        for (outcome, failure) in report.failed() {
            assert!(matches!(failure, Failure::Status { status: 503, .. }), "{failure}");
            let in_flight = killed.saturating_sub(ms(500))..killed + ms(500);
            assert!(in_flight.contains(&outcome.at), "due at {:?}, killed at {killed:?}: {failure}", outcome.at);
        }
        assert!(report.failed().count() > 0, "some were in flight when it died");
        let later = report.between(killed + ms(500), Duration::MAX);
        assert!(later.answered().all(|(_, answered)| answered.cluster != first));
        assert!(later.answered().count() > 100, "{later}");
        Ok(())
    });
}
