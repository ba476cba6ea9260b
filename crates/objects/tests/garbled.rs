//! Whatever a file holds, reading it ends in objects or in refusals with places, never in a panic.

use isthmus_objects::{Object, read};
use proptest::prelude::*;

const VALID: &str = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop, labels: {a: b}}
spec:
  hosts: [cart]
  http:
  - match: [{uri: {prefix: /a}, headers: {x: {regex: "a+"}}}]
    timeout: 1h30m
    retries: {attempts: 3, retryOn: "5xx"}
    route: [{destination: {host: cart, port: {number: 80}}, weight: 10}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: db}
spec:
  hosts: [db.example.com]
  addresses: [10.0.0.0/24]
  ports: [{number: 3306, name: mysql, protocol: TCP}]
  resolution: STATIC
  endpoints: [{address: 10.0.0.7, locality: eu/a, ports: {mysql: 3307}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: cart}
spec: {selector: {matchLabels: {app: cart}}, portLevelMtls: {80: {mode: STRICT}}}
"#;

/// What a slip of the hand, or an enemy, puts into a file.
fn fragment() -> impl Strategy<Value = String> {
    let known =
        ["", " ", "\n", "- ", "{", "}", "[", "]", ": ", "&a ", "*a", "<<: ", "!!int ", "null", "-1", "1e999", "~"];
    prop_oneof![
        prop::sample::select(known.to_vec()).prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
        "[a-zA-Z.:/0-9-]{1,12}",
    ]
}

fn check(text: &str) -> Result<(), TestCaseError> {
    match read("x.yaml", text.as_bytes()) {
        Err(refusals) => {
            prop_assert!(!refusals.is_empty());
            prop_assert!(refusals.iter().all(|one| !one.fix.is_empty() && !one.message.is_empty()));
        }
        Ok(read) => {
            for object in read.objects {
                if let Some(json) = object.to_json() {
                    prop_assert_eq!(Object::from_json(&json).expect("what was proven is read back"), object);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_damaged_file_is_read_or_refused(
        edits in prop::collection::vec((0..VALID.len(), 0_usize..8, fragment()), 1..6),
    ) {
        let mut text = VALID.to_owned();
        for (at, cut, put) in edits {
            let start = at.min(text.len());
            let end = (start + cut).min(text.len());
            if text.is_char_boundary(start) && text.is_char_boundary(end) {
                text.replace_range(start..end, &put);
            }
        }
        check(&text)?;
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        check(&text)?;
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read("x.yaml", &bytes);
    }
}
