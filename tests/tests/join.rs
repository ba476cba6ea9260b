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
fn a_token_works_once_and_only_whole() {
    let scene = Story::new("tokens", env!("CARGO_BIN_EXE_isthmus-sample")).cluster("aws-eu", "eu-west-1/a");
    scene.tell(|story| {
        let token = story.mesh.cli("aws-eu", &["token", "create", "edge"])?;
        let token = token.trim();
        let cut = story.mesh.try_join(&token[..token.len() - 4], "cut").expect_err("a truncated token").to_string();
        assert!(cut.contains("cut short"), "{cut}");
        story.mesh.try_join(token, "first")?;
        let again = story.mesh.try_join(token, "second").expect_err("a used token").to_string();
        assert!(again.contains("used already"), "{again}");
        let revoked = story.mesh.cli("aws-eu", &["token", "create", "lab"])?;
        let listed = story.mesh.json("aws-eu", &["token", "list"])?;
        let open = listed["items"].as_array().into_iter().flatten().find(|row| row["state"] == "open");
        let id = open.and_then(|row| row["id"].as_str()).expect("the new token is open").to_owned();
        story.mesh.cli("aws-eu", &["token", "revoke", &id])?;
        let refused = story.mesh.try_join(&revoked, "third").expect_err("a revoked token").to_string();
        assert!(refused.contains("revoked"), "{refused}");
        Ok(())
    });
}
