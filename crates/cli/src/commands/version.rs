//! `isthmus version`.

use isthmus_federation::command::FORM_MAX;
use serde_json::json;

use crate::context::Context;
use crate::render;

/// Runs `isthmus version`: this binary's own, no gateway is asked.
pub fn run(context: &Context) {
    let version = env!("CARGO_PKG_VERSION");
    match context.json() {
        true => render::print_object("Version", &json!({ "version": version, "log_form_max": FORM_MAX })),
        false => render::line(&format!("isthmus {version} (log form {FORM_MAX})")),
    }
}
