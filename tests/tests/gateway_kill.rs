//! Gateways die under load. Requests do not.

use std::time::Duration;

use isthmus_tests::{Story, THREE_CLOUDS, TWO_CLOUDS, Told, ms, within};

const SAMPLE: &str = env!("CARGO_BIN_EXE_isthmus-sample");

/// 200 requests a second from the shopper, running and warm.
fn shopping(story: &mut Told) -> anyhow::Result<isthmus_tests::RunningLoad> {
    story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
    // Enough for a second and a half of requests that wait: new ones find a connection whatever the old ones do.
    let load = story.load("aws-eu/shopper", "cart")?.rate(200).connections(300);
    let running = story.start("aws-eu/shopper", load)?;
    std::thread::sleep(ms(1500));
    Ok(running)
}

#[test]
fn a_lone_gateway_killed_and_back_after_300_ms_fails_no_request() {
    TWO_CLOUDS("gateway kill", SAMPLE).tell(|story| {
        for cluster in ["gcp-us", "aws-eu"] {
            let running = shopping(story)?;
            story.mesh.gateway(cluster, 0)?.kill();
            std::thread::sleep(ms(300));
            story.mesh.restart_gateway(cluster, 0)?;
            std::thread::sleep(Duration::from_secs(4));
            let report = running.stop()?;
            let verdict = story.judge(&report, "cart")?;
            assert!(verdict.is_flawless(), "{cluster}: {verdict:?}");
            assert!(report.slowest() < within(ms(1000)).min(ms(1500)), "{cluster}: {report}");
        }
        Ok(())
    });
}

#[test]
fn with_two_replicas_a_kill_costs_no_request_and_at_most_200_ms() {
    let scene = Story::new("two replicas", SAMPLE)
        .cluster("aws-eu", "eu-west-1/a")
        .replicas(2)
        .cluster("gcp-us", "us-east1/b")
        .replicas(2)
        .exported("gcp-us", "cart", 1)
        .client("aws-eu", "shopper");
    scene.tell(|story| {
        for (cluster, replica) in [("gcp-us", 1), ("gcp-us", 0), ("aws-eu", 1), ("aws-eu", 0)] {
            let running = shopping(story)?;
            story.mesh.gateway(cluster, replica)?.kill();
            std::thread::sleep(Duration::from_secs(3));
            let report = running.stop()?;
            let verdict = story.judge(&report, "cart")?;
            assert!(verdict.is_flawless(), "{cluster}/{replica}: {verdict:?}");
            assert!(report.slowest() <= within(ms(200)), "{cluster}/{replica}: {report}");
            story.mesh.restart_gateway(cluster, replica)?;
        }
        Ok(())
    });
}

#[test]
fn when_all_gateways_of_a_cluster_die_another_cluster_answers_within_a_second() {
    THREE_CLOUDS("all gateways killed", SAMPLE).tell(|story| {
        let running = shopping(story)?;
        let first = running.report().answered().last().map(|(_, answered)| answered.cluster.clone());
        let first = first.expect("answers before the kill");
        story.mesh.gateway(&first, 0)?.kill();
        let moved = running.wait_for(Duration::from_secs(10), |outcome| {
            outcome.result.as_ref().is_ok_and(|answered| answered.cluster != first)
        });
        let moved = moved.expect("answers from another cluster");
        println!("moved after {moved:?}");
        assert!(moved < ms(1000), "moved after {moved:?}");
        std::thread::sleep(ms(1000));
        let settled = running.elapsed();
        std::thread::sleep(Duration::from_secs(2));
        let verdict = story.judge(&running.stop()?.between(settled, Duration::MAX), "cart")?;
        assert!(verdict.is_flawless(), "{verdict:?}");
        Ok(())
    });
}
