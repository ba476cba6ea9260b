// The gateway's summaries as they come, without reload: server-sent events, the last two minutes kept.

import { useEffect, useState } from "preact/hooks";
import type { Summary, Traffic } from "./summary";

/** Points of history: two minutes at one event a second. */
const HISTORY_MAX = 120;
/** Without a summary for this long, what is shown is called old. */
const STALE_MS = 5_000;
/** The browser's own retry ends for good on some errors; this one does not. */
const RETRY_MS = 2_000;

export interface Live {
  summary: Summary | null;
  history: Traffic[];
  /** How long ago the summary came, by this browser's clock. */
  heldMs: number;
  connected: boolean;
  stale: boolean;
}

interface Held {
  summary: Summary | null;
  history: Traffic[];
  at: number;
  connected: boolean;
}

export function useLive(): Live {
  const [held, setHeld] = useState<Held>({ summary: null, history: [], at: 0, connected: false });
  const [now, setNow] = useState(() => performance.now());

  useEffect(() => {
    let source: EventSource | undefined;
    let retry: ReturnType<typeof setTimeout> | undefined;
    const connect = () => {
      source = new EventSource("api/v1/stream");
      source.onopen = () => setHeld((last) => ({ ...last, connected: true }));
      source.onmessage = (event) => {
        const summary = JSON.parse(event.data) as Summary;
        const at = performance.now();
        setNow(at);
        setHeld((last) => ({
          summary,
          history: [...last.history, summary.traffic].slice(-HISTORY_MAX),
          at,
          connected: true,
        }));
      };
      source.onerror = () => {
        setHeld((last) => ({ ...last, connected: false }));
        if (source?.readyState === EventSource.CLOSED) retry = setTimeout(connect, RETRY_MS);
      };
    };
    connect();
    const tick = setInterval(() => setNow(performance.now()), 1_000);
    return () => {
      source?.close();
      clearTimeout(retry);
      clearInterval(tick);
    };
  }, []);

  const heldMs = held.summary ? Math.max(0, now - held.at) : 0;
  return { ...held, heldMs, stale: held.summary !== null && (!held.connected || heldMs > STALE_MS) };
}
