import type { ComponentChildren } from "preact";
import { age, latency, rate, success } from "../format";
import { oldestData } from "../health";
import type { Live } from "../live";
import { Sparkline } from "../parts/Sparkline";
import type { Summary } from "../summary";

interface TileProps {
  name: string;
  label: string;
  value: string;
  unit?: string;
  detail: ComponentChildren;
  tone?: "good" | "warn" | "bad";
}

function Tile({ name, label, value, unit, detail, tone }: TileProps) {
  return (
    <div class={`tile ${tone ? `tile-${tone}` : ""}`}>
      <dt>{label}</dt>
      <dd>
        <span class="tile-value" data-figure={name}>
          {value}
          {unit && <span class="tile-unit">{unit}</span>}
        </span>
        <span class="tile-detail">{detail}</span>
      </dd>
    </div>
  );
}

/** Age from which imported data is called old: its lease. */
const LEASE_MS = 10_000;

/** The mesh in six figures. */
export function Headline({ live, summary }: { live: Live; summary: Summary }) {
  const { traffic, clusters } = summary;
  const idle = traffic.rps === 0;
  const up = clusters.filter((cluster) => cluster.state === "ready" || cluster.state === "degraded").length;
  const oldest = oldestData(summary);
  const oldestAge = oldest && oldest.age_ms !== null ? oldest.age_ms + live.heldMs : null;
  const history = (pick: (of: typeof traffic) => number | null) => live.history.map(pick);
  const cross = `${(traffic.cross_cluster_ratio * 100).toFixed(0)}% between clusters`;
  return (
    <dl class="tiles" aria-label="The mesh in six figures">
      <Tile name="rps" label="Requests" value={rate(traffic.rps)} unit="/s" detail={
        <><Sparkline values={history((one) => one.rps)} label="Requests over the last two minutes" /><span>{cross}</span></>
      } />
      <Tile name="success" label="Success" value={idle ? "–" : success(traffic.error_ratio)}
        tone={idle ? undefined : traffic.error_ratio === 0 ? "good" : traffic.error_ratio < 0.01 ? "warn" : "bad"}
        detail={<><Sparkline values={history((one) => (one.rps ? 1 - one.error_ratio : null))} label="Success over the last two minutes" />
          <span>{idle ? "no requests" : `${rate(traffic.rps * traffic.error_ratio)} failed/s`}</span></>} />
      <Tile name="p50" label="p50" value={latency(traffic.p50_ms)} detail={
        <><Sparkline values={history((one) => one.p50_ms)} label="Median over the last two minutes" /><span>half are faster</span></>
      } />
      <Tile name="p99" label="p99" value={latency(traffic.p99_ms)} detail={
        <><Sparkline values={history((one) => one.p99_ms)} label="99th percentile over the last two minutes" /><span>1 in 100 is slower</span></>
      } />
      <Tile name="clusters-up" label="Clusters up" value={`${up}/${clusters.length}`}
        tone={up === clusters.length ? "good" : "bad"}
        detail={<span>{up === clusters.length ? "all heard" : clusters.filter((one) => one.state === "down" || one.state === "unknown").map((one) => one.name).join(", ")}</span>} />
      <Tile name="oldest-data" label="Oldest data" value={oldest ? age(oldestAge) : "–"}
        tone={!oldest ? undefined : oldestAge === null || oldestAge > LEASE_MS ? "bad" : "good"}
        detail={<span>{oldest ? `from ${oldest.cluster}` : "nothing imported"}</span>} />
    </dl>
  );
}
