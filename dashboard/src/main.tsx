// The page: what the gateway last told, top to bottom. Nothing is kept but the address and the theme.

import { render } from "preact";
import { useEffect } from "preact/hooks";
import { age } from "./format";
import { problems } from "./health";
import { useLive } from "./live";
import type { Live } from "./live";
import { Clusters } from "./panels/Clusters";
import { Headline } from "./panels/Headline";
import { Services } from "./panels/Services";
import { Events, Imports, Registry } from "./panels/Side";
import { useUrl } from "./url";

function App() {
  const live = useLive();
  const [theme, setTheme] = useUrl("theme", "auto");
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
  }, [theme]);
  useEffect(() => {
    const keys = (event: KeyboardEvent) => {
      if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "/") {
        event.preventDefault();
        document.getElementById("filter")?.focus();
      }
    };
    addEventListener("keydown", keys);
    return () => removeEventListener("keydown", keys);
  }, []);
  const { summary } = live;
  useEffect(() => {
    if (summary) document.title = `${summary.mesh || "isthmus"} · seen from ${summary.cluster}`;
  }, [summary?.mesh, summary?.cluster]);
  return (
    <>
      <a class="skip" href="#services" onClick={jump}>Skip to services</a>
      <Top live={live} theme={theme} setTheme={setTheme} />
      <main data-generated-at={summary?.generated_at} class={live.stale ? "is-stale" : ""}>
        {summary === null ? <p class="waiting" role="status">Waiting for the gateway…</p> : (
          <>
            <Banner live={live} />
            <Headline live={live} summary={summary} />
            <div class="columns">
              <Clusters summary={summary} heldMs={live.heldMs} />
              <div class="side">
                <Imports imports={summary.imports} heldMs={live.heldMs} />
                <Registry store={summary.store} />
              </div>
            </div>
            <Services services={summary.services} down={new Set(summary.clusters.filter((one) => one.state === "down").map((one) => one.name))} />
            <Events events={summary.events} />
          </>
        )}
      </main>
    </>
  );
}

/** The address's hash is state, so the skip link moves by hand. */
function jump(event: Event) {
  event.preventDefault();
  const target = document.getElementById("services");
  target?.scrollIntoView();
  target?.querySelector<HTMLElement>("button, input")?.focus();
}

function Top({ live, theme, setTheme }: { live: Live; theme: string; setTheme: (theme: string) => void }) {
  const { summary, stale, connected, heldMs } = live;
  const next = theme === "auto" ? "dark" : theme === "dark" ? "light" : "auto";
  const word = !summary ? "connecting" : !connected ? `reconnecting, figures of ${age(heldMs)} ago` : stale ? `no news for ${age(heldMs)}` : "live";
  return (
    <header class="top">
      <span class="brand"><img src="./icon.svg" alt="" width="28" height="28" />isthmus</span>
      {summary && <h1>{summary.mesh}<span class="from">seen from <b>{summary.cluster}</b></span></h1>}
      <span class="grow" />
      <span class={`pulse ${stale || !summary ? "pulse-old" : ""}`} role="status" data-live={stale || !summary ? "no" : "yes"}>{word}</span>
      <button type="button" class="theme" onClick={() => setTheme(next)} aria-label={`Theme: ${theme}. Switch to ${next}`}>
        {theme === "auto" ? "◐ auto" : theme === "dark" ? "● dark" : "○ light"}
      </button>
    </header>
  );
}

/** What is wrong, before any figure. */
function Banner({ live }: { live: Live }) {
  const found = live.summary ? problems(live.summary, live.heldMs) : [];
  if (found.length === 0) return null;
  const level = found.some((problem) => problem.level === "bad") ? "bad" : "warn";
  return (
    <ul class={`banner banner-${level}`} aria-label="Problems">
      {found.map((problem) => <li key={problem.text} class={`problem-${problem.level}`}>{problem.text}</li>)}
    </ul>
  );
}

render(<App />, document.getElementById("app")!);
