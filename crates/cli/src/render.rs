//! Turns values into what a terminal shows. Pure but for the printing functions at the end.

use std::io::{IsTerminal as _, Write as _};

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

/// The form of `-o json`: fields are added, never renamed, within a version.
pub const API_VERSION: &str = "isthmus.io/cli/v1";

/// A table without lines: columns line up, and `cut` and `awk` still work on it.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|title| Cell::new(title).fg(Color::DarkGrey)));
    if !colored() {
        table.force_no_tty();
    }
    table
}

/// Prints a table, or a sentence if it has no rows.
pub fn print_table(mut table: Table, empty: &str) {
    if table.row_count() == 0 {
        return line(empty);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    line(&table.trim_fmt());
}

/// Prints rows for machines: `{"apiVersion", "kind", "items"}`.
pub fn print_items<T: Serialize>(kind: &str, items: &[T]) {
    print_json(&json!({ "apiVersion": API_VERSION, "kind": kind, "items": items }));
}

/// Prints one value for machines: its fields beside `apiVersion` and `kind`.
pub fn print_object<T: Serialize>(kind: &str, value: &T) {
    let mut object = json!({ "apiVersion": API_VERSION, "kind": kind });
    if let (Some(object), Ok(Value::Object(fields))) = (object.as_object_mut(), serde_json::to_value(value)) {
        object.extend(fields);
    }
    print_json(&object);
}

fn print_json(value: &Value) {
    line(&serde_json::to_string_pretty(value).unwrap_or_default());
}

/// A line on standard output. A reader that went away (`| head`) ends the program silently.
pub fn line(text: &str) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// A line on standard error: progress and advice, never data.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A step that is done, on standard error.
pub fn done(text: &str) {
    let mark = if std::io::stderr().is_terminal() && !no_color() { "\x1b[32m✓\x1b[0m" } else { "✓" };
    note(&format!(" {mark} {text}"));
}

/// `✓` or `✗` for standard output, green or red where it takes colours.
pub fn mark(good: bool) -> &'static str {
    match (good, colored()) {
        (true, true) => "\x1b[32m✓\x1b[0m",
        (true, false) => "✓",
        (false, true) => "\x1b[31m✗\x1b[0m",
        (false, false) => "✗",
    }
}

/// Whether standard output takes colours (<https://no-color.org>).
fn colored() -> bool {
    std::io::stdout().is_terminal() && !no_color()
}

fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// A cell whose colour says how good its word is.
pub fn state(word: &str) -> Cell {
    let color = match word {
        "ready" | "up" | "fresh" | "open" | "active" | "healthy" | "SYNCED" => Some(Color::Green),
        "degraded" | "draining" | "suspect" | "STALE" | "unknown" | "expired" => Some(Color::Yellow),
        "down" | "unhealthy" | "refused" | "revoked" | "ERROR" | "GONE" => Some(Color::Red),
        _ => None,
    };
    color.map_or_else(|| Cell::new(word), |color| Cell::new(word).fg(color))
}

/// A number's cell.
pub fn number(text: impl ToString) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// `-` for what is not known.
pub fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// An age or time to go: `850ms`, `12s`, `4m`, `3h`, `22d`.
pub fn duration_ms(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..120_000 => format!("{}s", ms / 1_000),
        120_000..7_200_000 => format!("{}m", ms / 60_000),
        7_200_000..172_800_000 => format!("{}h", ms / 3_600_000),
        _ => format!("{}d", ms / 86_400_000),
    }
}

/// An age, or `never`.
pub fn age(ms: Option<u64>) -> String {
    ms.map_or_else(|| "never".to_owned(), duration_ms)
}

/// A response time with three figures: `0.82ms`, `26.1ms`, `250ms`, `1.20s`.
pub fn latency_ms(ms: Option<f64>) -> String {
    match ms {
        None => "-".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.2}ms"),
        Some(ms) if ms < 100.0 => format!("{ms:.1}ms"),
        Some(ms) if ms < 1_000.0 => format!("{ms:.0}ms"),
        Some(ms) => format!("{:.2}s", ms / 1_000.0),
    }
}

/// A rate: `0.4/s`, `118/s`, `12.3k/s`.
pub fn rate(per_s: f64) -> String {
    match per_s {
        ..0.05 => "0/s".to_owned(),
        ..10.0 => format!("{per_s:.1}/s"),
        ..10_000.0 => format!("{per_s:.0}/s"),
        _ => format!("{:.1}k/s", per_s / 1_000.0),
    }
}

/// Bytes a second: `512B/s`, `3.4MB/s`.
pub fn bytes_rate(per_s: f64) -> String {
    match per_s {
        ..1e3 => format!("{per_s:.0}B/s"),
        ..1e6 => format!("{:.1}kB/s", per_s / 1e3),
        ..1e9 => format!("{:.1}MB/s", per_s / 1e6),
        _ => format!("{:.1}GB/s", per_s / 1e9),
    }
}

/// The part that succeeded: `100%`, `99.92%`. Never rounded up to 100 while anything failed.
pub fn success(error_ratio: f64) -> String {
    match (1.0 - error_ratio) * 100.0 {
        percent if percent >= 100.0 => "100%".to_owned(),
        percent => format!("{:.2}%", (percent * 100.0).floor() / 100.0),
    }
}

/// Packets lost: `0%`, `0.02%`, `1.5%`.
pub fn loss(ppm: u32) -> String {
    match ppm {
        0 => "0%".to_owned(),
        1..10_000 => format!("{:.2}%", f64::from(ppm) / 10_000.0),
        _ => format!("{:.1}%", f64::from(ppm) / 10_000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_keep_one_unit() {
        let shown: Vec<_> = [0, 999, 1_000, 119_999, 120_000, 7_200_000, 200_000_000].map(duration_ms).into();
        assert_eq!(shown, ["0ms", "999ms", "1s", "119s", "2m", "2h", "2d"]);
        assert_eq!(age(None), "never");
    }

    #[test]
    fn one_failure_in_a_million_is_not_a_hundred_percent() {
        assert_eq!(success(0.0), "100%");
        assert_eq!(success(0.000_001), "99.99%");
        assert_eq!(success(1.0), "0.00%");
    }

    #[test]
    fn figures_keep_their_precision_where_it_matters() {
        let shown: Vec<_> = [Some(0.824), Some(26.13), Some(250.4), Some(1204.0), None].map(latency_ms).into();
        assert_eq!(shown, ["0.82ms", "26.1ms", "250ms", "1.20s", "-"]);
        assert_eq!([rate(0.0), rate(0.44), rate(118.2), rate(12_345.0)], ["0/s", "0.4/s", "118/s", "12.3k/s"]);
        assert_eq!([bytes_rate(512.0), bytes_rate(3.4e6)], ["512B/s", "3.4MB/s"]);
        assert_eq!([loss(0), loss(200), loss(15_000)], ["0%", "0.02%", "1.5%"]);
    }
}
