//! A cluster joins a living mesh and calls into it.

use std::time::{Duration, Instant};

use isthmus_lab::mesh::WorkloadSpec;
use isthmus_tests::{Story, ms};

#[test]
fn from_a_token_to_the_first_answer_in_ten_seconds() {
    let scene = Story::new("join", env!("CARGO_BIN_EXE_isthmus-sample"))
        .cluster("aws-eu", "eu-west-1/a")
        .exported("aws-eu", "cart", 1);
    scene.tell(|story| {
        story.mesh.add_cluster("edge", "eu-north-1/a")?;
        story.mesh.lab().wan().set("aws-eu", "edge", isthmus_tests::PathConfig::delay(ms(25)))?;
        let start = Instant::now();
        let joined = story.mesh.join("edge", "aws-eu")?;
        story.mesh.add_workload(&WorkloadSpec::client("edge", "shop", "shopper"))?;
        let (cluster, _) = story.call_until_answered("edge/shopper", "cart", Duration::from_secs(10))?;
        let took = start.elapsed();
        println!("joined after {joined:?}, answered by {cluster} after {took:?}");
        assert_eq!(cluster, "aws-eu");
        assert!(took <= Duration::from_secs(10), "{took:?}");
        Ok(())
    });
}

#[test]
fn a_token_works_once_and_only_for_its_name() {
    let scene = Story::new("tokens", env!("CARGO_BIN_EXE_isthmus-sample")).cluster("aws-eu", "eu-west-1/a");
    scene.tell(|story| {
        story.mesh.add_cluster("edge", "eu-north-1/a")?;
        story.mesh.join("edge", "aws-eu")?;
        let again = story.mesh.cli("aws-eu", &["token", "create", "edge"]);
        let refused = match again {
            Err(error) => error.to_string(),
            Ok(token) => {
                let state = story.mesh.lab().dir().join("second").to_string_lossy().into_owned();
                let joined = story.mesh.cli("aws-eu", &["join", token.trim(), "--state", &state]);
                joined.expect_err("a second cluster of the same name").to_string()
            }
        };
        assert!(refused.contains("edge"), "{refused}");
        Ok(())
    });
}
