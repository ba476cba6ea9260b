//! The messages that isthmus processes exchange, generated from `proto/`.
//!
//! Types only. What they mean is in `isthmus-model`; nothing here opens a socket.

/// Joining clusters.
#[allow(missing_docs, clippy::all)]
pub mod join {
    tonic::include_proto!("isthmus.join.v1");
}

/// Sidecars and the gateways of their cluster.
#[allow(missing_docs, clippy::all)]
pub mod discovery {
    tonic::include_proto!("isthmus.discovery.v1");
}

/// Gateways of different clusters.
#[allow(missing_docs, clippy::all)]
pub mod federation {
    tonic::include_proto!("isthmus.federation.v1");
}

/// The replicas of one cluster's gateway.
#[allow(missing_docs, clippy::all)]
pub mod replica {
    tonic::include_proto!("isthmus.replica.v1");
}

/// The CLI and a gateway.
#[allow(missing_docs, clippy::all)]
pub mod operator {
    tonic::include_proto!("isthmus.operator.v1");
}

/// Upper bounds in milliseconds of the response-time counts in [`discovery::Edge`], Istio's buckets;
/// one more count follows for everything slower.
pub const LATENCY_BUCKETS_MS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0,
    600000.0, 1800000.0, 3600000.0,
];
