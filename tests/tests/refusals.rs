//! Bad input is refused with its place and what to do, nothing is applied by halves, and the mesh goes on.

use std::time::Duration;

use isthmus_lab::mesh::service_yaml;
use isthmus_tests::{Story, TWO_CLOUDS, mesh_host, ms};

const SAMPLE: &str = env!("CARGO_BIN_EXE_isthmus-sample");

#[test]
fn tokens_that_ended_are_garbled_or_for_a_taken_name_admit_nobody() {
    Story::new("tokens refused", SAMPLE).cluster("aws-eu", "eu-west-1/a").tell(|story| {
        let expired = story.mesh.cli("aws-eu", &["token", "create", "late", "--ttl", "1s"])?;
        std::thread::sleep(ms(2100));
        let said = story.mesh.try_join(&expired, "late").expect_err("an expired token").to_string();
        assert!(said.contains("expired"), "{said}");

        let taken = story.mesh.cli("aws-eu", &["token", "create", "aws-eu"]).expect_err("a taken name").to_string();
        assert!(taken.contains("member already"), "{taken}");
        // The log decides, also where the name was free when the token was made.
        let tokens = [(); 2].map(|()| story.mesh.cli("aws-eu", &["token", "create", "edge"]));
        let [first, second] = tokens;
        story.mesh.try_join(&first?, "edge")?;
        let said = story.mesh.try_join(&second?, "edge-again").expect_err("a name given twice").to_string();
        assert!(said.contains("edge"), "{said}");
        println!("{said}");

        let garbage = story.mesh.try_join("ism1.bm90IGEgdG9rZW4", "garbage").expect_err("no token").to_string();
        assert!(garbage.contains("token"), "{garbage}");
        Ok(())
    });
}

#[test]
fn bad_yaml_changes_nothing_and_names_file_line_and_fix() {
    TWO_CLOUDS("bad yaml", SAMPLE).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        let before = story.mesh.json("gcp-us", &["get", "config"])?;
        let bad = format!("{}---\nkind: ServiceExport\napiVersion: multicluster.x-k8s.io/v1beta1\nmetadata:\n  name: cart\n  namespace: shop\nspce: {{}}\n", service_yaml("shop", "extra"));
        let said = story.mesh.apply("gcp-us", &bad).expect_err("an unknown field").to_string();
        for part in ["gcp-us.yaml:", "spce", "nothing was changed"] {
            assert!(said.contains(part), "{part:?} is missing in {said}");
        }
        assert_eq!(story.mesh.json("gcp-us", &["get", "config"])?, before, "all or nothing");
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(2))?;
        Ok(())
    });
}

#[test]
fn a_tunnel_reaches_exported_ports_only_never_the_sidecars_own() {
    TWO_CLOUDS("unexported ports", SAMPLE).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        let shopper = story.host("aws-eu/shopper");
        // The admin port, the metrics port, one that nobody has: none is a port of the service.
        for port in [15000, 15020, 9999] {
            let load = story.workload("aws-eu/shopper").load(&mesh_host("cart"))?.port(port).patience(ms(3000));
            let outcome = load.once(&shopper)?;
            let failure = outcome.result.expect_err("refused").to_string();
            println!("port {port}: {failure}");
        }
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(2))?;
        Ok(())
    });
}

#[test]
fn a_damaged_store_starts_no_gateway_and_says_how_it_is_mended() {
    TWO_CLOUDS("damaged store", SAMPLE).tell(|story| {
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        story.mesh.gateway("gcp-us", 0)?.kill();
        let state = story.mesh.lab().dir().join("gcp-us-gateway-0");
        let store = state.join("registry/registry.redb");
        let whole = std::fs::read(&store)?;
        std::fs::write(&store, &whole[..whole.len() / 2])?;
        let refused = story.mesh.restart_gateway("gcp-us", 0).expect_err("half a store");
        let said = story.mesh.gateway("gcp-us", 0)?.tail(20);
        assert!(said.contains("isthmus store restore --config"), "{refused}: {said}");

        let config = state.join("gateway.yaml");
        story.mesh.cli("gcp-us", &["store", "restore", "--config", &config.to_string_lossy()])?;
        story.mesh.restart_gateway("gcp-us", 0)?;
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(15))?;
        Ok(())
    });
}
