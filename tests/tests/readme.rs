//! What README.md says to type works as it stands there.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Far above the ten seconds it takes; a hang fails the test instead of the build.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn two_clusters_by_hand_as_the_readme_has_it() {
    let readme = std::fs::read_to_string(isthmus_tests::top().join("README.md")).expect("a README");
    let by_hand = readme.split("## By hand").nth(1).expect("a section on doing it by hand");
    let block = by_hand.split("```bash\n").nth(1).and_then(|rest| rest.split("```\n").next()).expect("its commands");
    let binary = isthmus_tests::binary().expect("the binary");
    let dir = std::env::temp_dir().join(format!("isthmus-readme-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("writable");
    let path =
        format!("{}:{}", binary.parent().expect("in a directory").display(), std::env::var("PATH").expect("a PATH"));
    let mut shell = Command::new("bash")
        .args(["-euc", block])
        .env("PATH", path)
        .env("HOME", &dir)
        .env("TMPDIR", &dir)
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        // Gateways and sidecars run on in the background: they end with the group.
        .process_group(0)
        .spawn()
        .expect("bash runs");
    let group = shell.id();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match shell.try_wait().expect("our child") {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => break None,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let ended = Command::new("kill").args(["-TERM", "--", &format!("-{group}")]).status();
    let mut said = String::new();
    shell.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
    println!("{said}");
    assert!(ended.is_ok());
    assert!(status.is_some_and(|status| status.success()), "the commands ended with {status:?}");
    assert!(said.contains("cart of gcp-us"), "curl got no answer");
    assert!(said.contains("cart.shop.svc.clusterset.local"), "get services does not show cart");
    std::fs::remove_dir_all(&dir).expect("ours");
}
