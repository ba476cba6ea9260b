//! YAML as Istio's and Kubernetes' users write it is read as they mean it.

use std::time::Duration;

use isthmus_model::authn::MtlsMode;
use isthmus_model::destination::Balancing;
use isthmus_model::route::StringMatch;
use isthmus_model::service::{Location, Protocol, Resolution};
use isthmus_objects::{Object, ObjectSet, Read, read};

fn all(yaml: &str) -> Read {
    read("test.yaml", yaml.as_bytes()).unwrap_or_else(|refusals| panic!("{refusals:#?}"))
}

fn one(yaml: &str) -> Object {
    let mut read = all(yaml);
    assert_eq!(read.warnings, [], "no warning expected");
    assert_eq!(read.objects.len(), 1);
    read.objects.remove(0)
}

#[test]
fn a_service_as_kubectl_prints_it() {
    let yaml = r#"
apiVersion: v1
kind: Service
metadata:
  name: cart
  namespace: shop
  uid: 2b0c
  resourceVersion: "12"
  creationTimestamp: "2026-01-01T00:00:00Z"
  annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
  labels: {app: cart}
spec:
  clusterIP: 10.96.4.7
  clusterIPs: [10.96.4.7]
  ipFamilies: [IPv4]
  ipFamilyPolicy: SingleStack
  internalTrafficPolicy: Cluster
  sessionAffinity: None
  type: ClusterIP
  selector: {app: cart}
  ports:
  - {name: http-web, port: 80, protocol: TCP, targetPort: 8080}
  - {name: api, port: 81, appProtocol: grpc}
  - {name: db, port: 3306, appProtocol: mysql}
  - {name: dns, port: 53, protocol: UDP}
  - {name: other, port: 9000}
status: {loadBalancer: {}}
"#;
    let Object::Service(service) = one(yaml) else { panic!("a service") };
    assert_eq!((service.name.as_str(), service.namespace.as_str()), ("cart", "shop"));
    assert_eq!(service.address, Some("10.96.4.7".parse().expect("valid")));
    let ports: Vec<_> = service.ports.iter().map(|port| (port.number, port.target, port.protocol)).collect();
    use Protocol::{Auto, Grpc, Http, Tcp, Udp};
    assert_eq!(ports, [(80, 8080, Http), (81, 81, Grpc), (3306, 3306, Tcp), (53, 53, Udp), (9000, 9000, Auto)]);
}

#[test]
fn a_workload_entry_for_a_virtual_machine() {
    let yaml = r#"
apiVersion: networking.istio.io/v1beta1
kind: WorkloadEntry
metadata: {name: details-svc, namespace: bookinfo}
spec:
  serviceAccount: details-legacy
  address: 2.2.2.2
  ports: {http: 8080}
  locality: eu-west-1/eu-west-1b
  weight: 3
  labels: {app: details-legacy, instance-id: vm1}
"#;
    let Object::WorkloadEntry(workload) = one(yaml) else { panic!("a workload") };
    assert_eq!(workload.account.to_string(), "ns/bookinfo/sa/details-legacy");
    assert_eq!((workload.locality.region.as_str(), workload.locality.zone.as_str()), ("eu-west-1", "eu-west-1b"));
    assert_eq!((workload.weight, workload.ports["http"]), (3, 8080));
}

#[test]
fn service_entries_by_name_by_address_and_by_selector() {
    let yaml = r#"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: external-svc-https}
spec:
  hosts: [api.dropboxapi.com, www.googleapis.com]
  location: MESH_EXTERNAL
  ports: [{number: 443, name: https, protocol: TLS}]
  resolution: DNS
---
apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: external-svc-mongocluster, namespace: db}
spec:
  hosts: [mymongodb.somedomain]
  addresses: [192.192.192.192/24]
  ports: [{number: 27018, name: mongodb, protocol: MONGO, targetPort: 27017}]
  location: MESH_INTERNAL
  resolution: STATIC
  endpoints:
  - {address: 2.2.2.2, locality: us/east, weight: 2}
  - {address: 3.3.3.3, ports: {mongodb: 9999}, serviceAccount: mongo}
  exportTo: [".", shop]
  subjectAltNames: ["spiffe://cluster.local/ns/db/sa/mongo"]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: wild}
spec:
  hosts: ["*.wikipedia.org"]
  ports: [{number: 443, name: tls}]
  resolution: NONE
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vms}
spec:
  hosts: [details.bookinfo.com]
  location: MESH_INTERNAL
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  workloadSelector: {labels: {app: details-legacy}}
"#;
    let read = all(yaml);
    let entries: Vec<_> = read
        .objects
        .iter()
        .map(|object| match object {
            Object::ServiceEntry(entry) => entry,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!((entries[0].resolution, entries[0].namespace.as_str()), (Resolution::Dns, "default"));
    assert_eq!(entries[0].export_to, ["*"]);
    assert_eq!(entries[1].location, Location::MeshInternal);
    assert_eq!(entries[1].addresses[0].to_string(), "192.192.192.0/24");
    assert_eq!((entries[1].ports[0].target, entries[1].ports[0].protocol), (27017, Protocol::Tcp));
    assert_eq!(entries[1].endpoints[1].account.to_string(), "ns/db/sa/mongo");
    assert_eq!((entries[1].endpoints[0].weight, entries[1].endpoints[1].ports["mongodb"]), (2, 9999));
    assert_eq!(entries[2].ports[0].protocol, Protocol::Tls, "by the port's name");
    assert_eq!(entries[3].workload_selector["app"], "details-legacy");
}

#[test]
fn a_virtual_service_with_all_that_is_served() {
    let yaml = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews-route, namespace: shop}
spec:
  hosts: [reviews, reviews.shop.svc.clusterset.local]
  gateways: [mesh]
  http:
  - name: canary
    match:
    - uri: {prefix: /wpcatalog}
      ignoreUriCase: true
      method: {exact: GET}
      headers: {end-user: {exact: jason}, x-any: {}}
      withoutHeaders: {x-old: {}}
      queryParams: {v: {regex: "[0-9]+"}}
      port: 80
      sourceLabels: {app: web}
      sourceNamespace: shop
    - authority: {suffix: .example.org}
    - authority: {regex: ".*[.]example[.]com"}
    timeout: 5s
    retries: {attempts: 3, perTryTimeout: 2s, retryOn: "5xx,connect-failure,503"}
    route:
    - destination: {host: reviews, subset: v2, port: {number: 8080}}
      weight: 25
    - destination: {host: reviews.shop.svc.cluster.local, subset: v1}
      weight: 75
  - route:
    - destination: {host: reviews}
  tls:
  - match: [{sniHosts: [reviews], port: 443}]
    route: [{destination: {host: reviews}}]
  tcp:
  - match: [{port: 27017, destinationSubnets: [10.0.0.0/8]}]
    route: [{destination: {host: mongo.backup.svc.cluster.local}}]
"#;
    // The name in `sniHosts` is not one of the (qualified) hosts: Istio refuses that too.
    let refusals = read("x", yaml.as_bytes()).expect_err("short sni host");
    assert_eq!(refusals.len(), 1, "{refusals:#?}");
    assert_eq!(refusals[0].place.path, "spec.tls[0].match[0].sniHosts[0]");

    let fixed = yaml.replace("sniHosts: [reviews]", "sniHosts: [reviews.shop.svc.cluster.local]");
    let object = one(&fixed);
    let Object::VirtualService(service) = &object else { panic!("a virtual service") };
    let hosts: Vec<_> = service.hosts.iter().map(|host| host.as_str()).collect();
    assert_eq!(hosts, ["reviews.shop.svc.cluster.local", "reviews.shop.svc.clusterset.local"]);
    let canary = &service.http[0];
    assert_eq!(canary.timeout, Some(Duration::from_secs(5)));
    assert_eq!(canary.matches[0].without_headers, [("x-old".to_owned(), StringMatch::Present)]);
    let shares: Vec<_> = canary.destinations.iter().map(|to| (to.subset.as_deref(), to.port, to.weight)).collect();
    assert_eq!(shares, [(Some("v2"), Some(8080), 25), (Some("v1"), None, 75)]);
    let retries = canary.retries.as_ref().expect("said");
    assert_eq!((retries.attempts, retries.retry_on.len()), (3, 3));
    assert_eq!(service.http[1].destinations[0].weight, 100, "a single destination takes all");
    assert_eq!(service.tcp[0].matches[0].port, Some(27017));

    let json = object.to_json().expect("mesh-wide");
    assert_eq!(Object::from_json(&json).expect("ours"), object);
}

#[test]
fn a_destination_rule_with_subsets_and_ports() {
    let yaml = r#"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: bookinfo.ratings, namespace: prod}
spec:
  host: ratings
  trafficPolicy:
    loadBalancer: {simple: ROUND_ROBIN}
    connectionPool: {tcp: {connectTimeout: 30ms}}
    tls: {mode: ISTIO_MUTUAL}
    portLevelSettings:
    - port: {number: 80}
      loadBalancer: {simple: RANDOM}
  subsets:
  - name: testversion
    labels: {version: v3}
    trafficPolicy: {loadBalancer: {simple: LEAST_REQUEST}}
"#;
    let object = one(yaml);
    let Object::DestinationRule(rule) = &object else { panic!("a rule") };
    assert_eq!(rule.host.as_str(), "ratings.prod.svc.cluster.local");
    assert_eq!(rule.effective(None, 443).balancing, Balancing::RoundRobin);
    assert_eq!(rule.effective(None, 443).connect_timeout, Duration::from_millis(30));
    assert_eq!(rule.effective(None, 80).balancing, Balancing::Random);
    assert_eq!(rule.effective(Some("testversion"), 443).balancing, Balancing::LeastRequest);
    assert_eq!(Object::from_json(&object.to_json().expect("mesh-wide")).expect("ours"), object);
}

#[test]
fn peer_authentications_at_every_scope() {
    let yaml = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: isthmus-system}
spec: {mtls: {mode: PERMISSIVE}}
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: cart, namespace: shop}
spec:
  selector: {matchLabels: {app: cart}}
  mtls: {mode: UNSET}
  portLevelMtls:
    8080: {mode: DISABLE}
    "8081": {mode: STRICT}
"#;
    let read = all(yaml);
    let Object::PeerAuthentication(cart) = &read.objects[1] else { panic!("a policy") };
    assert_eq!(cart.mode, None);
    assert_eq!(
        cart.ports.clone().into_iter().collect::<Vec<_>>(),
        [(8080, MtlsMode::Disable), (8081, MtlsMode::Strict)]
    );
    for object in &read.objects {
        assert_eq!(&Object::from_json(&object.to_json().expect("mesh-wide")).expect("ours"), object);
    }
}

#[test]
fn service_exports_with_and_without_an_audience() {
    let yaml = r#"
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: cart, namespace: shop}
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata:
  name: till
  namespace: shop
  annotations: {isthmus.io/visible-to: "aws-eu, gcp-*"}
"#;
    let read = all(yaml);
    let [Object::ServiceExport(cart), Object::ServiceExport(till)] = read.objects.as_slice() else { panic!("two") };
    assert!(cart.visible_to.cover("anybody"));
    assert!(till.visible_to.cover("aws-eu") && till.visible_to.cover("gcp-us") && !till.visible_to.cover("onprem"));
    assert!(read.objects[0].to_json().is_none(), "exports are the cluster's own records");
}

#[test]
fn a_list_is_read_item_by_item() {
    let yaml = r#"
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}]}}
- {apiVersion: v1, kind: Service, metadata: {name: b}, spec: {ports: [{port: 80}]}}
"#;
    assert_eq!(all(yaml).objects.len(), 2);
}

#[test]
fn what_has_no_effect_is_said() {
    let yaml = r#"
apiVersion: v1
kind: Service
metadata: {name: cart, annotations: {isthmus.io/visble-to: "*"}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  ports: [{port: 80, nodePort: 30080, targetPort: web}]
"#;
    let warnings: Vec<_> = all(yaml).warnings.iter().map(|one| (one.code, one.place.path.clone())).collect();
    assert_eq!(
        warnings,
        [
            ("ISM1001", "metadata.annotations.isthmus.io/visble-to".to_owned()),
            ("ISM1001", "spec.externalTrafficPolicy".to_owned()),
            ("ISM1004", "spec.ports[0].targetPort".to_owned()),
            ("ISM1001", "spec.ports[0].nodePort".to_owned()),
        ]
    );
}

const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {ports: [{port: 80}], selector: {app: cart}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: shop}
spec: {host: cart, subsets: [{name: v1, labels: {version: v1}}]}
"#;

#[test]
fn objects_that_contradict_each_other_are_pointed_at() {
    let routes = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec:
  hosts: [cart]
  http:
  - route:
    - {destination: {host: cart, subset: v2}, weight: 1}
    - {destination: {host: kart}, weight: 1}
    - {destination: {host: cart, port: {number: 81}}, weight: 1}
    - {destination: {host: cart.shop.svc.clusterset.local}, weight: 1}
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: till, namespace: shop}
"#;
    let files = [("shop.yaml", SHOP.as_bytes()), ("routes.yaml", routes.as_bytes())];
    let (set, warnings) = ObjectSet::read(files).expect("valid each by itself");
    assert_eq!(set.iter().count(), 4);
    let text: Vec<_> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(text.len(), 4, "{text:#?}");
    for part in ["subset \"v2\"", "kart.shop.svc.cluster.local is no service", "has no port 81", "no Service shop/till"]
    {
        assert!(text.iter().any(|one| one.contains(part) && one.starts_with("routes.yaml:")), "{part}: {text:#?}");
    }
}

#[test]
fn rules_are_found_by_host_and_namespace() {
    let more = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: all, namespace: a}
spec: {hosts: ["*.shop.svc.cluster.local"], http: [{route: [{destination: {host: cart.shop.svc.cluster.local}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec: {hosts: [cart], exportTo: ["."], http: [{route: [{destination: {host: cart}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: bank}
spec: {host: cart.shop.svc.cluster.local, exportTo: ["."]}
"#;
    let files = [("shop.yaml", SHOP.as_bytes()), ("more.yaml", more.as_bytes())];
    let (set, _) = ObjectSet::read(files).expect("valid");
    let cart = "cart.shop.svc.cluster.local".parse().expect("valid");
    let route = |namespace: &str| {
        let found = set.virtual_service(&cart, &namespace.parse().expect("valid")).expect("one");
        (found.namespace.to_string(), found.name.to_string())
    };
    assert_eq!(route("shop"), ("shop".into(), "cart".into()), "exact before wildcard");
    assert_eq!(route("bank"), ("a".into(), "all".into()), "the other one is not exported to bank");
    let rule = |namespace: &str| {
        set.destination_rule(&cart, &namespace.parse().expect("valid")).map(|one| one.namespace.to_string())
    };
    assert_eq!(rule("bank").as_deref(), Some("bank"), "the caller's own first");
    assert_eq!(rule("other").as_deref(), Some("shop"), "then the service's");
}
