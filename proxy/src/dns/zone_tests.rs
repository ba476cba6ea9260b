//! Questions and what the mesh says to them.

use std::sync::Arc;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use isthmus_model::service::{Location, Resolution, ServicePort};

use super::super::message::{Verdict, encode, read};
use super::*;

fn question(name: &str, kind: RecordType) -> Question {
    let mut message = Message::new(1, MessageType::Query, OpCode::Query);
    let labels = name.split('.').filter(|label| !label.is_empty()).map(str::as_bytes);
    message.queries = vec![Query::query(Name::from_labels(labels).unwrap(), kind)];
    match read(&message.to_vec().unwrap()) {
        Verdict::Ask(question) => *question,
        other => panic!("{other:?}"),
    }
}

fn service(host: &str, addresses: &[&str]) -> Answer {
    let port = |number, name: &str, protocol| ServicePort { number, name: name.into(), protocol, target: number };
    Answer::Known(Arc::new(ServiceView {
        host: host.parse().unwrap(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        ports: vec![port(80, "http", Protocol::Http), port(53, "dns", Protocol::Udp)],
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends: vec![],
    }))
}

const CART: &str = "cart.shop.svc.clusterset.local.";

fn asked(name: &str, kind: RecordType, said: &Answer) -> Option<Reply> {
    let question = question(name, kind);
    match lookup(&question) {
        Lookup::Ask(ask) => answer(&question, &ask, said),
        Lookup::Reply(reply) => Some(*reply),
        Lookup::Forward => None,
    }
}

fn data(reply: &Reply) -> Vec<String> {
    reply.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn a_service_of_the_mesh_has_its_virtual_address() {
    let cart = service("cart.shop.svc.clusterset.local", &["240.240.0.7", "fd00::7"]);
    let reply = asked(CART, RecordType::A, &cart).unwrap();
    assert_eq!((reply.code, reply.authoritative), (ResponseCode::NoError, true));
    assert_eq!(data(&reply), ["240.240.0.7"]);
    assert_eq!(reply.answers[0].ttl, TTL_S);
    assert_eq!(data(&asked("CART.Shop.svc.clusterset.local.", RecordType::AAAA, &cart).unwrap()), ["fd00::7"]);
}

#[test]
fn a_known_name_without_the_asked_family_has_no_data_rather_than_not_existing() {
    let cart = service("cart.shop.svc.clusterset.local", &["240.240.0.7"]);
    for kind in [RecordType::AAAA, RecordType::TXT, RecordType::MX, RecordType::HTTPS] {
        let reply = asked(CART, kind, &cart).unwrap();
        assert_eq!((reply.code, reply.answers.len()), (ResponseCode::NoError, 0), "{kind}");
        assert_eq!(reply.authorities[0].record_type(), RecordType::SOA, "so that it can be kept, and for how long");
    }
}

#[test]
fn absence_is_only_what_a_gateway_said() {
    assert_eq!(asked(CART, RecordType::A, &Answer::Absent).unwrap().code, ResponseCode::NXDomain);
    assert_eq!(asked(CART, RecordType::A, &Answer::Unanswered).unwrap().code, ResponseCode::ServFail);
    let upstream = || Reply::code(ResponseCode::NXDomain);
    assert_eq!(doubt(&Answer::Unanswered, upstream()).code, ResponseCode::ServFail);
    assert_eq!(doubt(&Answer::Absent, upstream()).code, ResponseCode::NXDomain);
}

#[test]
fn the_zones_own_names_exist_and_the_rest_below_it_does_not() {
    for name in ["clusterset.local.", "svc.clusterset.local.", "shop.svc.clusterset.local."] {
        let reply = asked(name, RecordType::A, &Answer::Absent).unwrap();
        assert_eq!((reply.code, reply.answers.len()), (ResponseCode::NoError, 0), "{name}");
    }
    for name in ["x.clusterset.local.", "a.b.c.svc.clusterset.local.", "a b.shop.svc.clusterset.local."] {
        assert_eq!(asked(name, RecordType::A, &Answer::Unanswered).unwrap().code, ResponseCode::NXDomain, "{name}");
    }
    assert_eq!(asked("clusterset.local.", RecordType::SOA, &Answer::Absent).unwrap().answers.len(), 1);
}

#[test]
fn ports_are_found_by_name_and_protocol() {
    let cart = service("cart.shop.svc.clusterset.local", &["240.240.0.7", "fd00::7"]);
    let reply = asked(&format!("_http._tcp.{CART}"), RecordType::SRV, &cart).unwrap();
    assert_eq!(data(&reply), [format!("0 100 80 {CART}")]);
    assert_eq!(reply.additionals.len(), 2, "both addresses come along");
    assert_eq!(data(&asked(&format!("_dns._udp.{CART}"), RecordType::SRV, &cart).unwrap()).len(), 1);
    for name in ["_dns._tcp.", "_grpc._tcp."] {
        let reply = asked(&format!("{name}{CART}"), RecordType::SRV, &cart).unwrap();
        assert_eq!(reply.code, ResponseCode::NXDomain, "{name}");
    }
    let reply = asked(&format!("_http._tcp.{CART}"), RecordType::A, &cart).unwrap();
    assert_eq!((reply.code, reply.answers.len()), (ResponseCode::NoError, 0));
}

#[test]
fn a_service_entrys_host_is_answered_and_its_mail_is_forwarded() {
    let entry = service("*.example.com", &["240.240.0.9"]);
    assert_eq!(data(&asked("api.example.com.", RecordType::A, &entry).unwrap()), ["240.240.0.9"]);
    assert_eq!(asked("api.example.com.", RecordType::AAAA, &entry).unwrap().code, ResponseCode::NoError);
    assert_eq!(asked("api.example.com.", RecordType::HTTPS, &entry).unwrap().answers, []);
    assert_eq!(asked("api.example.com.", RecordType::MX, &entry), None);
    assert_eq!(asked("api.example.com.", RecordType::A, &service("api.example.com", &[])), None, "no address declared");
}

#[test]
fn what_is_not_the_meshs_is_forwarded_without_asking_where_it_cannot_be() {
    assert_eq!(asked("example.com.", RecordType::A, &Answer::Absent), None);
    assert_eq!(asked("example.com.", RecordType::A, &Answer::Unanswered), None);
    for name in [
        "localhost.",
        ".",
        "7.0.240.240.in-addr.arpa.",
        "kubernetes.cluster.local.",
        "cart.shop.svc.clusterset.local.shop.svc.cluster.local.",
    ] {
        assert_eq!(lookup(&question(name, RecordType::A)), Lookup::Forward, "{name}");
    }
    assert!(matches!(lookup(&question("cart.shop.svc.cluster.local.", RecordType::A)), Lookup::Ask(_)));
    assert!(matches!(lookup(&question("notclusterset.local.", RecordType::A)), Lookup::Ask(_)), "another zone");
}

#[test]
fn any_is_answered_with_one_small_record_and_never_forwarded() {
    let cart = service("cart.shop.svc.clusterset.local", &["240.240.0.7", "fd00::7"]);
    let question = question(CART, RecordType::ANY);
    let reply = asked(CART, RecordType::ANY, &cart).unwrap();
    let answer = encode(&question.reply(reply), 512).unwrap();
    let sent = question.forward(1).to_vec().unwrap();
    assert!(answer.len() <= 3 * sent.len(), "{} bytes for {}", answer.len(), sent.len());
    for name in ["example.com.", "localhost."] {
        let reply = asked(name, RecordType::ANY, &Answer::Absent).unwrap();
        assert_eq!(reply.code, ResponseCode::Refused, "{name}");
    }
}
