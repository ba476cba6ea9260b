// A mesh for the page's tests: three clouds, one link over TCP, figures that no rounding makes equal.

export function mesh() {
  const cluster = (name, id, provider, locality, more = {}) => ({
    name, id, provider, locality, state: "ready", reason: "", self: false, is_leader: false, voter: true,
    gateways: [`gw.${name}.example:15443`], version: "0.1.0", age_ms: 420, exports: 2, ...more,
  });
  const link = (from, to, more = {}) => ({
    from, to, transport: "quic", rtt_us: 81_300, loss_ppm: 0, bytes_in_per_s: 1_204_000, bytes_out_per_s: 388_000,
    state: "up", flows: 2, ...more,
  });
  const edge = (from, to, rps, p50_ms, p99_ms, error_ratio = 0) => ({ from, to, rps, error_ratio, p50_ms, p99_ms, bytes_per_s: rps * 1_480 });
  return {
    mesh: "corp", cluster: "aws-eu", generated_at: Date.now(), dashboard: "",
    traffic: { rps: 1287.4, error_ratio: 0.0007, p50_ms: 3.42, p99_ms: 96.7, cross_cluster_ratio: 0.31 },
    clusters: [
      cluster("aws-eu", 1, "aws", "eu-west-1/a", { self: true, is_leader: true, age_ms: 0, exports: 4 }),
      cluster("gcp-us", 2, "gcp", "us-east1/b"),
      cluster("onprem", 3, "onprem", "berlin/r2", { state: "degraded", reason: "UDP 15443 blocked, TCP fallback", exports: 1 }),
    ],
    links: [
      link("aws-eu", "gcp-us"), link("gcp-us", "aws-eu", { rtt_us: 81_900 }),
      link("aws-eu", "onprem", { transport: "tcp", state: "degraded", rtt_us: 25_060, loss_ppm: 2_300, bytes_in_per_s: 88_000, bytes_out_per_s: 41_000 }),
      link("gcp-us", "onprem", { rtt_us: 104_400, loss_ppm: 150, bytes_in_per_s: 912, bytes_out_per_s: 0 }),
    ],
    services: [
      { host: "cart.shop.svc.clusterset.local", exporters: ["aws-eu", "gcp-us"], rps: 812.6, error_ratio: 0, p50_ms: 1.37, p99_ms: 84.2, cross_cluster_ratio: 0.2,
        edges: [edge("aws-eu", "aws-eu", 650.1, 0.91, 3.2), edge("onprem", "aws-eu", 162.5, 26.1, 41.8)] },
      { host: "payments.prod.svc.clusterset.local", exporters: ["onprem"], rps: 431.3, error_ratio: 0.0021, p50_ms: 25.9, p99_ms: 131, cross_cluster_ratio: 0.9,
        edges: [edge("aws-eu", "onprem", 431.3, 25.9, 131, 0.0021)] },
      { host: "search.prod.svc.clusterset.local", exporters: ["gcp-us", "aws-eu"], rps: 43.5, error_ratio: 0, p50_ms: 82.1, p99_ms: 97.3, cross_cluster_ratio: 0.5,
        edges: [edge("aws-eu", "gcp-us", 43.5, 82.1, 97.3)] },
      { host: "reports.batch.svc.clusterset.local", exporters: ["gcp-us"], rps: 0, error_ratio: 0, p50_ms: null, p99_ms: null, cross_cluster_ratio: 0, edges: [] },
    ],
    imports: [
      { cluster: "gcp-us", age_ms: 420, freshness: "fresh", services: 2, endpoints_healthy: 5, endpoints: 6 },
      { cluster: "onprem", age_ms: 2_310, freshness: "fresh", services: 1, endpoints_healthy: 2, endpoints: 2 },
    ],
    store: { leader: "aws-eu", voters: ["aws-eu", "gcp-us", "onprem"], commit: 1042, applied: 1042 },
    events: [
      { at: Date.now() - 4_000, kind: "link_degraded", text: "aws-eu → onprem fell back to TCP: UDP 15443 does not pass" },
      { at: Date.now() - 61_000, kind: "cluster_joined", text: "onprem joined as member 3" },
    ],
  };
}

/** The same mesh with gcp-us silent. */
export function meshWithOneDown() {
  const down = mesh();
  Object.assign(down.clusters[1], { state: "down", reason: "lease ran out", age_ms: 61_000 });
  for (const link of down.links.filter((one) => one.from === "gcp-us" || one.to === "gcp-us")) {
    Object.assign(link, { state: "down", bytes_in_per_s: 0, bytes_out_per_s: 0 });
  }
  Object.assign(down.imports[0], { age_ms: 61_000, freshness: "suspect", endpoints_healthy: 0 });
  down.traffic.rps = 1190.2;
  down.events.unshift({ at: Date.now(), kind: "cluster_down", text: "gcp-us is silent: its lease ran out" });
  return down;
}
