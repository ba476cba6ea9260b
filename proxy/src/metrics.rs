//! What the sidecar counts: Istio's series, its own, and the edges it tells the gateway.
