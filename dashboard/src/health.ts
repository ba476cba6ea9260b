// What is wrong, in sentences: pure, from one summary.

import { age, loss } from "./format";
import type { Summary } from "./summary";

export interface Problem {
  level: "bad" | "warn";
  text: string;
}

/** Loss from which a link's requests are slowed. */
const LOSS_PPM_HIGH = 10_000;

export function problems(summary: Summary, heldMs: number): Problem[] {
  const found: Problem[] = [];
  for (const cluster of summary.clusters) {
    const why = cluster.reason ? ` (${cluster.reason})` : "";
    if (cluster.state === "down") {
      const since = cluster.age_ms === null ? "" : ` for ${age(cluster.age_ms + heldMs)}`;
      found.push({ level: "bad", text: `${cluster.name} is down: not heard${since}${why}` });
    } else if (cluster.state === "unknown") {
      found.push({ level: "warn", text: `${cluster.name} has not been heard since this gateway started${why}` });
    } else if (cluster.state !== "ready") {
      found.push({ level: "warn", text: `${cluster.name} is ${cluster.state}${why}` });
    }
  }
  for (const link of summary.links) {
    if (link.state !== "down" && link.loss_ppm >= LOSS_PPM_HIGH) {
      found.push({ level: "warn", text: `${link.from} → ${link.to} loses ${loss(link.loss_ppm)} of its packets` });
    }
  }
  if (summary.store.leader === null) {
    found.push({ level: "bad", text: "The registry has no leader: traffic goes on, changes are refused" });
  }
  return found;
}

/** The age of the oldest imported data, and whose it is. */
export function oldestData(summary: Summary): { cluster: string; age_ms: number | null } | null {
  let oldest: { cluster: string; age_ms: number | null } | null = null;
  for (const { cluster, age_ms } of summary.imports) {
    if (oldest === null || age_ms === null || (oldest.age_ms !== null && age_ms > oldest.age_ms)) {
      oldest = { cluster, age_ms };
    }
    if (age_ms === null) break;
  }
  return oldest;
}
