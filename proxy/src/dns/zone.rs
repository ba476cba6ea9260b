//! What the mesh says to a question. Pure.

use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, HINFO, SOA, SRV};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use isthmus_model::Host;
use isthmus_model::names::{CLUSTER_ZONE, MESH_ZONE};
use isthmus_model::service::Protocol;
use isthmus_model::view::ServiceView;

use super::message::{Question, Reply};
use crate::discovery::Answer;

/// How long answers may be kept: addresses are stable, but a name that has just been exported must
/// be found soon by who asked a moment before.
pub const TTL_S: u32 = 5;
/// Addresses in one answer: more than a host has (one virtual address per family), and below 1,232 bytes.
const ADDRESSES_MAX: usize = 32;

/// What has to be known for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// Nothing: this is it.
    Reply(Box<Reply>),
    /// What the mesh knows of a host.
    Ask(Ask),
    /// Not ours: the upstream's business.
    Forward,
}

/// A question to the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// The host.
    pub host: Host,
    /// Of `_port._proto.host`: the port's name, and whether it is a UDP port.
    port: Option<(String, bool)>,
}

/// Whether `host` is in the zone that only the mesh knows (label `zone="mesh"`).
pub fn is_mesh_zone(host: Option<&Host>) -> bool {
    host.is_some_and(|host| is_in(host.as_str(), MESH_ZONE))
}

fn is_in(host: &str, zone: &str) -> bool {
    host.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// What an answer to `question` takes.
pub fn lookup(question: &Question) -> Lookup {
    let Some(host) = &question.host else {
        // Not the name of any host; below the mesh's zone only the mesh could say so.
        let name = question.query.name().to_ascii().to_ascii_lowercase();
        let ours = is_in(name.trim_end_matches('.'), MESH_ZONE);
        return if ours { fixed(negative(ResponseCode::NXDomain, MESH_ZONE)) } else { unknown(question) };
    };
    let (host, port) = match service_name(host) {
        Some((host, port, udp)) => (host, Some((port, udp))),
        None => (host.clone(), None),
    };
    if is_in(host.as_str(), MESH_ZONE) {
        return if host.service().is_some() {
            Lookup::Ask(Ask { host, port })
        } else {
            fixed(structure(question, &host))
        };
    }
    let declared = host.as_str().contains('.')
        && !is_in(host.as_str(), "arpa")
        && (!is_in(host.as_str(), CLUSTER_ZONE) || host.service().is_some());
    if declared { Lookup::Ask(Ask { host, port }) } else { unknown(question) }
}

/// The answer, given what the mesh said; `None` means: forward it.
pub fn answer(question: &Question, ask: &Ask, said: &Answer) -> Option<Reply> {
    let in_zone = is_in(ask.host.as_str(), MESH_ZONE);
    match said {
        Answer::Known(service) if in_zone || !service.addresses.is_empty() => known(question, ask, service),
        _ if question.kind() == RecordType::ANY && !in_zone => Some(Reply::code(ResponseCode::Refused)),
        Answer::Absent if in_zone => Some(negative(ResponseCode::NXDomain, MESH_ZONE)),
        Answer::Unanswered if in_zone => Some(Reply::code(ResponseCode::ServFail)),
        // A ServiceEntry without an address is looked up where it lives.
        Answer::Known(_) | Answer::Absent | Answer::Unanswered => None,
    }
}

/// What an upstream's reply becomes when no gateway said whether the mesh has the name: the
/// upstream's "no such name" is not the last word then.
pub fn doubt(said: &Answer, reply: Reply) -> Reply {
    match (said, reply.code) {
        (Answer::Unanswered, ResponseCode::NXDomain) => Reply::code(ResponseCode::ServFail),
        _ => reply,
    }
}

fn known(question: &Question, ask: &Ask, service: &ServiceView) -> Option<Reply> {
    let in_zone = is_in(ask.host.as_str(), MESH_ZONE);
    let owner = question.query.name();
    let zone = if in_zone { MESH_ZONE } else { ask.host.as_str() };
    let positive = |answers: Vec<Record>, additionals| {
        if answers.is_empty() {
            return negative(ResponseCode::NoError, zone);
        }
        Reply { authoritative: true, answers, additionals, ..Reply::code(ResponseCode::NoError) }
    };
    if let Some((port, udp)) = &ask.port {
        let ports = service
            .ports
            .iter()
            .filter(|found| found.name.eq_ignore_ascii_case(port) && (found.protocol == Protocol::Udp) == *udp);
        let target = name(ask.host.as_str());
        let answers: Vec<Record> = ports.map(|port| srv(owner, port.number, &target)).collect();
        return Some(match question.kind() {
            _ if answers.is_empty() => negative(ResponseCode::NXDomain, zone),
            RecordType::SRV => positive(answers, addresses(&target, service, |_| true)),
            _ => negative(ResponseCode::NoError, zone),
        });
    }
    match question.kind() {
        RecordType::A => Some(positive(addresses(owner, service, IpAddr::is_ipv4), vec![])),
        RecordType::AAAA => Some(positive(addresses(owner, service, IpAddr::is_ipv6), vec![])),
        // One record instead of all (RFC 8482): an answer must not be a multiple of its question.
        RecordType::ANY => {
            let minimal = RData::HINFO(HINFO::new("RFC8482".to_owned(), String::new()));
            Some(positive(vec![Record::from_rdata(owner.clone(), TTL_S, minimal)], vec![]))
        }
        // Their hints would lead around the virtual address.
        RecordType::HTTPS | RecordType::SVCB | RecordType::SRV => Some(negative(ResponseCode::NoError, zone)),
        // Mail, text and the rest of a name outside are not the mesh's.
        _ if !in_zone => None,
        _ => Some(negative(ResponseCode::NoError, zone)),
    }
}

/// Names of the zone itself: they exist without having addresses, so that a resolver that takes
/// "no such name" for everything below (RFC 8020) does not hide the services.
fn structure(question: &Question, host: &Host) -> Reply {
    let labels: Vec<&str> = host.as_str().split('.').rev().collect();
    let exists = matches!(
        labels[..],
        ["local", "clusterset"] | ["local", "clusterset", "svc"] | ["local", "clusterset", "svc", _]
    );
    let is_apex = labels.len() == 2;
    if is_apex && question.kind() == RecordType::SOA {
        let answers = vec![soa(MESH_ZONE)];
        return Reply { authoritative: true, answers, ..Reply::code(ResponseCode::NoError) };
    }
    negative(if exists { ResponseCode::NoError } else { ResponseCode::NXDomain }, MESH_ZONE)
}

fn unknown(question: &Question) -> Lookup {
    match question.kind() {
        RecordType::ANY => fixed(Reply::code(ResponseCode::Refused)),
        _ => Lookup::Forward,
    }
}

fn fixed(reply: Reply) -> Lookup {
    Lookup::Reply(Box::new(reply))
}

/// `_port._tcp.host` in its parts (RFC 2782).
fn service_name(host: &Host) -> Option<(Host, String, bool)> {
    let (port, rest) = host.as_str().strip_prefix('_')?.split_once('.')?;
    let (udp, rest) = match rest.split_once('.')? {
        ("_tcp", rest) => (false, rest),
        ("_udp", rest) => (true, rest),
        _ => return None,
    };
    Some((rest.parse().ok()?, port.to_owned(), udp))
}

fn addresses(owner: &Name, service: &ServiceView, wanted: impl Fn(&IpAddr) -> bool) -> Vec<Record> {
    let record = |address: &IpAddr| {
        let data = match address {
            IpAddr::V4(address) => RData::A(A(*address)),
            IpAddr::V6(address) => RData::AAAA(AAAA(*address)),
        };
        Record::from_rdata(owner.clone(), TTL_S, data)
    };
    service.addresses.iter().filter(|address| wanted(address)).take(ADDRESSES_MAX).map(record).collect()
}

fn srv(owner: &Name, port: u16, target: &Name) -> Record {
    Record::from_rdata(owner.clone(), TTL_S, RData::SRV(SRV::new(0, 100, port, target.clone())))
}

fn negative(code: ResponseCode, zone: &str) -> Reply {
    Reply { authoritative: true, authorities: vec![soa(zone)], ..Reply::code(code) }
}

/// The last number is how long "there is none" may be kept (RFC 2308).
fn soa(zone: &str) -> Record {
    const REFRESH_S: i32 = 7200;
    const RETRY_S: i32 = 1800;
    const EXPIRE_S: i32 = 86_400;
    let (server, master) = (name(&format!("ns.{zone}")), name(&format!("hostmaster.{zone}")));
    let data = SOA::new(server, master, 1, REFRESH_S, RETRY_S, EXPIRE_S, TTL_S);
    Record::from_rdata(name(zone), TTL_S, RData::SOA(data))
}

/// A host as a DNS name; the root where a prefix made it longer than a name can be.
fn name(host: &str) -> Name {
    let mut name = Name::from_ascii(host).unwrap_or_else(|_| Name::root());
    name.set_fqdn(true);
    name
}

#[cfg(test)]
#[path = "zone_tests.rs"]
mod tests;
