// Figures as text: the same forms as the command line's (crates/cli/src/render.rs).

/** `850ms`, `12s`, `4m`, `3h`, `22d`; `never` if it was never heard. */
export function age(ms: number | null): string {
  if (ms === null) return "never";
  if (ms < 1_000) return `${Math.floor(ms)}ms`;
  if (ms < 120_000) return `${Math.floor(ms / 1_000)}s`;
  if (ms < 7_200_000) return `${Math.floor(ms / 60_000)}m`;
  if (ms < 172_800_000) return `${Math.floor(ms / 3_600_000)}h`;
  return `${Math.floor(ms / 86_400_000)}d`;
}

/** `0.82ms`, `26.1ms`, `250ms`, `1.20s`. */
export function latency(ms: number | null): string {
  if (ms === null) return "–";
  if (ms < 10) return `${ms.toFixed(2)}ms`;
  if (ms < 100) return `${ms.toFixed(1)}ms`;
  if (ms < 1_000) return `${ms.toFixed(0)}ms`;
  return `${(ms / 1_000).toFixed(2)}s`;
}

/** `0`, `0.4`, `118`, `12.3k`: a second. */
export function rate(perSecond: number): string {
  if (perSecond < 0.05) return "0";
  if (perSecond < 10) return perSecond.toFixed(1);
  if (perSecond < 10_000) return perSecond.toFixed(0);
  return `${(perSecond / 1_000).toFixed(1)}k`;
}

/** `512B/s`, `3.4MB/s`. */
export function bytes(perSecond: number): string {
  if (perSecond < 1e3) return `${perSecond.toFixed(0)}B/s`;
  if (perSecond < 1e6) return `${(perSecond / 1e3).toFixed(1)}kB/s`;
  if (perSecond < 1e9) return `${(perSecond / 1e6).toFixed(1)}MB/s`;
  return `${(perSecond / 1e9).toFixed(1)}GB/s`;
}

/** The part that succeeded; never rounded up to 100 % while anything failed. */
export function success(errorRatio: number): string {
  const percent = (1 - errorRatio) * 100;
  return percent >= 100 ? "100%" : `${(Math.floor(percent * 100) / 100).toFixed(2)}%`;
}

/** `0%`, `0.02%`, `1.5%`. */
export function loss(ppm: number): string {
  if (ppm === 0) return "0%";
  return ppm < 10_000 ? `${(ppm / 10_000).toFixed(2)}%` : `${(ppm / 10_000).toFixed(1)}%`;
}

export const rtt = (us: number | null) => latency(us === null ? null : us / 1_000);

/** The time of day of an event. */
export const clock = (unixMs: number) => new Date(unixMs).toLocaleTimeString([], { hour12: false });
