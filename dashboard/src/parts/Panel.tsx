import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

interface Props {
  id: string;
  title: string;
  /** The command that prints the same. */
  command: string;
  /** Controls beside the title. */
  tools?: ComponentChildren;
  children: ComponentChildren;
}

/** A titled part of the page; its figures are one command away. */
export function Panel({ id, title, command, tools, children }: Props) {
  return (
    <section class="panel" id={id} aria-labelledby={`${id}-title`}>
      <header class="panel-head">
        <h2 id={`${id}-title`}>{title}</h2>
        <div class="panel-tools">
          {tools}
          <Copy command={command} />
        </div>
      </header>
      {children}
    </section>
  );
}

function Copy({ command }: { command: string }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await writeClipboard(command);
    setCopied(true);
    setTimeout(() => setCopied(false), 1_500);
  };
  return (
    <button type="button" class="copy" onClick={copy} title={`Copy as CLI command: ${command}`} data-command={command}>
      <span aria-hidden="true">{copied ? "✓" : "›_"}</span>
      <span>{copied ? "Copied" : "Copy as CLI"}</span>
      <span class="visually-hidden">: {command}</span>
    </button>
  );
}

/** The clipboard needs a secure context; a page served over plain HTTP elsewhere than localhost has none. */
async function writeClipboard(text: string) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
