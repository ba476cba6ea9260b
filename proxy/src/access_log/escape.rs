//! Makes foreign text harmless inside a line. Pure.
//!
//! A terminal obeys control characters, a log reader splits at line ends and quotes, and people
//! trust what they see: C0, C1, DEL, line separators and text-direction marks are all written out.

use std::fmt::Write;

/// Longest field in bytes: nothing worth reading is longer, and one line stays below 16 KiB.
pub const FIELD_BYTES_MAX: usize = 1024;

/// Where a text field stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Between `"`.
    Quoted,
    /// Ended by a space.
    Bare,
}

/// Appends `value` to a text line, `-` for nothing.
pub fn text(line: &mut String, value: &str, place: Place) {
    if value.is_empty() {
        return line.push('-');
    }
    for c in shortened(value).chars() {
        match c {
            '"' | '\\' => line.extend(['\\', c]),
            ' ' if place == Place::Bare => line.push_str("\\x20"),
            c if is_harmful(c) => escape_bytes(line, c),
            c => line.push(c),
        }
    }
}

/// Appends `value` as a JSON string, `null` for nothing.
pub fn json(line: &mut String, value: &str) {
    if value.is_empty() {
        return line.push_str("null");
    }
    line.push('"');
    for c in shortened(value).chars() {
        match c {
            '"' | '\\' => line.extend(['\\', c]),
            c if is_harmful(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(line, "\\u{unit:04x}");
                }
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

fn escape_bytes(line: &mut String, c: char) {
    for byte in c.encode_utf8(&mut [0; 4]).bytes() {
        let _ = write!(line, "\\x{byte:02x}");
    }
}

fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn shortened(value: &str) -> &str {
    &value[..value.floor_char_boundary(FIELD_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACKS: [&str; 6] = [
        "/a\r\n[2026-01-01T00:00:00.000Z] \"GET /admin HTTP/1.1\" 200",
        "\x1b[2J\x1b]0;owned\x07",
        "\",\"response_code\":200,\"x\":\"",
        "\\\" \\u0022 \\",
        "\u{85}\u{9b}31m\u{2028}\u{202e}gnp.exe\u{7f}\0",
        "{{}} %s ${jndi:ldap://x}\t",
    ];

    #[test]
    fn no_field_ends_its_line_or_its_place() {
        for attack in ATTACKS {
            let mut quoted = String::new();
            text(&mut quoted, attack, Place::Quoted);
            assert!(!quoted.chars().any(is_harmful), "{quoted:?}");
            let unescaped = quoted.replace("\\\\", "").replace("\\\"", "");
            assert!(!unescaped.contains('"'), "{quoted:?}");
            let mut bare = String::new();
            text(&mut bare, attack, Place::Bare);
            assert!(!bare.contains(' '), "{bare:?}");
        }
    }

    #[test]
    fn json_reads_back_as_what_was_sent() {
        for attack in ATTACKS {
            let mut line = String::new();
            json(&mut line, attack);
            assert!(!line.chars().any(is_harmful), "{line:?}");
            assert_eq!(serde_json::from_str::<String>(&line).expect("valid JSON"), attack);
        }
    }

    #[test]
    fn an_endless_field_is_cut_at_a_character() {
        let mut line = String::new();
        text(&mut line, &"é".repeat(5_000), Place::Quoted);
        assert_eq!(line.chars().count(), FIELD_BYTES_MAX / 2);
        let mut line = String::new();
        json(&mut line, &"x€".repeat(5_000));
        assert!(serde_json::from_str::<String>(&line).is_ok());
    }
}
