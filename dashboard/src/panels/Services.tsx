import { useMemo } from "preact/hooks";
import { bytes, latency, rate, success } from "../format";
import { Panel } from "../parts/Panel";
import type { Service, ServiceEdge } from "../summary";
import { useUrl } from "../url";

/** Rows drawn at once: a browser draws these without a hitch every second. */
const ROWS_MAX = 200;

const KEYS = {
  host: (service: Service) => service.host,
  rps: (service: Service) => service.rps,
  errors: (service: Service) => service.error_ratio,
  p50: (service: Service) => service.p50_ms ?? -1,
  p99: (service: Service) => service.p99_ms ?? -1,
  clusters: (service: Service) => service.exporters.length,
};
type Key = keyof typeof KEYS;

/** Every service with its traffic; each row opens to who calls it where. */
export function Services({ services, down }: { services: Service[]; down: Set<string> }) {
  const [query, setQuery] = useUrl("q", "");
  const [sort, setSort] = useUrl("sort", "rps-desc");
  const [open, setOpen] = useUrl("open", "");
  const [key, direction] = sort.split("-") as [Key, "asc" | "desc"];
  const rows = useMemo(() => sorted(matching(services, query), key, direction), [services, query, key, direction]);
  const command = query ? `isthmus get services ${query}` : "isthmus get services";
  const head = (name: Key, label: string, numeric = true) => {
    const active = key === name;
    const next = active && direction === "desc" ? "asc" : "desc";
    return (
      <th scope="col" class={numeric ? "num" : ""} aria-sort={active ? (direction === "asc" ? "ascending" : "descending") : "none"}>
        <button type="button" class="sort" onClick={() => setSort(`${name}-${next}`)}>
          {label}<span aria-hidden="true">{active ? (direction === "asc" ? " ↑" : " ↓") : ""}</span>
        </button>
      </th>
    );
  };
  return (
    <Panel id="services" title="Services" command={command}
      tools={<label class="filter"><span class="visually-hidden">Filter services</span>
        <input id="filter" type="search" placeholder="Filter  /" value={query} onInput={(event) => setQuery(event.currentTarget.value)} /></label>}>
      <div class="scroll">
        <table class="services">
          <caption class="visually-hidden">Services with request rate, success and response times</caption>
          <thead><tr>{head("host", "Service", false)}{head("rps", "Requests/s")}{head("errors", "Success")}{head("p50", "p50")}{head("p99", "p99")}{head("clusters", "Exported by", false)}</tr></thead>
          <tbody>
            {rows.slice(0, ROWS_MAX).map((service) => (
              <Rows key={service.host} service={service} down={down} open={open === service.host}
                toggle={() => setOpen(open === service.host ? "" : service.host)} />
            ))}
          </tbody>
        </table>
      </div>
      <p class="table-note" role="status">
        {rows.length === 0 ? (services.length === 0 ? "No service is exported yet: isthmus export svc/NAME -n NAMESPACE" : `No service matches “${query}”.`) : ""}
        {rows.length > ROWS_MAX ? `${rows.length - ROWS_MAX} more: filter to see them.` : ""}
      </p>
    </Panel>
  );
}

function matching(services: Service[], query: string): Service[] {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return services.filter((service) => words.every((word) => service.host.includes(word) || service.exporters.some((name) => name.includes(word))));
}

function sorted(services: Service[], key: Key, direction: string): Service[] {
  const of = KEYS[key] ?? KEYS.rps;
  const sign = direction === "asc" ? 1 : -1;
  return [...services].sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    return sign * (x < y ? -1 : x > y ? 1 : 0) || a.host.localeCompare(b.host);
  });
}

function Success({ of }: { of: { rps: number; error_ratio: number } }) {
  if (of.rps === 0) return <>–</>;
  const tone = of.error_ratio === 0 ? "good" : of.error_ratio < 0.01 ? "warn" : "bad";
  return <span class={`figure-${tone}`}>{success(of.error_ratio)}</span>;
}

function Rows({ service, down, open, toggle }: { service: Service; down: Set<string>; open: boolean; toggle: () => void }) {
  const [name, ...rest] = service.host.split(".");
  const id = `edges-${service.host}`;
  return (
    <>
      <tr data-service={service.host}>
        <th scope="row">
          <button type="button" class="open" aria-expanded={open} aria-controls={id} onClick={toggle}>
            <span class="chevron" aria-hidden="true">›</span><span class="host"><b>{name}</b><span class="host-rest">.{rest.join(".")}</span></span>
          </button>
        </th>
        <td class="num" data-cell="rps">{rate(service.rps)}</td>
        <td class="num" data-cell="success"><Success of={service} /></td>
        <td class="num" data-cell="p50">{latency(service.p50_ms)}</td>
        <td class="num" data-cell="p99">{latency(service.p99_ms)}</td>
        <td data-cell="exporters">{service.exporters.length === 0 ? "–" : service.exporters.map((cluster) => (
          <span key={cluster} class={`chip ${down.has(cluster) ? "chip-down" : ""}`}>{cluster}{down.has(cluster) && <span class="visually-hidden"> (down)</span>}</span>
        ))}</td>
      </tr>
      {open && <tr id={id} class="edges"><td colSpan={6}><Edges edges={service.edges} /></td></tr>}
    </>
  );
}

function Edges({ edges }: { edges: ServiceEdge[] }) {
  if (edges.length === 0) return <p class="table-note">No cluster calls it now.</p>;
  const top = Math.max(...edges.map((edge) => edge.rps), 1e-9);
  return (
    <table>
      <caption class="visually-hidden">Who calls it where</caption>
      <thead><tr><th scope="col">Caller → answered by</th><th scope="col">Share</th><th scope="col" class="num">Requests/s</th><th scope="col" class="num">Success</th><th scope="col" class="num">p50</th><th scope="col" class="num">p99</th><th scope="col" class="num">Bytes</th></tr></thead>
      <tbody>
        {edges.map((edge) => (
          <tr key={`${edge.from} ${edge.to}`}>
            <th scope="row">{edge.from} <span aria-label="to">→</span> {edge.to || "nobody"}{edge.from === edge.to && <span class="tag">local</span>}</th>
            <td><svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true"><rect width={(edge.rps / top) * 100} height="8" rx="2" /></svg></td>
            <td class="num">{rate(edge.rps)}</td><td class="num"><Success of={edge} /></td><td class="num">{latency(edge.p50_ms)}</td><td class="num">{latency(edge.p99_ms)}</td><td class="num">{bytes(edge.bytes_per_s)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
