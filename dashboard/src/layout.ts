// Where clusters stand on the map: neighbours of one region side by side around the middle. Pure.

import type { Cluster, Link } from "./summary";

export const WIDTH = 900;
export const HEIGHT = 440;
export const NODE_WIDTH = 204;
export const NODE_HEIGHT = 76;

export interface Place {
  cluster: Cluster;
  x: number;
  y: number;
}

export function places(clusters: Cluster[]): Place[] {
  const where = (cluster: Cluster) => `${cluster.provider}/${cluster.locality}/${cluster.name}`;
  const ordered = [...clusters].sort((a, b) => where(a).localeCompare(where(b)));
  const [cx, cy] = [WIDTH / 2, HEIGHT / 2];
  if (ordered.length === 1) return ordered.map((cluster) => ({ cluster, x: cx, y: cy }));
  const [rx, ry] = [WIDTH / 2 - NODE_WIDTH / 2 - 24, HEIGHT / 2 - NODE_HEIGHT / 2 - 22];
  // Two stand side by side; from three on, the first stands on top.
  const start = ordered.length === 2 ? Math.PI : -Math.PI / 2;
  const around = ordered.map((_, index) => start + (2 * Math.PI * index) / ordered.length);
  // A triangle's corners do not reach the ellipse's foot: stretched, they use the whole height.
  const heights = around.map(Math.sin);
  const [top, foot] = [Math.min(...heights), Math.max(...heights)];
  const stretched = (height: number) => (foot - top < 1e-9 ? 0 : ((height - top) / (foot - top)) * 2 - 1);
  return ordered.map((cluster, index) => ({
    cluster,
    x: cx + rx * Math.cos(around[index]!),
    y: cy + ry * stretched(heights[index]!),
  }));
}

/** Both directions of a link, as one line of the map. */
export interface Pair {
  a: string;
  b: string;
  ab: Link | undefined;
  ba: Link | undefined;
}

export function pairs(links: Link[]): Pair[] {
  const found = new Map<string, Pair>();
  for (const link of links) {
    const [a, b] = link.from < link.to ? [link.from, link.to] : [link.to, link.from];
    const pair = found.get(`${a} ${b}`) ?? { a, b, ab: undefined, ba: undefined };
    if (link.from === a) pair.ab = link;
    else pair.ba = link;
    found.set(`${a} ${b}`, pair);
  }
  return [...found.values()];
}

/** The worse of two ends' words: one end may not have noticed yet. */
export function worse(pair: Pair): Link {
  const rank = { down: 2, degraded: 1, up: 0 };
  const [ab, ba] = [pair.ab, pair.ba];
  if (!ab || !ba) return (ab ?? ba)!;
  return rank[ba.state] > rank[ab.state] ? ba : ab;
}

/** Bytes a second in both directions together, as either end counts them. */
export function carried(pair: Pair): number {
  const sum = (link: Link | undefined) => (link ? link.bytes_in_per_s + link.bytes_out_per_s : 0);
  return Math.max(sum(pair.ab), sum(pair.ba));
}

/** Line width: 1.5 without traffic, one more per decade above 1 kB/s. */
export const lineWidth = (perSecond: number) => 1.5 + Math.max(0, Math.min(6, Math.log10(Math.max(1, perSecond)) - 2.5));
