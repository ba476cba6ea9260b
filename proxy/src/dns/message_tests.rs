//! Packets that no resolver sends, and what becomes of them.

use hickory_proto::rr::RData;
use hickory_proto::rr::rdata::A;

use super::*;

const ID: u16 = 0x1234;

/// A question for `name`, written by hand: the point is what a correct encoder would never write.
fn packet(name: &[u8], kind: u16) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34, 0x01, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    packet.extend_from_slice(name);
    packet.extend_from_slice(&kind.to_be_bytes());
    packet.extend_from_slice(&[0, 1]);
    packet
}

fn good() -> Vec<u8> {
    packet(b"\x04cart\x04shop\x03svc\x0aclusterset\x05local\0", 1)
}

fn with_opt(mut packet: Vec<u8>, payload: u16, version: u8) -> Vec<u8> {
    packet[11] += 1;
    let [high, low] = payload.to_be_bytes();
    packet.extend_from_slice(&[0, 0, 41, high, low, 0, version, 0, 0, 0, 0]);
    packet
}

fn refusal(packet: &[u8]) -> ResponseCode {
    match read(packet) {
        Verdict::Refuse(message) => {
            assert_eq!(message.metadata.id, ID);
            let answer = encode(&message, UDP_ANSWER_PLAIN).expect("encodes");
            assert!(answer.len() <= packet.len().max(HEADER_LEN) + 11, "never a bigger answer than question and OPT");
            message.metadata.response_code
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn asked(packet: &[u8]) -> Question {
    match read(packet) {
        Verdict::Ask(question) => *question,
        other => panic!("not a question: {other:?}"),
    }
}

#[test]
fn a_question_is_read_with_its_host() {
    let question = asked(&packet(b"\x04CarT\x04shop\x03svc\x0aclusterset\x05local\0", 28));
    assert_eq!(question.host, "cart.shop.svc.clusterset.local".parse().ok());
    assert_eq!(question.kind(), RecordType::AAAA);
    let echoed = question.reply(Reply::code(ResponseCode::NoError)).queries[0].name().to_ascii();
    assert_eq!(echoed, "CarT.shop.svc.clusterset.local.", "spelled as asked");
}

#[test]
fn answers_and_scraps_are_ignored() {
    let mut answer = good();
    answer[2] |= 0x80;
    assert!(matches!(read(&answer), Verdict::Ignore));
    for length in 0..HEADER_LEN {
        assert!(matches!(read(&good()[..length]), Verdict::Ignore));
    }
}

#[test]
fn what_is_no_question_of_ours_is_refused_by_name() {
    let changed = |at: usize, byte: u8| {
        let mut packet = good();
        packet[at] = byte;
        packet
    };
    assert_eq!(refusal(&changed(2, 0x28)), ResponseCode::NotImp, "dynamic update");
    assert_eq!(refusal(&changed(2, 0x20)), ResponseCode::NotImp, "notify");
    for (at, what) in [(4, "65,281 questions"), (6, "answers"), (8, "authorities"), (10, "65,280 additionals")] {
        assert_eq!(refusal(&changed(at, 0xff)), ResponseCode::FormErr, "{what}");
    }
    assert_eq!(refusal(&changed(5, 0)), ResponseCode::FormErr, "no question");
    assert_eq!(refusal(&good()[..20]), ResponseCode::FormErr, "cut");
    for kind in [251, 252] {
        assert_eq!(refusal(&packet(b"\x05local\0", kind)), ResponseCode::Refused, "zone transfer");
    }
    let mut chaos = packet(b"\x07version\x04bind\0", 16);
    let end = chaos.len();
    chaos[end - 1] = 3;
    assert_eq!(refusal(&chaos), ResponseCode::Refused, "class CHAOS");
}

#[test]
fn names_that_point_at_themselves_or_are_too_long_are_refused() {
    let mut long = vec![];
    for _ in 0..5 {
        long.push(63);
        long.extend([b'a'; 63]);
    }
    long.push(0);
    let mut label = vec![64];
    label.extend([b'a'; 64]);
    label.push(0);
    for (name, what) in [
        (&b"\xc0\x0c"[..], "pointer to itself"),
        (b"\xc0\xff", "pointer beyond the end"),
        (b"\x01a\xc0\x0e", "pointer forward"),
        (b"\x80\0", "reserved label kind"),
        (&label, "label of 64 bytes"),
        (&long, "name of 321 bytes"),
    ] {
        assert_eq!(refusal(&packet(name, 1)), ResponseCode::FormErr, "{what}");
    }
}

#[test]
fn edns_is_bounded_versioned_and_single() {
    assert_eq!(asked(&good()).answer_max(Transport::Udp), 512);
    for (payload, max) in [(0, 512), (512, 512), (900, 900), (4096, 1232), (65535, 1232)] {
        assert_eq!(asked(&with_opt(good(), payload, 0)).answer_max(Transport::Udp), max, "{payload}");
    }
    assert_eq!(refusal(&with_opt(good(), 1232, 1)), ResponseCode::BADVERS);
    assert_eq!(refusal(&with_opt(with_opt(good(), 1232, 0), 1232, 0)), ResponseCode::FormErr, "two OPT");
    let Verdict::Refuse(message) = read(&with_opt(good(), 1232, 1)) else { panic!("refused") };
    let read_back = Message::from_vec(&encode(&message, 512).expect("encodes")).expect("decodes");
    // 16 has two names (RFC 6895): BADVERS in an OPT record, BADSIG in a TSIG one.
    assert_eq!(u16::from(read_back.metadata.response_code), 16, "its high bits are in the OPT");
}

#[test]
fn odd_names_are_questions_but_no_hosts() {
    for name in [&b"\x03a.b\x03com\0"[..], b"\x01*\x03com\0", b"\0", b"\x02\xff\xfe\x03com\0", b"\x03a b\0"] {
        assert_eq!(asked(&packet(name, 1)).host, None, "{name:?}");
    }
}

#[test]
fn a_long_answer_is_cut_and_says_so() {
    let question = asked(&with_opt(good(), 65535, 0));
    let name = question.query.name().clone();
    let record = |n: u8| Record::from_rdata(name.clone(), 5, RData::A(A::new(10, 0, 0, n)));
    let reply = Reply { answers: (0..200).map(record).collect(), ..Reply::code(ResponseCode::NoError) };
    let message = question.reply(reply);
    let cut = encode(&message, question.answer_max(Transport::Udp)).expect("encodes");
    assert!(cut.len() <= usize::from(UDP_ANSWER_MAX), "{}", cut.len());
    assert!(Message::from_vec(&cut).expect("decodes").metadata.truncation);
    let whole = encode(&message, question.answer_max(Transport::Tcp)).expect("encodes");
    assert_eq!(Message::from_vec(&whole).expect("decodes").answers.len(), 200);
}

#[test]
fn an_answer_must_be_to_the_question_that_was_sent() {
    let question = asked(&good());
    let answer = |change: &dyn Fn(&mut Message)| {
        let mut message = question.forward(7);
        message.metadata.message_type = MessageType::Response;
        change(&mut message);
        question.read_answer(&message.to_vec().expect("encodes"), 7)
    };
    assert!(answer(&|_| ()).is_some());
    assert!(answer(&|message| message.metadata.id = 8).is_none());
    assert!(answer(&|message| message.metadata.message_type = MessageType::Query).is_none());
    assert!(answer(&|message| message.queries.clear()).is_none());
    assert!(answer(&|message| message.queries[0].query_type = RecordType::AAAA).is_none());
    let other = Name::from_ascii("evil.example.").expect("a name");
    assert!(answer(&|message| message.queries[0].name = other.clone()).is_none());
}

/// A small generator: a failing run is its seed.
fn random(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 16).unwrap_or_default()
}

#[test]
fn no_mutated_packet_panics_or_is_answered_with_more_than_it_may() {
    let mut state = 0x1571_u64;
    let seeds =
        [good(), with_opt(good(), 4096, 0), packet(b"\x04cart\xc0\x0c", 33), with_opt(packet(b"\0", 255), 0, 0)];
    let question = asked(&good());
    for round in 0..50_000 {
        let mut packet = seeds[round % seeds.len()].clone();
        for _ in 0..1 + random(&mut state) % 6 {
            let at = random(&mut state) % packet.len();
            packet[at] = random(&mut state) as u8;
        }
        packet.truncate(1 + random(&mut state) % (packet.len() * 2));
        match read(&packet) {
            Verdict::Ignore => {}
            Verdict::Refuse(message) => {
                let answer = encode(&message, UDP_ANSWER_PLAIN).expect("encodes");
                assert!(answer.len() <= packet.len().max(HEADER_LEN) + 11, "{packet:?}");
            }
            Verdict::Ask(asked) => {
                let message = asked.reply(Reply::code(ResponseCode::ServFail));
                assert!(encode(&message, asked.answer_max(Transport::Udp)).is_some(), "{packet:?}");
            }
        }
        packet.iter_mut().take(2).for_each(|byte| *byte = 0);
        let _ = question.read_answer(&packet, 0);
    }
}
