//! The built `isthmus` against an operator service on a unix socket: what is asked, what is printed,
//! how it exits.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use isthmus_wire::operator::operator_server::{Operator, OperatorServer};
use isthmus_wire::operator::*;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

/// A gateway that answers as told, and remembers what it was asked.
#[derive(Clone, Default)]
struct Told {
    get: Arc<Mutex<Option<(GetRequest, String)>>>,
    applied: Arc<Mutex<Option<ApplyRequest>>>,
    refusals: Vec<String>,
}

#[tonic::async_trait]
impl Operator for Told {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let mut told = self.get.lock().expect("unpoisoned");
        let (asked, answer) = told.as_mut().ok_or_else(|| Status::unavailable("no leader is known"))?;
        *asked = request.into_inner();
        Ok(Response::new(GetResponse { json: answer.clone().into_bytes() }))
    }

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        *self.applied.lock().expect("unpoisoned") = Some(request.into_inner());
        let change = Change {
            kind: "ServiceExport".into(),
            namespace: "shop".into(),
            name: "cart".into(),
            action: "created".into(),
        };
        let changes = if self.refusals.is_empty() { vec![change] } else { Vec::new() };
        Ok(Response::new(ApplyResponse { changes, refusals: self.refusals.clone(), warnings: Vec::new() }))
    }

    async fn delete(&self, _: Request<DeleteRequest>) -> Result<Response<ApplyResponse>, Status> {
        Ok(Response::new(ApplyResponse::default()))
    }

    async fn create_token(&self, _: Request<CreateTokenRequest>) -> Result<Response<CreateTokenResponse>, Status> {
        Ok(Response::new(CreateTokenResponse { token: "ism1.token".into(), expires_unix_s: 1 }))
    }

    async fn revoke_token(&self, _: Request<RevokeTokenRequest>) -> Result<Response<RevokeTokenResponse>, Status> {
        let mut status = Status::failed_precondition("no token t9 is known");
        status.metadata_mut().insert("isthmus-reason", "token_unknown".parse().expect("ASCII"));
        Err(status)
    }

    async fn propose(&self, _: Request<ProposeRequest>) -> Result<Response<ProposeResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs `isthmus` against `told`.
async fn isthmus(told: Told, args: &[&str]) -> Ran {
    let dir = TempDir::new().expect("writable");
    let socket = dir.path().join("gateway.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let server = tonic::transport::Server::builder().add_service(OperatorServer::new(told));
    let serving = tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    let ran = run(args, &format!("unix:{}", socket.display())).await;
    serving.abort();
    ran
}

async fn run(args: &[&str], gateway: &str) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_isthmus"))
        .args(args)
        .env("ISTHMUS_GATEWAY", gateway)
        .env_remove("NO_COLOR")
        .output()
        .await
        .expect("the binary runs");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn answering(json: &str) -> Told {
    Told { get: Arc::new(Mutex::new(Some((GetRequest::default(), json.to_owned())))), ..Told::default() }
}

const EXPORTS: &str = r#"[{"namespace":"shop","name":"cart","host":"cart.shop.svc.clusterset.local","cluster":"gcp-us",
    "ports":[{"number":80,"name":"http","protocol":"HTTP"}],"visible_to":["*"],"index":12}]"#;

#[tokio::test]
async fn a_table_is_for_people_and_json_has_a_version() {
    let told = answering(EXPORTS);
    let asked = told.get.clone();
    let ran = isthmus(told.clone(), &["get", "exports", "-n", "shop"]).await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert!(lines[0].starts_with("NAMESPACE") && lines[1].contains("80/HTTP"), "{}", ran.stdout);
    assert!(!ran.stdout.contains('\x1b'), "no colours into a pipe");
    let request = asked.lock().expect("unpoisoned").as_ref().map(|(request, _)| request.clone()).expect("asked");
    assert_eq!((request.what.as_str(), request.namespace.as_str()), ("exports", "shop"));

    let ran = isthmus(told, &["get", "exports", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    assert_eq!(json["apiVersion"], "isthmus.io/cli/v1");
    assert_eq!(json["kind"], "ExportList");
    assert_eq!(json["items"][0]["host"], "cart.shop.svc.clusterset.local");
}

#[tokio::test]
async fn a_status_of_another_version_is_named_not_guessed() {
    let ran = isthmus(answering("[]"), &["status"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("not understood") && ran.stderr.contains("fix:"), "{}", ran.stderr);
}

#[tokio::test]
async fn without_a_gateway_the_exit_code_is_3_and_the_socket_is_named() {
    let ran = run(&["status"], "unix:/nonexistent/gateway.sock").await;
    assert_eq!(ran.code, 3);
    for part in ["unix:/nonexistent/gateway.sock", "No such file", "isthmus gateway --config"] {
        assert!(ran.stderr.contains(part), "{part} is missing in {}", ran.stderr);
    }
    assert!(ran.stdout.is_empty());
}

#[tokio::test]
async fn waiting_in_vain_has_an_exit_code_of_its_own() {
    let ran = isthmus(Told::default(), &["status", "--wait", "--timeout", "1s"]).await;
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(ran.stderr.contains("no leader is known"), "{}", ran.stderr);
}

#[tokio::test]
async fn an_export_writes_a_service_export() {
    let told = Told::default();
    let ran = isthmus(told.clone(), &["export", "svc/cart", "-n", "shop", "--visible-to", "gcp-us,onprem"]).await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.stdout, "serviceexport/shop/cart created\n");
    let applied = told.applied.lock().expect("unpoisoned").take().expect("applied");
    let object: serde_json::Value = serde_json::from_slice(&applied.files[0].content).expect("JSON is YAML");
    assert_eq!(object["kind"], "ServiceExport");
    assert_eq!(object["metadata"]["annotations"]["isthmus.io/visible-to"], "gcp-us,onprem");
}

#[tokio::test]
async fn refusals_are_printed_whole_and_nothing_on_standard_output_says_otherwise() {
    let dir = TempDir::new().expect("writable");
    let file = dir.path().join("bad.yaml");
    std::fs::write(&file, "kind: Nonsense\n").expect("writable");
    let refusals = vec!["bad.yaml:1: kind: \"Nonsense\" is not known".to_owned()];
    let ran = isthmus(Told { refusals, ..Told::default() }, &["apply", "-f", &file.to_string_lossy()]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("bad.yaml:1: kind") && ran.stderr.contains("nothing was changed"), "{}", ran.stderr);
    assert!(ran.stdout.is_empty(), "{}", ran.stdout);
}

#[tokio::test]
async fn a_token_stands_alone_on_standard_output() {
    let ran = isthmus(Told::default(), &["token", "create", "gcp-us"]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "ism1.token\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("isthmus join TOKEN"));
    let ran = isthmus(Told::default(), &["token", "revoke", "t9"]).await;
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no token t9 is known [token_unknown]"), "{}", ran.stderr);
}

#[tokio::test]
async fn wrong_usage_exits_2() {
    for args in [&["get", "nonsense"][..], &["apply"], &["export", "deploy/cart"], &["token", "create"]] {
        let ran = run(args, "unix:/nonexistent").await;
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
    }
    let ran = run(&["apply", "-f", &PathBuf::from("/nonexistent.yaml").to_string_lossy()], "unix:/nonexistent").await;
    assert_eq!(ran.code, 2, "{}", ran.stderr);
}
