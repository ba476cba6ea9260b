//! Reading a node strictly: every field is taken, ignored by name, or refused.
//!
//! Nothing here stops at a problem: it is noted in the [`Report`] and reading goes on with `None`, so
//! that a user sees all problems of a file at once. A value read from a file with problems is never used.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::report::{NO_EFFECT, Place, Problem, Refusal, Report, Warning};
use crate::suggest::nearest;
use crate::tree::{Node, Value};

/// A node and the path that leads to it.
#[derive(Debug, Clone)]
pub(crate) struct Item<'a> {
    pub(crate) node: &'a Node,
    pub(crate) path: String,
}

impl<'a> Item<'a> {
    pub(crate) fn place(&self, report: &Report) -> Place {
        let Node { line, column, .. } = *self.node;
        Place { file: report.file.clone(), line, column, path: self.path.clone() }
    }

    /// Refuses this value.
    pub(crate) fn refuse(
        &self,
        report: &mut Report,
        problem: Problem,
        message: impl Into<String>,
        fix: impl Into<String>,
    ) {
        let (place, value) = (self.place(report), Some(self.node.shown()));
        report.refuse(Refusal { place, problem, value, message: message.into(), fix: fix.into() });
    }

    /// Refuses this value as impossible: "VALUE is WHAT; FIX".
    pub(crate) fn impossible(&self, report: &mut Report, what: impl Display, fix: impl Into<String>) {
        self.refuse(report, Problem::Impossible, format!("{} {what}", self.node.shown()), fix);
    }

    /// Refuses this value as meaningful, but not served.
    pub(crate) fn not_supported(&self, report: &mut Report, fix: impl Into<String>) {
        let name = self.path.rsplit('.').next().unwrap_or_default();
        self.refuse(report, Problem::NotSupported, format!("{name} is not supported yet"), fix);
    }

    pub(crate) fn warn(&self, report: &mut Report, code: &'static str, message: impl Into<String>) {
        let warning = Warning { code, place: self.place(report), message: message.into() };
        report.warn(warning);
    }

    fn wrong_type(&self, report: &mut Report, wanted: &str) {
        let quote = wanted == "a text" && !matches!(self.node.value, Value::List(_) | Value::Map(_));
        let fix = if quote { "put it in quotes".to_owned() } else { format!("write {wanted}") };
        self.refuse(report, Problem::WrongType, format!("{} is not {wanted}", self.node.shown()), fix);
    }

    pub(crate) fn text(&self, report: &mut Report) -> Option<&'a str> {
        match &self.node.value {
            Value::Text(text) => Some(text),
            _ => {
                self.wrong_type(report, "a text");
                None
            }
        }
    }

    pub(crate) fn bool(&self, report: &mut Report) -> Option<bool> {
        match self.node.value {
            Value::Bool(value) => Some(value),
            _ => {
                self.wrong_type(report, "true or false");
                None
            }
        }
    }

    /// A whole number within `range`.
    pub(crate) fn number(&self, report: &mut Report, range: RangeInclusive<u32>) -> Option<u32> {
        let Value::Integer(value) = self.node.value else {
            self.wrong_type(report, "a whole number");
            return None;
        };
        let fits = u32::try_from(value).ok().filter(|value| range.contains(value));
        if fits.is_none() {
            self.impossible(report, "is out of range", format!("use {} to {}", range.start(), range.end()));
        }
        fits
    }

    /// A port number, 1-65535.
    pub(crate) fn port(&self, report: &mut Report) -> Option<u16> {
        self.number(report, 1..=65_535).and_then(|port| u16::try_from(port).ok())
    }

    /// A text that `T` parses; its error says what is wrong and what to write.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(&self, report: &mut Report, fix: &str) -> Option<T> {
        let text = self.text(report)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.refuse(report, Problem::Impossible, error.to_string(), fix);
                None
            }
        }
    }

    /// One of the words of a table.
    pub(crate) fn word<T: Copy>(&self, report: &mut Report, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(report)?;
        let hit = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if hit.is_none() {
            let all = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            let fix = match nearest(text, words.iter().map(|(word, _)| *word)) {
                Some(meant) => format!("did you mean {meant}? (one of {all})"),
                None => format!("use one of {all}"),
            };
            self.impossible(report, "is not a known value", fix);
        }
        hit
    }

    /// The items of a list.
    pub(crate) fn list(&self, report: &mut Report) -> Vec<Item<'a>> {
        match &self.node.value {
            Value::List(items) => {
                let at = |(n, node)| Item { node, path: format!("{}[{n}]", self.path) };
                items.iter().enumerate().map(at).collect()
            }
            _ => {
                self.wrong_type(report, "a list");
                Vec::new()
            }
        }
    }

    /// A map of fields, to be taken one by one; end with [`Fields::finish`].
    pub(crate) fn fields(&self, report: &mut Report) -> Option<Fields<'a>> {
        let entries = self.map(report)?;
        let taken = vec![false; entries.len()];
        Some(Fields { item: self.clone(), entries, taken, known: Vec::new() })
    }

    /// A map whose keys are the user's: labels, headers, ports. A key that stands twice is refused.
    pub(crate) fn pairs(&self, report: &mut Report) -> Vec<(&'a Node, Item<'a>)> {
        let pairs = self.map(report).unwrap_or_default().iter();
        pairs.map(|(key, node)| (key, Item { node, path: format!("{}.{}", self.path, key.key()) })).collect()
    }

    fn map(&self, report: &mut Report) -> Option<&'a [(Node, Node)]> {
        let Value::Map(entries) = &self.node.value else {
            self.wrong_type(report, "a map");
            return None;
        };
        let mut seen: std::collections::BTreeMap<String, u32> = std::collections::BTreeMap::new();
        for (key, _) in entries {
            if let Some(first) = seen.get(&key.key()) {
                let at = Item { node: key, path: join(&self.path, &key.key()) };
                let message = format!("{:?} is there twice, first in line {first}", key.key());
                at.refuse(report, Problem::Duplicate, message, "remove one of them");
            } else {
                seen.insert(key.key(), key.line);
            }
        }
        Some(entries)
    }
}

/// `path.name`, without a dot in front of the first.
fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The fields of a map, and which of them were looked at.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    item: Item<'a>,
    entries: &'a [(Node, Node)],
    taken: Vec<bool>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The map itself.
    pub(crate) fn item(&self) -> &Item<'a> {
        &self.item
    }

    /// The field `name`, if it is there and not null.
    pub(crate) fn take(&mut self, name: &'static str) -> Option<Item<'a>> {
        self.known.push(name);
        let mut hit = None;
        for (entry, taken) in self.entries.iter().zip(&mut self.taken) {
            if entry.0.key() == name {
                *taken = true;
                hit = hit.or(Some(&entry.1));
            }
        }
        let node = hit.filter(|node| node.value != Value::Null)?;
        Some(Item { node, path: join(&self.item.path, name) })
    }

    /// The field `name`; refuses if it is not there.
    pub(crate) fn need(&mut self, name: &'static str, report: &mut Report) -> Option<Item<'a>> {
        let item = self.take(name);
        if item.is_none() {
            self.missing(name, report, "add it");
        }
        item
    }

    /// Refuses that `name` is not there.
    pub(crate) fn missing(&self, name: &str, report: &mut Report, fix: &str) {
        let place = Place { path: join(&self.item.path, name), ..self.item.place(report) };
        let message = format!("{name} is missing");
        report.refuse(Refusal { place, problem: Problem::Missing, value: None, message, fix: fix.to_owned() });
    }

    /// The items of the list `name`; empty if it is not there.
    pub(crate) fn list(&mut self, name: &'static str, report: &mut Report) -> Vec<Item<'a>> {
        self.take(name).map(|item| item.list(report)).unwrap_or_default()
    }

    /// Fields that have no meaning to anybody but the API server.
    pub(crate) fn ignore(&mut self, names: &[&'static str]) {
        for name in names {
            self.take(name);
        }
    }

    /// Fields that do nothing here and harm nobody by that: a warning each.
    pub(crate) fn no_effect(&mut self, names: &[&'static str], why: &str, report: &mut Report) {
        for name in names {
            if let Some(item) = self.take(name) {
                item.warn(report, NO_EFFECT, format!("field {name} has no effect: {why}"));
            }
        }
    }

    /// Fields that mean something and are not served: refused.
    pub(crate) fn not_supported(&mut self, names: &[&'static str], report: &mut Report) {
        for name in names {
            if let Some(item) = self.take(name) {
                item.not_supported(report, "remove it; ignoring it would change what the object means");
            }
        }
    }

    /// Refuses every field that nobody asked for.
    pub(crate) fn finish(self, report: &mut Report) {
        for ((key, value), _) in self.entries.iter().zip(&self.taken).filter(|(_, taken)| !**taken) {
            let name = key.key();
            let fix = match nearest(&name, self.known.iter().copied()) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("remove it; known here: {}", known(&self.known)),
            };
            let at = Item { node: key, path: join(&self.item.path, &name) };
            let place = at.place(report);
            let message = format!("unknown field {:?}", name.chars().take(64).collect::<String>());
            let value = Some(value.shown());
            report.refuse(Refusal { place, problem: Problem::UnknownField, value, message, fix });
        }
    }
}

fn known(names: &[&'static str]) -> String {
    let mut all = names.to_vec();
    all.sort_unstable();
    all.dedup();
    all.join(", ")
}
