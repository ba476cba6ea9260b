//! A service of one cloud is called by name from another; it fails over; what is not exported is refused.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use isthmus_tests::{Story, THREE_CLOUDS, ms};

const SAMPLE: &str = env!("CARGO_BIN_EXE_isthmus-sample");

#[test]
fn a_service_is_called_by_name_and_its_calls_move_on_when_it_dies() {
    THREE_CLOUDS("three clouds", SAMPLE).tell(|story| {
        let (first, took) = story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        println!("the first answer came from {first} after {took:?}");
        let load = story.load("aws-eu/shopper", "cart")?.rate(100);
        let running = story.start("aws-eu/shopper", load)?;
        assert!(running.wait_for(Duration::from_secs(5), |outcome| outcome.result.is_ok()).is_some());

        let other = if first == "gcp-us" { "onprem" } else { "gcp-us" };
        story.mesh.remove_workload(&format!("{first}/cart-1"))?;
        let moved = running.wait_for(Duration::from_secs(5), |outcome| {
            outcome.result.as_ref().is_ok_and(|answered| answered.cluster == other)
        });
        let moved = moved.expect("answers from the other cluster");
        println!("moved after {moved:?}");
        assert!(moved < ms(1000), "moved after {moved:?}");

        std::thread::sleep(ms(500));
        let settled = running.elapsed();
        std::thread::sleep(ms(1000));
        let verdict = story.judge(&running.stop()?.between(settled, Duration::MAX), "cart")?;
        assert!(verdict.is_flawless(), "{verdict:?}");
        assert_eq!(verdict.by_cluster.keys().collect::<Vec<_>>(), [other]);
        Ok(())
    });
}

#[test]
fn an_export_is_callable_and_an_unexport_refused_within_a_second() {
    let scene = Story::new("export and unexport", SAMPLE)
        .cluster("aws-eu", "eu-west-1/a")
        .cluster("gcp-us", "us-east1/b")
        .rtt("aws-eu", "gcp-us", ms(100))
        .client("aws-eu", "shopper");
    scene.tell(|story| {
        story.add_service("gcp-us", "cart", "cart-1")?;
        assert!(
            story.call_until_answered("aws-eu/shopper", "cart", ms(700)).is_err(),
            "nothing is exported by default"
        );
        story.export("gcp-us", "cart")?;
        let (cluster, took) = story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(5))?;
        assert_eq!(cluster, "gcp-us");
        println!("callable after {took:?}");
        assert!(took < ms(1000), "callable after {took:?}");
        story.unexport("gcp-us", "cart")?;
        let took = story.call_until_refused("aws-eu/shopper", "cart", Duration::from_secs(5))?;
        println!("refused after {took:?}");
        assert!(took < ms(1000), "refused after {took:?}");
        Ok(())
    });
}
