//! Compiles the protos with a Rust-only compiler: no `protoc` is needed.

use std::path::Path;

const PROTOS: [&str; 5] = [
    "isthmus/discovery/v1/discovery.proto",
    "isthmus/federation/v1/link.proto",
    "isthmus/join/v1/join.proto",
    "isthmus/operator/v1/operator.proto",
    "isthmus/replica/v1/replica.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new("proto");
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={}", root.join(proto).display());
    }
    let descriptors = protox::compile(PROTOS.map(|proto| root.join(proto)), [root])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
