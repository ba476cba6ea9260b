//! A DNS packet as a question, or as the refusal it deserves. Pure.
//!
//! Everything here is read from whoever can reach the port: no byte of it makes us allocate more than
//! the packet, panic, answer twice, or answer an answer (two servers would keep each other busy).

use hickory_proto::op::{DEFAULT_MAX_PAYLOAD_LEN, Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};
use isthmus_model::Host;

/// Longest UDP answer whatever the asker says it can take: fits every path without fragments
/// (DNS flag day 2020).
pub const UDP_ANSWER_MAX: u16 = 1232;
/// Longest UDP answer to who says nothing (RFC 1035 section 4.2.1).
const UDP_ANSWER_PLAIN: u16 = 512;
/// Length of a message's header.
const HEADER_LEN: usize = 12;
/// Records a question may carry behind the question: OPT, and a signature or cookie.
const ADDITIONALS_MAX: u16 = 2;

/// How a message travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One packet.
    Udp,
    /// Length-prefixed in a stream.
    Tcp,
}

/// What to do with a packet.
#[derive(Debug)]
pub enum Verdict {
    /// Nothing: it is an answer, or too short to have an id.
    Ignore,
    /// Send this back: the packet is no question that we take.
    Refuse(Box<Message>),
    /// Answer it.
    Ask(Box<Question>),
}

/// One question, with all that its answer depends on.
#[derive(Debug, Clone)]
pub struct Question {
    id: u16,
    recursion_desired: bool,
    /// The asker does not want answers checked (RFC 4035 section 3.2.2).
    pub checking_disabled: bool,
    /// What is asked, spelled as the asker did: some compare the echo byte by byte.
    pub query: Query,
    /// The name as a host, if it can be one.
    pub host: Option<Host>,
    edns: Option<Asked>,
}

/// What the asker's OPT record says.
#[derive(Debug, Clone, Copy)]
struct Asked {
    payload: u16,
    dnssec_ok: bool,
}

/// The records of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The result.
    pub code: ResponseCode,
    /// Whether it is our own word.
    pub authoritative: bool,
    /// Whether the upstream cut it.
    pub truncated: bool,
    /// Records asked for.
    pub answers: Vec<Record>,
    /// Of a negative answer, the zone's SOA.
    pub authorities: Vec<Record>,
    /// Addresses of names in the answer.
    pub additionals: Vec<Record>,
}

impl Reply {
    /// Just a code.
    pub fn code(code: ResponseCode) -> Self {
        Self { code, authoritative: false, truncated: false, answers: vec![], authorities: vec![], additionals: vec![] }
    }
}

/// Judges one packet.
pub fn read(packet: &[u8]) -> Verdict {
    let Some(header) = packet.first_chunk::<HEADER_LEN>() else { return Verdict::Ignore };
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let is_answer = header[2] & 0x80 != 0;
    if is_answer {
        return Verdict::Ignore;
    }
    let opcode = OpCode::from_u8((header[2] >> 3) & 0x0f);
    let refuse = |code| Verdict::Refuse(Box::new(Message::error_msg(word(0), opcode, code)));
    if opcode != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    // Before the decoder sees it: it would make room for as many questions as the header claims.
    let (questions, answers, authorities, additionals) = (word(4), word(6), word(8), word(10));
    if questions != 1 || answers != 0 || authorities != 0 || additionals > ADDITIONALS_MAX {
        return refuse(ResponseCode::FormErr);
    }
    let Ok(message) = Message::from_vec(packet) else { return refuse(ResponseCode::FormErr) };
    judge(message)
}

fn judge(message: Message) -> Verdict {
    let Some(query) = message.queries.first().cloned() else { return Verdict::Ignore };
    let question = Question {
        id: message.metadata.id,
        recursion_desired: message.metadata.recursion_desired,
        checking_disabled: message.metadata.checking_disabled,
        host: host(query.name()),
        edns: message
            .edns
            .as_ref()
            .map(|edns| Asked { payload: edns.max_payload(), dnssec_ok: edns.flags().dnssec_ok }),
        query,
    };
    let refuse = |code| Verdict::Refuse(Box::new(question.reply(Reply::code(code))));
    if message.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return refuse(ResponseCode::BADVERS);
    }
    let transfer = matches!(question.query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if transfer || question.query.query_class() != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    Verdict::Ask(Box::new(question))
}

/// A name without a root label, wildcard or odd byte, in lower case.
fn host(name: &Name) -> Option<Host> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        // A dot inside a label is not the dot between two.
        if label.contains(&b'.') || label == b"*" {
            return None;
        }
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(std::str::from_utf8(label).ok()?);
    }
    text.parse().ok()
}

impl Question {
    /// The type asked for.
    pub fn kind(&self) -> RecordType {
        self.query.query_type()
    }

    /// Whether the asker wants DNSSEC records.
    pub fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// Longest answer that the asker takes.
    pub fn answer_max(&self, transport: Transport) -> u16 {
        match (transport, self.edns) {
            (Transport::Tcp, _) => u16::MAX,
            (Transport::Udp, Some(edns)) => edns.payload.clamp(UDP_ANSWER_PLAIN, UDP_ANSWER_MAX),
            (Transport::Udp, None) => UDP_ANSWER_PLAIN,
        }
    }

    /// `reply` as an answer to this question.
    pub fn reply(&self, reply: Reply) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.checking_disabled;
        message.metadata.authoritative = reply.authoritative;
        message.metadata.truncation = reply.truncated;
        message.metadata.response_code = reply.code;
        message.queries = vec![self.query.clone()];
        message.answers = reply.answers;
        message.authorities = reply.authorities;
        message.additionals = reply.additionals;
        message.edns = self.edns.map(|_| edns(false));
        message
    }

    /// The same question for an upstream, under the number `id`.
    pub fn forward(&self, id: u16) -> Message {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.checking_disabled = self.checking_disabled;
        message.queries = vec![self.query.clone()];
        message.edns = self.edns.map(|asked| edns(asked.dnssec_ok));
        message
    }

    /// The answer in `packet`, if it is one to this question under the number `id`.
    pub fn read_answer(&self, packet: &[u8], id: u16) -> Option<Reply> {
        let header = packet.first_chunk::<HEADER_LEN>()?;
        // As in `read`: the decoder makes room for what the header claims.
        if header[..2] != id.to_be_bytes() || header[4..6] != [0, 1] {
            return None;
        }
        let message = Message::from_vec(packet).ok()?;
        let asked = &self.query;
        let echoed = message.queries.first()?;
        let same = echoed.name().eq_ignore_root(asked.name())
            && echoed.query_type() == asked.query_type()
            && echoed.query_class() == asked.query_class();
        (message.metadata.message_type == MessageType::Response && same).then_some(Reply {
            code: message.metadata.response_code,
            authoritative: false,
            truncated: message.metadata.truncation,
            answers: message.answers,
            authorities: message.authorities,
            additionals: message.additionals,
        })
    }
}

fn edns(dnssec_ok: bool) -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_ANSWER_MAX.min(DEFAULT_MAX_PAYLOAD_LEN)).set_version(0).set_dnssec_ok(dnssec_ok);
    edns
}

/// `message` as bytes, cut (TC) to `answer_max`; `None` if it cannot be written at all.
pub fn encode(message: &Message, answer_max: u16) -> Option<Vec<u8>> {
    let bytes = message.to_vec().ok();
    let fits = |bytes: &Vec<u8>| bytes.len() <= usize::from(answer_max);
    bytes.filter(fits).or_else(|| message.truncate().to_vec().ok().filter(fits))
}

/// A code as a metric label.
pub fn code_name(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "OTHER",
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
