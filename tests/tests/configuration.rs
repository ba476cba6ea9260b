//! Istio's resources, unchanged, do what they do there: subsets and weights in one cluster, timeouts for
//! the mesh, plaintext by permission.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use isthmus_lab::load::Load;
use isthmus_lab::mesh::{APP_PORT, Capture, WorkloadSpec};
use isthmus_tests::{Story, THREE_CLOUDS, ms};

const SAMPLE: &str = env!("CARGO_BIN_EXE_isthmus-sample");

const ROUTES: &str = "\
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: shop}
spec:
  host: cart.shop.svc.clusterset.local
  trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}
  subsets:
  - name: first
    labels: {version: v1}
  - name: second
    labels: {version: v2}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec:
  hosts: [cart.shop.svc.clusterset.local]
  http:
  - match: [{headers: {x-first: {exact: \"yes\"}}}]
    route: [{destination: {host: cart.shop.svc.clusterset.local, subset: first}}]
  - route:
    - {destination: {host: cart.shop.svc.clusterset.local, subset: first}, weight: 20}
    - {destination: {host: cart.shop.svc.clusterset.local, subset: second}, weight: 80}
";

#[test]
fn subsets_and_weights_split_the_traffic_of_other_clusters() {
    let scene = Story::new("subsets and weights", SAMPLE)
        .cluster("aws-eu", "eu-west-1/a")
        .cluster("gcp-us", "us-east1/b")
        .exported("gcp-us", "cart", 0)
        .client("aws-eu", "shopper");
    scene.tell(|story| {
        for (name, version) in [("cart-1", "v1"), ("cart-2", "v2")] {
            let spec = WorkloadSpec::service("gcp-us", "shop", "cart", name).version(version);
            story.mesh.add_workload(&spec)?;
        }
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        story.mesh.apply("aws-eu", ROUTES)?;
        std::thread::sleep(ms(500));
        let load = story.load("aws-eu/shopper", "cart")?.rate(200).connections(20);
        let running = story.start("aws-eu/shopper", load)?;
        std::thread::sleep(Duration::from_secs(4));
        let report = running.stop()?;
        assert!(story.judge(&report, "cart")?.is_flawless());
        let by = |name: &str| report.answered().filter(|(_, answered)| answered.instance.ends_with(name)).count();
        let (first, second) = (by("cart-1"), by("cart-2"));
        let share = second as f64 / (first + second) as f64;
        println!("cart-1 {first}, cart-2 {second}: {share:.3}");
        assert!((0.72..0.88).contains(&share), "80 % of {} are {second}", first + second);
        Ok(())
    });
}

#[test]
fn what_an_operator_writes_for_the_mesh_holds_in_every_cluster() {
    THREE_CLOUDS("mesh-wide", SAMPLE).tell(|story| {
        let (first, _) = story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(10))?;
        println!("before: answered by {first}");
        let impatient = "\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec:
  hosts: [cart.shop.svc.clusterset.local]
  http:
  - timeout: 1ms
    route: [{destination: {host: cart.shop.svc.clusterset.local}}]
";
        story.mesh.mesh_wide("gcp-us", "apply", impatient)?;
        let written = Instant::now();
        let refused = story.call_until_refused("aws-eu/shopper", "cart", Duration::from_secs(5))?;
        println!("the timeout holds elsewhere after {refused:?}");
        for cluster in ["aws-eu", "gcp-us", "onprem"] {
            let config = story.mesh.json(cluster, &["get", "config"])?;
            let rows = config["items"].as_array().into_iter().flatten();
            assert_eq!(rows.filter(|row| row["origin"] == "mesh").count(), 1, "{cluster}: {config}");
        }
        story.mesh.mesh_wide("onprem", "delete", impatient)?;
        story.call_until_answered("aws-eu/shopper", "cart", Duration::from_secs(5))?;
        assert!(written.elapsed() < Duration::from_secs(10));
        Ok(())
    });
}

#[test]
fn plaintext_is_refused_until_a_peer_authentication_permits_it() {
    let scene = Story::new("permissive", SAMPLE).cluster("aws-eu", "eu-west-1/a").service("aws-eu", "cart", 1);
    scene.tell(|story| {
        if story.mesh.capture() != Capture::Transparent {
            println!("SKIPPED: plaintext to a workload is only captured with namespaces");
            return Ok(());
        }
        // From a machine without a sidecar, to the workload's own port.
        let address = SocketAddr::new(story.host("aws-eu/cart-1").local(), APP_PORT);
        let machine = story.mesh.gateway("aws-eu", 0)?.host().clone();
        let call = || Load::direct(address, "cart").patience(ms(1000)).once(&machine);
        assert!(call()?.result.is_err(), "STRICT is the default");
        let mode = |mode: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                 metadata: {{name: default, namespace: shop}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
            )
        };
        story.mesh.apply("aws-eu", &mode("PERMISSIVE"))?;
        std::thread::sleep(ms(500));
        let permitted = call()?.result;
        assert!(permitted.is_ok(), "{:?}", permitted.err());
        story.mesh.apply("aws-eu", &mode("STRICT"))?;
        std::thread::sleep(ms(500));
        assert!(call()?.result.is_err(), "STRICT again");
        Ok(())
    });
}
