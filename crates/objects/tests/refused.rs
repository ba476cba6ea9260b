//! Everything that cannot be taken at its word is refused with its place, its value and a fix.

use isthmus_objects::{ObjectSet, Problem, Refusal, read};

fn refused(yaml: &str) -> Vec<Refusal> {
    match read("test.yaml", yaml.as_bytes()) {
        Err(refusals) => refusals,
        Ok(read) => panic!("accepted: {read:#?}\n{yaml}"),
    }
}

/// One object of `kind` in namespace `shop`, with `spec` as given.
fn object(kind: &str, spec: &str) -> String {
    let version = match kind {
        "Service" => "v1",
        "PeerAuthentication" => "security.istio.io/v1",
        "ServiceExport" => "multicluster.x-k8s.io/v1beta1",
        _ => "networking.istio.io/v1",
    };
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\nspec: {spec}\n")
}

#[test]
fn each_problem_has_its_path_and_a_fix() {
    use Problem::{Duplicate, Impossible, Missing, NotSupported, UnknownField, WrongType};
    let route = "http: [{route: [{destination: {host: cart}}]}]";
    let port = "ports: [{number: 80, name: http}]";
    #[rustfmt::skip]
    let cases = [
        ("Service", "{ports: [{port: 0}]}".to_owned(), Impossible, "spec.ports[0].port", "1 to 65535"),
        ("Service", "{ports: [{port: 65536}]}".into(), Impossible, "spec.ports[0].port", "1 to 65535"),
        ("Service", "{ports: [{port: '80'}]}".into(), WrongType, "spec.ports[0].port", "whole number"),
        ("Service", "{ports: [{port: 80, protocl: TCP}]}".into(), UnknownField, "spec.ports[0].protocl", "did you mean protocol?"),
        ("Service", "{ports: [{port: 80, protocol: SCTP}]}".into(), Impossible, "spec.ports[0].protocol", "TCP or UDP"),
        ("Service", "{ports: [{port: 80, name: a}, {port: 81, name: a}]}".into(), Duplicate, "spec.ports[1]", "own name"),
        ("Service", "{ports: [{port: 80, name: a}, {port: 80, name: b}]}".into(), Duplicate, "spec.ports[1]", "own number"),
        ("Service", "{ports: [{port: 80, name: a}, {port: 81}]}".into(), Missing, "spec.ports[1].name", "several"),
        ("Service", "{ports: [{port: 80}], clusterIP: None}".into(), NotSupported, "spec.clusterIP", "headless"),
        ("Service", "{ports: [{port: 80}], type: ExternalName}".into(), NotSupported, "spec.type", "ServiceEntry"),
        ("Service", "{ports: [{port: 80}], sessionAffinity: ClientIP}".into(), NotSupported, "spec.sessionAffinity", "None"),
        ("Service", "{ports: [{port: 80}], selector: {version: 1.0}}".into(), WrongType, "spec.selector.version", "quotes"),
        ("Service", "{ports: [{port: 80}], selector: [a]}".into(), WrongType, "spec.selector", "a map"),
        ("Service", "{ports: [{port: 80, name: a_b}]}".into(), Impossible, "spec.ports[0].name", "letters"),
        ("WorkloadEntry", "{address: 1.2.3.4, ports: {'@': 80}}".into(), Impossible, "spec.ports.@", "letters"),
        ("WorkloadEntry", "{address: 1.2.3.4, ports: {http: 99999}}".into(), Impossible, "spec.ports.http", "65535"),
        ("Service", "{}".into(), Missing, "spec.ports", "at least one port"),
        ("WorkloadEntry", "{address: 'unix:///x'}".into(), Impossible, "spec.address", "IP address"),
        ("WorkloadEntry", "{address: '10.0.0.1:80'}".into(), Impossible, "spec.address", "without a port"),
        ("WorkloadEntry", "{}".into(), Missing, "spec.address", "add"),
        ("WorkloadEntry", "{network: n1}".into(), NotSupported, "spec.network", "address"),
        ("WorkloadEntry", "{address: 1.2.3.4, weight: -1}".into(), Impossible, "spec.weight", "0 to"),
        ("WorkloadEntry", "{address: 1.2.3.4, serviceAccount: A/b}".into(), Impossible, "spec.serviceAccount", "service account"),
        ("ServiceEntry", format!("{{hosts: ['*'], {port}}}"), Impossible, "spec.hosts[0]", "domain"),
        ("ServiceEntry", format!("{{hosts: [a.b, A.b], {port}}}"), Duplicate, "spec.hosts[1]", "remove"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, resolution: STATIC}}"), Missing, "spec.endpoints", "workloadSelector"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, resolution: STATIC, endpoints: [{{address: a.c}}]}}"), Impossible, "spec.endpoints[0]", "DNS"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, workloadSelector: {{}}, endpoints: [{{address: 1.2.3.4}}], resolution: STATIC}}"), Impossible, "spec.workloadSelector", "not both"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, endpoints: [{{address: a.c}}, {{address: a.d}}], resolution: DNS_ROUND_ROBIN}}"), Impossible, "spec.endpoints", "one endpoint"),
        ("ServiceEntry", "{hosts: [a.b], ports: [{number: 1, name: a, targetPort: 99999}]}".into(), Impossible, "spec.ports[0].targetPort", "65535"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, endpoints: [{{address: 1.2.3.4}}]}}"), Impossible, "spec.endpoints", "STATIC"),
        ("ServiceEntry", format!("{{hosts: ['*.b'], {port}, resolution: DNS}}"), Impossible, "spec.hosts", "NONE"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, resolution: DYNAMIC_DNS}}"), NotSupported, "spec.resolution", "DNS"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, resolution: dns}}"), Impossible, "spec.resolution", "did you mean DNS?"),
        ("ServiceEntry", format!("{{hosts: [a.b], addresses: [10.0.0.0/8], {port}, resolution: DNS}}"), Impossible, "spec.addresses", "NONE or STATIC"),
        ("ServiceEntry", format!("{{hosts: [a.b], addresses: [0.0.0.0/0], {port}}}"), Impossible, "spec.addresses[0]", "ranges"),
        ("ServiceEntry", "{hosts: [a.b], ports: [{number: 80, name: x, protocol: SMTP}]}".into(), Impossible, "spec.ports[0].protocol", "HTTP"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, exportTo: ['*', x]}}"), Impossible, "spec.exportTo", "alone"),
        ("ServiceEntry", format!("{{hosts: [a.b], {port}, resolution: STATIC, endpoints: [{{address: 1.2.3.4, ports: {{web: 1}}}}]}}"), Impossible, "spec.endpoints[0]", "spec.ports"),
        ("VirtualService", format!("{{hosts: ['*'], {route}}}"), NotSupported, "spec.hosts[0]", "name the hosts"),
        ("VirtualService", format!("{{hosts: [a], gateways: [mesh, ingress], {route}}}"), NotSupported, "spec.gateways[1]", "mesh"),
        ("VirtualService", "{hosts: [a]}".into(), Missing, "spec.http", "route"),
        ("VirtualService", "{hosts: [a], http: [{}]}".into(), Missing, "spec.http[0].route", "destination"),
        ("VirtualService", "{hosts: [a], http: [{route: [{destination: {host: a}}], fault: {}}]}".into(), NotSupported, "spec.http[0].fault", "remove"),
        ("VirtualService", "{hosts: [a], http: [{route: [{destination: {host: a}}], redirect: {uri: /}}]}".into(), NotSupported, "spec.http[0].redirect", "remove"),
        ("VirtualService", "{hosts: [a], http: [{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}}]}]}".into(), Impossible, "spec.http[0]", "weight"),
        ("VirtualService", "{hosts: [a], http: [{route: [{destination: {host: a}, weight: -5}]}]}".into(), Impossible, "spec.http[0].route[0].weight", "0 to"),
        ("VirtualService", "{hosts: [a], http: [{match: [{uri: {prefix: /a, exact: /b}}], route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].match[0].uri", "exactly one"),
        ("VirtualService", "{hosts: [a], http: [{match: [{uri: {regex: 'a('}}], route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].match[0].uri.regex", "whole text"),
        ("VirtualService", r"{hosts: [a], http: [{match: [{uri: {regex: '(\w{1,200}){1,200}'}}], route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].match[0].uri.regex", "whole text"),
        ("VirtualService", "{hosts: [a], http: [{timeout: 10, route: [{destination: {host: a}}]}]}".into(), WrongType, "spec.http[0].timeout", "quotes"),
        ("VirtualService", "{hosts: [a], http: [{timeout: 10x, route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].timeout", "1.5s"),
        ("VirtualService", "{hosts: [a], http: [{timeout: 1us, route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].timeout", "1ms"),
        ("VirtualService", "{hosts: [a], http: [{retries: {attempts: 1, retryOn: 5x}, route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].retries.retryOn", "did you mean 5xx?"),
        ("VirtualService", "{hosts: [a], http: [{retries: {attempts: 0, perTryTimeout: 1s}, route: [{destination: {host: a}}]}]}".into(), Impossible, "spec.http[0].retries.perTryTimeout", "attempts"),
        ("VirtualService", "{hosts: [a], tls: [{route: [{destination: {host: a}}]}]}".into(), Missing, "spec.tls[0].match", "sniHosts"),
        ("VirtualService", "{hosts: [a], tcp: [{match: [{sourceSubnet: 10.0.0.0/8}], route: [{destination: {host: a}}]}]}".into(), NotSupported, "spec.tcp[0].match[0].sourceSubnet", "remove"),
        ("DestinationRule", "{host: a, trafficPolicy: {outlierDetection: {}}}".into(), NotSupported, "spec.trafficPolicy.outlierDetection", "remove"),
        ("DestinationRule", "{host: a, trafficPolicy: {loadBalancer: {simple: FAST}}}".into(), Impossible, "spec.trafficPolicy.loadBalancer.simple", "one of"),
        ("DestinationRule", "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}".into(), NotSupported, "spec.trafficPolicy.loadBalancer.consistentHash", "remove"),
        ("DestinationRule", "{host: a, trafficPolicy: {tls: {mode: DISABLE}}}".into(), NotSupported, "spec.trafficPolicy.tls.mode", "ISTIO_MUTUAL"),
        ("DestinationRule", "{host: a, subsets: [{name: v1}, {name: v1}]}".into(), Duplicate, "spec.subsets[1]", "rename"),
        ("DestinationRule", "{host: a, trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}}}}".into(), NotSupported, "spec.trafficPolicy.connectionPool.tcp.maxConnections", "remove"),
        ("PeerAuthentication", "{mtls: {mode: ON}}".into(), Impossible, "spec.mtls.mode", "STRICT"),
        ("PeerAuthentication", "{portLevelMtls: {80: {mode: STRICT}}}".into(), Impossible, "spec.portLevelMtls", "selector"),
        ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}".into(), Impossible, "spec.portLevelMtls.http", "65535"),
        ("ServiceExport", "{visibleTo: [a]}".into(), UnknownField, "spec.visibleTo", "remove it"),
    ];
    for (kind, spec, problem, path, fix) in cases {
        let refusals = refused(&object(kind, &spec));
        let found = refusals.iter().find(|one| one.place.path == path && one.problem == problem);
        let found = found.unwrap_or_else(|| panic!("{kind} {spec}: {refusals:#?}"));
        assert_eq!(refusals.len(), 1, "one problem, one refusal: {kind} {spec}: {refusals:#?}");
        assert!(found.fix.contains(fix) || found.message.contains(fix), "{kind} {spec}: {found}");
        assert!(found.place.line > 0 && found.place.column > 0, "{kind} {spec}: {found}");
    }
}

#[test]
fn unknown_kinds_and_versions_say_what_is_known() {
    for (kind, version, problem, part) in [
        ("VirtualServices", "networking.istio.io/v1", Problem::UnknownKind, "did you mean VirtualService?"),
        ("Frobnicate", "v1", Problem::UnknownKind, "use one of Service"),
        ("EnvoyFilter", "networking.istio.io/v1alpha3", Problem::NotSupported, "does not run Envoy"),
        ("AuthorizationPolicy", "security.istio.io/v1", Problem::NotSupported, "not supported yet"),
        ("VirtualService", "networking.istio.io/v2", Problem::UnknownKind, "use networking.istio.io/v1"),
        ("Service", "apps/v1", Problem::UnknownKind, "use v1"),
    ] {
        let yaml = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {{}}\n");
        let refusals = refused(&yaml);
        assert_eq!((refusals.len(), refusals[0].problem), (1, problem), "{refusals:#?}");
        assert!(refusals[0].to_string().contains(part), "{}", refusals[0]);
    }
}

#[test]
fn all_problems_of_a_file_come_at_once_and_nothing_is_applied() {
    let yaml = "\
apiVersion: v1
kind: Service
metadata: {name: good}
spec: {ports: [{port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: Bad_Name
  namespce: shop
spec:
  hosts: [cart]
  http:
  - route:
    - destination: {host: cart}
      wieght: 10
    timeout: soon
  - mtach: []
";
    let found: Vec<_> = refused(yaml).iter().map(|one| (one.place.line, one.place.path.clone(), one.problem)).collect();
    use Problem::{Impossible, Missing, UnknownField};
    assert_eq!(
        found,
        [
            (9, "metadata.name".to_owned(), Impossible),
            (10, "metadata.namespce".to_owned(), UnknownField),
            (16, "spec.http[0].route[0].wieght".to_owned(), UnknownField),
            (17, "spec.http[0].timeout".to_owned(), Impossible),
            (18, "spec.http[1].route".to_owned(), Missing),
            (18, "spec.http[1].mtach".to_owned(), UnknownField),
        ]
    );
}

#[test]
fn a_refusal_reads_as_a_sentence_with_its_place() {
    let refusals = refused(&object("Service", "{ports: [{port: 80, protocl: TCP}]}"));
    assert_eq!(
        refusals[0].to_string(),
        "test.yaml:4:27: spec.ports[0].protocl: unknown field \"protocl\"; did you mean protocol?"
    );
    assert_eq!(refusals[0].value.as_deref(), Some("\"TCP\""));
}

#[test]
fn keys_and_objects_that_are_there_twice_are_refused() {
    let twice = refused(&object("Service", "{ports: [{port: 80}], ports: [{port: 81}]}"));
    assert_eq!((twice.len(), twice[0].problem), (1, Problem::Duplicate), "{twice:#?}");

    let service = object("Service", "{ports: [{port: 80}]}");
    let again = refused(&format!("{service}---\n{service}"));
    assert_eq!((again.len(), again[0].problem, again[0].place.line), (1, Problem::Duplicate, 6), "{again:#?}");

    let files = [("a.yaml", service.as_bytes()), ("b.yaml", service.as_bytes())];
    let across = ObjectSet::read(files).expect_err("one name in two files");
    assert_eq!(across.len(), 1);
    assert!(
        across[0].to_string().starts_with("b.yaml:1:1: Service/shop/x is there twice, first in a.yaml line 1"),
        "{}",
        across[0]
    );
}

#[test]
fn what_is_not_yaml_is_refused_and_never_panics() {
    for bytes in [
        b"a: [1, 2\nb: 3\n".as_slice(),
        b"kind: Service\n\xff\xfe\n",
        b"- a\n- b\n",
        b"just text",
        b"\0",
        b"kind: 3\napiVersion: v1",
        b"kind: Service\napiVersion: v1\nmetadata: 3\nspec: []",
        b"? {a: b}\n: c\n",
        b"!!binary aGk=",
    ] {
        let refusals = read("x.yaml", bytes).expect_err("not an object");
        assert!(!refusals.is_empty());
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(read("x.yaml", deep.as_bytes()).is_err(), "nesting without bound");
    let many = object("VirtualService", &format!("{{hosts: [a], http: [{}]}}", "{x: 1},".repeat(5_000)));
    assert!(refused(&many).len() <= 200, "the answer is bounded");
}

#[test]
fn an_empty_file_holds_nothing() {
    for empty in ["", "---\n", "# only a comment\n", "---\n---\n"] {
        assert!(read("x.yaml", empty.as_bytes()).expect("valid").objects.is_empty(), "{empty:?}");
    }
}

#[test]
fn a_record_of_the_log_with_unknown_fields_is_refused() {
    use isthmus_objects::Object;
    for json in ["", "{}", r#"{"mesh_ranges":[]}"#, r#"{"peer_authentication":[]}"#, r#"{"virtual_service":{"x":1}}"#] {
        assert!(Object::from_json(json).is_err(), "{json}");
    }
}
