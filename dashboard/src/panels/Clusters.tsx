import { age, bytes, loss, rtt } from "../format";
import { HEIGHT, NODE_HEIGHT, NODE_WIDTH, WIDTH, carried, lineWidth, pairs, places, worse } from "../layout";
import type { Pair, Place } from "../layout";
import { Panel } from "../parts/Panel";
import { State } from "../parts/State";
import type { Cluster, Summary } from "../summary";
import { useUrl } from "../url";

/** Clusters and the links between them: as a map, or as tables that a screen reader can walk. */
export function Clusters({ summary, heldMs }: { summary: Summary; heldMs: number }) {
  const [view, setView] = useUrl("view", "map");
  const choice = (name: string, label: string) => (
    <button type="button" aria-pressed={view === name} onClick={() => setView(name)}>{label}</button>
  );
  return (
    <Panel id="clusters" title="Clusters and links" command={view === "map" ? "isthmus status" : "isthmus get links"}
      tools={<div class="segmented" role="group" aria-label="Show clusters as">{choice("map", "Map")}{choice("table", "Table")}</div>}>
      {view === "map" ? <ClusterMap summary={summary} heldMs={heldMs} /> : <Tables summary={summary} heldMs={heldMs} />}
    </Panel>
  );
}

function role(cluster: Cluster): string {
  return cluster.is_leader ? "leader" : cluster.voter ? "voter" : "follower";
}

function ClusterMap({ summary, heldMs }: { summary: Summary; heldMs: number }) {
  const placed = places(summary.clusters);
  const byName = new Map(placed.map((place) => [place.cluster.name, place]));
  const links = pairs(summary.links).filter((pair) => byName.has(pair.a) && byName.has(pair.b));
  const spoken = summary.clusters.map((cluster) => `${cluster.name} is ${cluster.state}`).join(", ");
  return (
    <figure class="map">
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`Map of ${summary.clusters.length} clusters: ${spoken}. The table view has all figures.`}>
        {links.map((pair) => <MapLink key={`${pair.a} ${pair.b}`} pair={pair} from={byName.get(pair.a)!} to={byName.get(pair.b)!} />)}
        {placed.map((place) => <MapNode key={place.cluster.name} place={place} heldMs={heldMs} />)}
      </svg>
      <figcaption class="legend" aria-hidden="true">
        <span class="key key-quic">QUIC</span>
        <span class="key key-tcp">TCP fallback</span>
        <span class="key key-relay">relayed</span>
        <span class="key key-down">down</span>
        <span class="legend-note">width: bytes/s</span>
      </figcaption>
    </figure>
  );
}

function MapLink({ pair, from, to }: { pair: Pair; from: Place; to: Place }) {
  const link = worse(pair);
  const kind = link.state === "down" ? "down" : link.transport;
  const [mx, my] = [(from.x + to.x) / 2, (from.y + to.y) / 2];
  const d = `M${from.x} ${from.y} L${to.x} ${to.y}`;
  const perSecond = carried(pair);
  return (
    <g class={`link link-${kind}`} data-link={`${pair.a}-${pair.b}`}>
      <title>{`${pair.a} – ${pair.b}: ${link.state}, ${link.transport}, RTT ${rtt(link.rtt_us)}, loss ${loss(link.loss_ppm)}, ${bytes(perSecond)}`}</title>
      <path class="link-line" d={d} stroke-width={lineWidth(perSecond)} />
      {link.state !== "down" && perSecond >= 1 && <path class="link-flow" d={d} stroke-width={Math.max(1, lineWidth(perSecond) - 1)} />}
      <g transform={`translate(${mx} ${my})`}>
        <rect class="link-plate" x="-66" y="-21" width="132" height="42" rx="9" />
        <text class="link-rtt" y="-3">{link.state === "down" ? "down" : rtt(link.rtt_us)}</text>
        <text class="link-rate" y="13">{link.state === "down" ? "no packet passes" : `${loss(link.loss_ppm)} loss · ${bytes(perSecond)}`}</text>
      </g>
    </g>
  );
}

function MapNode({ place, heldMs }: { place: Place; heldMs: number }) {
  const { cluster, x, y } = place;
  const heard = cluster.self ? "this gateway" : cluster.age_ms === null ? "never heard" : `heard ${age(cluster.age_ms + heldMs)} ago`;
  const silent = cluster.state === "down" || cluster.state === "unknown";
  const where = [cluster.provider, cluster.locality].filter(Boolean).join(" ") || `cluster ${cluster.id}`;
  return (
    <g class={`node node-${cluster.state}`} transform={`translate(${x - NODE_WIDTH / 2} ${y - NODE_HEIGHT / 2})`} data-cluster={cluster.name}>
      <title>{`${cluster.name}: ${cluster.state}${cluster.reason ? `, ${cluster.reason}` : ""}`}</title>
      <rect class="node-box" width={NODE_WIDTH} height={NODE_HEIGHT} rx="14" />
      <circle class="node-dot" cx="20" cy="23" r="5.5" />
      <text class="node-name" x="34" y="28">{cluster.name}</text>
      <text class="node-where" x="16" y="47">{where}</text>
      <text class="node-detail" x="16" y="64">{silent ? `${cluster.state} · ${heard}` : `${cluster.exports} exported · ${heard}`}</text>
      {cluster.is_leader && <text class="node-badge" x={NODE_WIDTH - 14} y="28">leader</text>}
    </g>
  );
}

function Tables({ summary, heldMs }: { summary: Summary; heldMs: number }) {
  return (
    <div class="scroll">
      <table>
        <caption>Clusters</caption>
        <thead><tr><th scope="col">Cluster</th><th scope="col">State</th><th scope="col">Heard</th><th scope="col">Place</th><th scope="col">Registry</th><th scope="col" class="num">Exports</th><th scope="col">Version</th><th scope="col">Gateways</th></tr></thead>
        <tbody>
          {summary.clusters.map((cluster) => (
            <tr key={cluster.name} data-cluster-row={cluster.name}>
              <th scope="row">{cluster.name}{cluster.self && <span class="tag">here</span>}</th>
              <td><State word={cluster.state} /> {cluster.reason}</td>
              <td>{cluster.self ? "–" : age(cluster.age_ms === null ? null : cluster.age_ms + heldMs)}</td>
              <td>{[cluster.provider, cluster.locality].filter(Boolean).join(" ") || "–"}</td>
              <td>{role(cluster)}</td>
              <td class="num">{cluster.exports}</td>
              <td>{cluster.version || "–"}</td>
              <td>{cluster.gateways.join(", ") || "dials out only"}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <table>
        <caption>Links</caption>
        <thead><tr><th scope="col">From</th><th scope="col">To</th><th scope="col">State</th><th scope="col">Transport</th><th scope="col" class="num">RTT</th><th scope="col" class="num">Loss</th><th scope="col" class="num">In</th><th scope="col" class="num">Out</th><th scope="col" class="num">Flows</th></tr></thead>
        <tbody>
          {summary.links.map((link) => (
            <tr key={`${link.from} ${link.to}`} data-link-row={`${link.from} ${link.to}`}>
              <th scope="row">{link.from}</th><td>{link.to}</td><td><State word={link.state} /></td><td>{link.transport.toUpperCase()}</td>
              <td class="num">{rtt(link.rtt_us)}</td><td class="num">{loss(link.loss_ppm)}</td>
              <td class="num">{bytes(link.bytes_in_per_s)}</td><td class="num">{bytes(link.bytes_out_per_s)}</td><td class="num">{link.flows}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
