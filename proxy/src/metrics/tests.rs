//! Series as a scraper reads them.

use isthmus_model::service::Labels;
use isthmus_runtime::metrics::{registry, text};

use super::*;

fn labels(host: &str, cluster: &str) -> EdgeLabels {
    let workload_labels: Labels =
        [("app".to_owned(), "web".to_owned()), ("version".to_owned(), "v2".to_owned())].into();
    let own = "aws-eu".parse().unwrap();
    let source = Party::new("web-1", Some(&"shop".parse().unwrap()), &workload_labels, None, Some(&own));
    let principal = "spiffe://corp/ns/shop/sa/cart".parse().unwrap();
    let cluster = cluster.parse().unwrap();
    let destination = Party::new("", None, &Labels::new(), Some(&principal), Some(&cluster));
    EdgeLabels {
        reporter: Reporter::Source,
        source: Arc::new(source),
        destination: Arc::new(destination),
        service: Some(host.parse().unwrap()),
        security: Security::MutualTls,
    }
}

fn ended(code: u16, millis: u64) -> RequestEnd {
    RequestEnd {
        protocol: RequestProtocol::Http,
        code,
        grpc_status: None,
        flags: if code == 503 { Flags::XT } else { Flags::NONE },
        duration: Duration::from_millis(millis),
        request_bytes: 10,
        response_bytes: 2_000,
    }
}

#[test]
fn a_request_shows_with_all_of_istios_labels() {
    let registry = registry("proxy");
    let metrics = Metrics::new(&registry);
    let edge = metrics.edge(&labels("cart.shop.svc.clusterset.local", "gcp-us"));
    edge.request_ended(&ended(200, 83));
    edge.request_ended(&ended(200, 4));
    let text = text(&registry);
    let line = text.lines().find(|line| line.starts_with("istio_requests_total{")).expect("counted");
    for label in [
        "connection_security_policy=\"mutual_tls\"",
        "destination_app=\"unknown\"",
        "destination_canonical_revision=\"latest\"",
        "destination_canonical_service=\"unknown\"",
        "destination_cluster=\"gcp-us\"",
        "destination_principal=\"spiffe://corp/ns/shop/sa/cart\"",
        "destination_service=\"cart.shop.svc.clusterset.local\"",
        "destination_service_name=\"cart\"",
        "destination_service_namespace=\"shop\"",
        "destination_version=\"unknown\"",
        "destination_workload=\"unknown\"",
        "destination_workload_namespace=\"unknown\"",
        "grpc_response_status=\"\"",
        "reporter=\"source\"",
        "request_protocol=\"http\"",
        "response_code=\"200\"",
        "response_flags=\"-\"",
        "source_app=\"web\"",
        "source_canonical_revision=\"v2\"",
        "source_canonical_service=\"web\"",
        "source_cluster=\"aws-eu\"",
        "source_principal=\"unknown\"",
        "source_version=\"v2\"",
        "source_workload=\"web-1\"",
        "source_workload_namespace=\"shop\"",
    ] {
        assert!(line.contains(label), "{label} is missing in {line}");
    }
    assert!(line.ends_with("} 2"), "{line}");
    let bucket = |le: &str| {
        let line = text.lines().find(|line| {
            line.starts_with("istio_request_duration_milliseconds_bucket{") && line.contains(&format!("le=\"{le}\""))
        });
        line.and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
    };
    assert_eq!([bucket("5"), bucket("100"), bucket("+Inf")], ["1", "2", "2"].map(|n| Some(n.to_owned())));
    let sum = text.lines().find(|line| line.starts_with("istio_request_duration_milliseconds_sum")).unwrap();
    assert!(sum.ends_with(" 87"), "{sum}");
}

#[test]
fn connections_show_while_they_are_open() {
    let registry = registry("proxy");
    let metrics = Metrics::new(&registry);
    let edge = metrics.edge(&labels("db.shop.svc.clusterset.local", "gcp-us"));
    edge.tcp_opened();
    edge.tcp_bytes(7, 9);
    let value = |text: &str, name: &str| {
        text.lines().find(|line| line.starts_with(name)).and_then(|line| line.rsplit(' ').next()).map(str::to_owned)
    };
    let shown = text(&registry);
    assert_eq!(value(&shown, "istio_tcp_connections_opened_total"), Some("1".into()));
    assert_eq!(value(&shown, "istio_tcp_connections_closed_total"), Some("0".into()));
    assert_eq!(value(&shown, "istio_tcp_received_bytes_total"), Some("7".into()));
    assert_eq!(value(&shown, "istio_tcp_sent_bytes_total"), Some("9".into()));
}

#[test]
fn the_gateway_is_told_sums_per_host_and_cluster() {
    let metrics = Metrics::new(&Registry::new());
    let edge = metrics.edge(&labels("cart.shop.svc.clusterset.local", "gcp-us"));
    edge.request_ended(&ended(200, 83));
    edge.request_ended(&ended(503, 7_200_000));
    edge.failed_over();
    let told = metrics.telemetry();
    let [edge] = &told.edges[..] else { panic!("one edge, not {told:?}") };
    assert_eq!((edge.destination_cluster.as_str(), edge.direction.as_str()), ("gcp-us", "outbound"));
    assert_eq!((edge.requests, edge.errors, edge.failovers), (2, 1, 1));
    assert_eq!((edge.bytes_sent, edge.bytes_received), (20, 4_000));
    assert_eq!(edge.latency_counts.len(), isthmus_wire::LATENCY_BUCKETS_MS.len() + 1);
    assert_eq!((edge.latency_counts[6], edge.latency_counts[19]), (1, 1), "83 ms, and beyond the last bound");
}

#[test]
fn labels_beyond_the_bounds_become_other_and_nothing_is_lost() {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry);
    let hosts = EDGES_MAX + 100;
    for n in 0..hosts {
        let edge = metrics.edge(&labels(&format!("s{n}.shop.svc.clusterset.local"), "gcp-us"));
        edge.request_ended(&ended(200, 1));
        edge.request_ended(&ended(404, 1));
        edge.tcp_opened();
    }
    let text = text(&registry);
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    assert!(series <= 10_000, "{series} series");
    let counted: f64 = text
        .lines()
        .filter(|line| line.starts_with("istio_requests_total{"))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum();
    assert_eq!(counted as usize, 2 * hosts);
    assert!(text.contains("destination_workload=\"other\""));
    assert!(
        text.lines().any(|line| line.starts_with("isthmus_proxy_requests_overflow_total ") && !line.ends_with(" 0"))
    );
}

#[test]
fn ages_are_counted_from_what_was_last_told() {
    let metrics = Metrics::new(&Registry::new());
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    metrics.refresh(now);
    assert!(metrics.0.series.config_age.get().is_nan(), "no gateway has said anything yet");
    metrics.config_confirmed(now - Duration::from_millis(1_500));
    metrics.certificate(now + Duration::from_secs(3_600));
    metrics.refresh(now);
    assert_eq!(metrics.0.series.config_age.get(), 1.5);
    assert_eq!(metrics.0.series.certificate_expiry.get(), 3_600.0);
    metrics.refresh(now + Duration::from_secs(7_200));
    assert_eq!(metrics.0.series.certificate_expiry.get(), -3_600.0, "expired an hour ago");
}

#[test]
fn open_connections_are_counted_by_their_guards() {
    let metrics = Metrics::new(&Registry::new());
    let open = metrics.connection_opened(Direction::Outbound);
    let gauge = metrics.0.series.connections.with_label_values(&["outbound"]);
    assert_eq!(gauge.get(), 1);
    drop(open);
    assert_eq!(gauge.get(), 0);
}
