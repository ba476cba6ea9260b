import { age, clock } from "../format";
import { Panel } from "../parts/Panel";
import { State } from "../parts/State";
import type { Import, MeshEvent, Store } from "../summary";

/** How old what is known of each other cluster is. */
export function Imports({ imports, heldMs }: { imports: Import[]; heldMs: number }) {
  return (
    <Panel id="imports" title="Age of imported data" command="isthmus get imports">
      {imports.length === 0 ? <p class="table-note">Nothing is imported.</p> : (
        <table>
          <caption class="visually-hidden">Age of each imported cluster's data</caption>
          <thead><tr><th scope="col">From</th><th scope="col">Data</th><th scope="col" class="num">Age</th><th scope="col" class="num">Services</th><th scope="col" class="num">Healthy</th></tr></thead>
          <tbody>
            {imports.map((one) => (
              <tr key={one.cluster} data-import={one.cluster}>
                <th scope="row">{one.cluster}</th>
                <td><State word={one.freshness} /></td>
                <td class="num" data-cell="age">{age(one.age_ms === null ? null : one.age_ms + heldMs)}</td>
                <td class="num">{one.services}</td>
                <td class="num">{one.endpoints_healthy}/{one.endpoints}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </Panel>
  );
}

/** Who leads the registry, and how far this gateway has read it. */
export function Registry({ store }: { store: Store }) {
  const lag = Math.max(0, store.commit - store.applied);
  return (
    <Panel id="registry" title="Registry" command="isthmus status">
      <dl class="facts">
        <div><dt>Leader</dt><dd data-figure="leader">{store.leader ?? <span class="figure-bad">none</span>}</dd></div>
        <div><dt>Voters</dt><dd>{store.voters.map((voter) => <span key={voter} class="chip">{voter}</span>)}</dd></div>
        <div><dt>Committed</dt><dd data-figure="commit">{store.commit}</dd></div>
        <div><dt>Apply lag</dt><dd>{lag}</dd></div>
      </dl>
    </Panel>
  );
}

/** What happened lately, newest first. */
export function Events({ events }: { events: MeshEvent[] }) {
  return (
    <Panel id="events" title="What happened" command="isthmus status -o json">
      {events.length === 0 ? <p class="table-note">Nothing yet.</p> : (
        <ol class="events">
          {events.map((event) => (
            <li key={`${event.at} ${event.kind} ${event.text}`}>
              <time dateTime={new Date(event.at).toISOString()}>{clock(event.at)}</time>
              <span class="event-kind">{event.kind.replaceAll("_", " ")}</span>
              <span>{event.text}</span>
            </li>
          ))}
        </ol>
      )}
    </Panel>
  );
}
