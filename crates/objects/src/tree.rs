//! YAML as written: every node with its line and column. Knows nothing of kinds.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Spanned};

/// A node and where it stands (from 1; 0 is unknown).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) value: Value,
}

/// What a node holds. Keys that are no text are kept as the text they were written in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    /// With a fraction, or beyond 64 bits.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// In the order written; a key may stand twice, which the reader of the map refuses.
    Map(Vec<(Node, Node)>),
}

/// Why a text is not YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) line: u32,
    pub(crate) column: u32,
    pub(crate) message: String,
}

/// All documents of `text`, empty ones left out. Aliases and nesting are bounded by the parser's budget.
pub(crate) fn documents(text: &str) -> Result<Vec<Node>, SyntaxError> {
    let options = serde_saphyr::options! {
        // Reported by ourselves, with all other problems of the file.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // `on` and `yes` are words, not booleans (YAML 1.2).
        strict_booleans: true,
        with_snippet: false,
        // A file's length bounds everything but what its aliases repeat; nobody repeats more than this by
        // hand. Without comments and spaces, 20,000 small objects fit into a file of the largest length.
        budget: serde_saphyr::budget! { max_documents: 100_000, max_nodes: 1_000_000, max_events: 4_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 50_000 },
    };
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
        let place = error.location();
        let number = |value: Option<u64>| value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
        SyntaxError {
            line: number(place.map(|place| place.line())),
            column: number(place.map(|place| place.column())),
            message: error.without_snippet().to_string(),
        }
    })
}

impl Node {
    /// The value as a user would recognise it, at most 64 characters.
    pub(crate) fn shown(&self) -> String {
        match &self.value {
            Value::Null => "null".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Text(text) => format!("{:?}", text.chars().take(64).collect::<String>()),
            Value::List(items) => format!("a list of {}", items.len()),
            Value::Map(entries) => {
                let keys = entries.iter().take(4).map(|(key, _)| key.key()).collect::<Vec<_>>().join(", ");
                format!("a map of {{{keys}}}").chars().take(64).collect()
            }
        }
    }

    /// A map key as text.
    pub(crate) fn key(&self) -> String {
        match &self.value {
            Value::Text(text) => text.clone(),
            _ => self.shown(),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        let number = |value: u64| u32::try_from(value).unwrap_or(0);
        let place = spanned.referenced;
        Ok(Self { line: number(place.line()), column: number(place.column()), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        // Beyond 63 bits no field of any kind has a meaning; the exact digits do not matter then.
        Ok(i64::try_from(value).map_or(Value::Float(value as f64), Value::Integer))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_know_their_lines_across_documents() {
        let all = documents("a: 1\n---\n# nothing\n---\nb:\n  - x\n  - c: true\n").expect("valid");
        assert_eq!(all.len(), 2);
        let Value::Map(entries) = &all[1].value else { panic!("a map") };
        assert_eq!((entries[0].0.key().as_str(), entries[0].0.line, entries[0].0.column), ("b", 5, 1));
        let Value::List(items) = &entries[0].1.value else { panic!("a list") };
        assert_eq!((items[0].line, &items[0].value), (6, &Value::Text("x".into())));
        let Value::Map(inner) = &items[1].value else { panic!("a map") };
        assert_eq!((inner[0].1.line, inner[0].1.column, &inner[0].1.value), (7, 8, &Value::Bool(true)));
    }

    #[test]
    fn scalars_keep_their_types() {
        let all = documents("[1, 1.5, '1', yes, ~, true, 18446744073709551615, 0x10]").expect("valid");
        let Value::List(items) = &all[0].value else { panic!("a list") };
        let values: Vec<_> = items.iter().map(|item| item.value.clone()).collect();
        let text = |text: &str| Value::Text(text.into());
        let huge = Value::Float(18_446_744_073_709_551_615.0);
        assert_eq!(
            values,
            [
                Value::Integer(1),
                Value::Float(1.5),
                text("1"),
                text("yes"),
                Value::Null,
                Value::Bool(true),
                huge,
                Value::Integer(16)
            ]
        );
    }

    #[test]
    fn what_is_not_yaml_is_refused_with_its_line() {
        let error = documents("a: 1\nb: [1, 2\nc: 3\n").expect_err("unclosed");
        assert!(error.line >= 2, "{error:?}");
        assert!(documents("a: &x [*x]").is_err(), "an alias of itself");
        let bomb = format!(
            "a0: &a0 [x]\n{}",
            (1..30).fold(String::new(), |all, n| { format!("{all}a{n}: &a{n} [*a{0}, *a{0}, *a{0}, *a{0}]\n", n - 1) })
        );
        assert!(documents(&bomb).is_err(), "aliases that grow without bound");
    }

    #[test]
    fn a_file_of_thousands_of_objects_is_read() {
        let service = "---\napiVersion: v1\nkind: Service\nspec: {ports: [{port: 80}], selector: {app: cart}}\n";
        assert_eq!(documents(&service.repeat(5_000)).expect("valid").len(), 5_000);
    }
}
