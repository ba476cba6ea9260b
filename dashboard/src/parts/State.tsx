const MARKS: Record<string, string> = {
  ready: "●", up: "●", fresh: "●",
  degraded: "▲", draining: "▲", suspect: "▲", unknown: "◌",
  down: "✕",
};

/** A state as colour, shape and word: never by colour alone. */
export function State({ word }: { word: string }) {
  return (
    <span class={`state state-${word}`}>
      <span class="state-mark" aria-hidden="true">{MARKS[word] ?? "●"}</span>
      {word}
    </span>
  );
}
