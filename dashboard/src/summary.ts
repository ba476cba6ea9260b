// What the gateway tells: the TypeScript side of gateway/src/summary.rs.

export interface Traffic {
  rps: number;
  error_ratio: number;
  p50_ms: number | null;
  p99_ms: number | null;
  cross_cluster_ratio: number;
}

export type ClusterState = "ready" | "degraded" | "draining" | "down" | "unknown";

export interface Cluster {
  name: string;
  id: number;
  locality: string;
  provider: string;
  state: ClusterState;
  reason: string;
  self: boolean;
  is_leader: boolean;
  voter: boolean;
  gateways: string[];
  version: string;
  age_ms: number | null;
  exports: number;
}

export type LinkState = "up" | "degraded" | "down";

export interface Link {
  from: string;
  to: string;
  transport: "quic" | "tcp" | "relay";
  rtt_us: number | null;
  loss_ppm: number;
  bytes_in_per_s: number;
  bytes_out_per_s: number;
  state: LinkState;
  flows: number;
}

export interface ServiceEdge {
  from: string;
  to: string;
  rps: number;
  error_ratio: number;
  p50_ms: number | null;
  p99_ms: number | null;
  bytes_per_s: number;
}

export interface Service extends Traffic {
  host: string;
  exporters: string[];
  edges: ServiceEdge[];
}

export interface Import {
  cluster: string;
  age_ms: number | null;
  freshness: "fresh" | "suspect" | "draining" | "unknown";
  services: number;
  endpoints_healthy: number;
  endpoints: number;
}

export interface Store {
  leader: string | null;
  voters: string[];
  commit: number;
  applied: number;
}

export interface MeshEvent {
  at: number;
  kind: string;
  text: string;
}

export interface Summary {
  mesh: string;
  cluster: string;
  generated_at: number;
  dashboard: string;
  traffic: Traffic;
  clusters: Cluster[];
  links: Link[];
  services: Service[];
  imports: Import[];
  store: Store;
  events: MeshEvent[];
}
