//! Answers of the upstream, kept as long as they say, in bounded memory. Pure: `now` comes in.

use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use rustc_hash::FxHashMap;

use super::message::{Question, Reply};

/// Answers kept at most. With [`RECORDS_MAX`] records of some 300 bytes each: 2.5 MB at worst, and
/// more names than one workload talks to outside the mesh.
const ENTRIES_MAX: usize = 256;
/// Longer answers are not kept.
const RECORDS_MAX: usize = 32;
/// Longest time an answer is kept, whatever it says.
const TTL_MAX: Duration = Duration::from_secs(300);
/// Longest time "there is none" is kept: a name that was just made must be found soon.
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    name: Name,
    kind: RecordType,
    dnssec_ok: bool,
    checking_disabled: bool,
}

#[derive(Debug)]
struct Entry {
    reply: Reply,
    stored: Instant,
    until: Instant,
}

/// What upstreams said.
#[derive(Debug, Default)]
pub struct Cache(FxHashMap<Key, Entry>);

impl Cache {
    /// The reply kept for `question`, its times to live counted down.
    pub fn find(&self, question: &Question, now: Instant) -> Option<Reply> {
        let entry = self.0.get(&key(question)).filter(|entry| entry.until > now)?;
        let age = u32::try_from(now.duration_since(entry.stored).as_secs()).unwrap_or(u32::MAX);
        let mut reply = entry.reply.clone();
        for section in [&mut reply.answers, &mut reply.authorities, &mut reply.additionals] {
            section.iter_mut().for_each(|record| record.ttl = record.ttl.saturating_sub(age));
        }
        Some(reply)
    }

    /// Keeps `reply` if it says for how long.
    pub fn store(&mut self, question: &Question, reply: &Reply, now: Instant) {
        let records = reply.answers.len() + reply.authorities.len() + reply.additionals.len();
        let Some(life) = lifetime(reply).filter(|life| !life.is_zero() && records <= RECORDS_MAX) else { return };
        if self.0.len() >= ENTRIES_MAX {
            self.make_room(now);
        }
        self.0.insert(key(question), Entry { reply: reply.clone(), stored: now, until: now + life });
    }

    /// Drops what has ended, and then the half that ends soonest: random names must not cost a scan each.
    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, entry| entry.until > now);
        if self.0.len() < ENTRIES_MAX {
            return;
        }
        let mut ends: Vec<Instant> = self.0.values().map(|entry| entry.until).collect();
        let (_, median, _) = ends.select_nth_unstable(ENTRIES_MAX / 2);
        let median = *median;
        let mut left = ENTRIES_MAX / 2;
        // Many may end at the same moment: of those, as many go as needed.
        self.0.retain(|_, entry| {
            let goes = entry.until <= median && left > 0;
            left -= usize::from(goes);
            !goes
        });
    }
}

fn key(question: &Question) -> Key {
    Key {
        name: question.query.name().to_lowercase(),
        kind: question.kind(),
        dnssec_ok: question.dnssec_ok(),
        checking_disabled: question.checking_disabled,
    }
}

/// How long a reply may be kept; `None` if it may not.
fn lifetime(reply: &Reply) -> Option<Duration> {
    if reply.truncated {
        return None;
    }
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    match reply.code {
        ResponseCode::NoError if !reply.answers.is_empty() => {
            let shortest = reply.answers.iter().map(|record| record.ttl).min()?;
            Some(seconds(shortest).min(TTL_MAX))
        }
        ResponseCode::NoError | ResponseCode::NXDomain => {
            let soa = reply.authorities.iter().find_map(negative_ttl)?;
            Some(seconds(soa).min(NEGATIVE_TTL_MAX))
        }
        _ => None,
    }
}

/// RFC 2308 section 5.
fn negative_ttl(record: &Record) -> Option<u32> {
    match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::{Message, MessageType, OpCode, Query};
    use hickory_proto::rr::rdata::{A, SOA};

    use super::super::message::{Verdict, read};
    use super::*;

    fn question(name: &str) -> Question {
        let mut message = Message::new(1, MessageType::Query, OpCode::Query);
        message.queries = vec![Query::query(Name::from_ascii(name).unwrap(), RecordType::A)];
        match read(&message.to_vec().unwrap()) {
            Verdict::Ask(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    fn reply(ttl: u32) -> Reply {
        let record = Record::from_rdata(Name::from_ascii("a.example.").unwrap(), ttl, RData::A(A::new(192, 0, 2, 1)));
        Reply { answers: vec![record], ..Reply::code(ResponseCode::NoError) }
    }

    #[test]
    fn an_answer_is_kept_for_its_time_and_counts_down() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        cache.store(&question("A.example."), &reply(60), start);
        let later = cache.find(&question("a.EXAMPLE."), start + Duration::from_secs(20)).expect("kept");
        assert_eq!(later.answers[0].ttl, 40);
        assert_eq!(cache.find(&question("a.example."), start + Duration::from_secs(60)), None);
        cache.store(&question("b.example."), &reply(86_400), start);
        assert_eq!(cache.find(&question("b.example."), start + TTL_MAX), None, "not longer than our own bound");
    }

    #[test]
    fn failures_cuts_and_answers_for_now_only_are_not_kept() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for reply in [
            Reply::code(ResponseCode::ServFail),
            Reply::code(ResponseCode::Refused),
            Reply::code(ResponseCode::NXDomain),
            Reply { truncated: true, ..reply(60) },
            reply(0),
        ] {
            cache.store(&question("a.example."), &reply, now);
            assert_eq!(cache.find(&question("a.example."), now), None, "{reply:?}");
        }
    }

    #[test]
    fn no_such_name_is_kept_as_long_as_its_zone_says() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let zone = Name::from_ascii("example.").unwrap();
        let soa = |minimum| RData::SOA(SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, minimum));
        for (minimum, seconds) in [(5, 5), (3_600, 30)] {
            let authorities = vec![Record::from_rdata(zone.clone(), 900, soa(minimum))];
            cache.store(&question("x.example."), &Reply { authorities, ..Reply::code(ResponseCode::NXDomain) }, now);
            let at = |seconds| cache.find(&question("x.example."), now + Duration::from_secs(seconds)).is_some();
            assert!(at(seconds - 1) && !at(seconds), "{minimum}");
        }
    }

    #[test]
    fn random_names_do_not_grow_it() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for n in 0..5_000 {
            cache.store(&question(&format!("r{n}.example.")), &reply(60), now);
            assert!(cache.0.len() <= ENTRIES_MAX);
        }
        assert!(cache.find(&question("r4999.example."), now).is_some(), "the newest is there");
    }
}
