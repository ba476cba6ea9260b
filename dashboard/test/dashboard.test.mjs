// The page in a real browser against the gateway's own server: what it shows is what the API says.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { mesh, meshWithOneDown } from "./fixture.mjs";
import { openPage, picture, showing, startBrowser, startServer } from "./harness.mjs";

let server;
let browser;

before(async () => {
  server = await startServer();
  browser = await startBrowser();
});

after(async () => {
  await browser?.stop();
  await server?.stop();
});

/** Reads a shown figure back into the API's unit: `81.3ms` -> 81.3, `1.2MB/s` -> 1200000, `12s` -> 12000 (of ms). */
function figure(text) {
  const [, number, unit] = text.trim().match(/^([\d.]+)\s*(.*)$/) ?? [];
  assert.ok(number, `no figure in ${JSON.stringify(text)}`);
  const scale = { "": 1, "/s": 1, k: 1e3, "k/s": 1e3, "%": 0.01, ms: 1, s: 1e3, m: 6e4, h: 3.6e6, "B/s": 1, "kB/s": 1e3, "MB/s": 1e6 }[unit];
  assert.ok(scale, `unknown unit in ${JSON.stringify(text)}`);
  // What the last shown digit stands for.
  const step = scale * 10 ** -(number.split(".")[1]?.length ?? 0);
  return { value: Number(number) * scale, step };
}

function same(text, expected, what) {
  if (expected === null) return assert.equal(text.trim(), "–", what);
  const { value, step } = figure(text);
  assert.ok(Math.abs(value - expected) <= step, `${what}: the page shows ${text}, the API says ${expected}`);
}

async function show(page, summary) {
  summary.generated_at = Date.now();
  server.show(summary);
  await showing(page, summary.generated_at);
  return (await fetch(`${server.url}/api/v1/summary`)).json();
}

const texts = (page, selector) => page.locator(selector).allInnerTexts();

test("every figure on the page is the API's", async () => {
  const { page, complaints } = await openPage(browser.context, server.url, "#view=table");
  const api = await show(page, mesh());
  const tile = async (name) => (await page.locator(`[data-figure="${name}"]`).innerText()).replaceAll("\n", "");
  same(await tile("rps"), api.traffic.rps, "requests");
  same(await tile("success"), 1 - api.traffic.error_ratio, "success");
  same(await tile("p50"), api.traffic.p50_ms, "p50");
  same(await tile("p99"), api.traffic.p99_ms, "p99");
  assert.equal(await tile("clusters-up"), `${api.clusters.length}/${api.clusters.length}`);
  assert.equal(await tile("leader"), api.store.leader);
  assert.equal(await tile("commit"), String(api.store.commit));

  for (const service of api.services) {
    const cell = (name) => page.locator(`tr[data-service="${service.host}"] [data-cell="${name}"]`).innerText();
    same(await cell("rps"), service.rps, `${service.host} rps`);
    same(await cell("success"), service.rps === 0 ? null : 1 - service.error_ratio, `${service.host} success`);
    same(await cell("p50"), service.p50_ms, `${service.host} p50`);
    same(await cell("p99"), service.p99_ms, `${service.host} p99`);
    for (const exporter of service.exporters) assert.match(await cell("exporters"), new RegExp(exporter));
  }
  for (const link of api.links) {
    const cells = await texts(page, `tr[data-link-row="${link.from} ${link.to}"] > *`);
    assert.deepEqual(cells.slice(0, 2), [link.from, link.to]);
    assert.match(cells[2], new RegExp(link.state));
    assert.equal(cells[3], link.transport.toUpperCase());
    same(cells[4], link.rtt_us / 1_000, "RTT");
    same(cells[5], link.loss_ppm / 1e6, "loss");
    same(cells[6], link.bytes_in_per_s, "bytes in");
    same(cells[7], link.bytes_out_per_s, "bytes out");
  }
  for (const one of api.imports) {
    const shown = figure(await page.locator(`tr[data-import="${one.cluster}"] [data-cell="age"]`).innerText()).value;
    assert.ok(shown + 1_000 >= one.age_ms && shown <= one.age_ms + 3_000, `age of ${one.cluster}: ${shown}`);
  }
  assert.deepEqual(complaints, []);
  await picture(page, "table");
  await page.close();
});

test("figures change without a reload", async () => {
  const { page } = await openPage(browser.context, server.url);
  await show(page, mesh());
  await page.evaluate(() => { window.notReloaded = true; });
  for (const rps of [2000, 3000]) {
    const next = mesh();
    next.traffic.rps = rps;
    await show(page, next);
    same((await page.locator('[data-figure="rps"]').innerText()).replaceAll("\n", ""), rps, "requests");
  }
  assert.equal(await page.evaluate(() => window.notReloaded), true);
  assert.equal(await page.locator('[data-live="yes"]').innerText(), "live");
  await picture(page, "map-dark");
  await page.emulateMedia({ colorScheme: "light" });
  await picture(page, "map-light");
  await page.close();
});

test("a silent cluster is named, on the map, in the tables and at its services", async () => {
  const { page, complaints } = await openPage(browser.context, server.url);
  await show(page, meshWithOneDown());
  assert.match(await page.locator(".banner").innerText(), /gcp-us is down: not heard for 6[1-5]s \(lease ran out\)/);
  assert.equal(await page.locator('[data-figure="clusters-up"]').innerText(), "2/3");
  assert.equal(await page.locator('[data-cluster="gcp-us"].node-down').count(), 1);
  assert.equal(await page.locator('[data-link="aws-eu-gcp-us"].link-down').count(), 1);
  assert.match(await page.locator('tr[data-service^="cart."] .chip-down').innerText(), /^gcp-us\s+\(down\)$/);
  assert.match(await page.locator('tr[data-import="gcp-us"]').innerText(), /suspect/);
  assert.match(await page.locator(".tile-bad").allInnerTexts().then((all) => all.join()), /Oldest data/);
  assert.deepEqual(complaints, []);
  await picture(page, "one-down");
  await page.close();
});

test("the address keeps what one looks at", async () => {
  const { page } = await openPage(browser.context, server.url);
  await show(page, mesh());
  await page.keyboard.press("/");
  await page.keyboard.type("prod");
  await page.getByRole("button", { name: "Table" }).click();
  await page.getByRole("button", { name: "p99" }).click();
  const shown = await texts(page, "tr[data-service] th");
  assert.equal(shown.length, 2);
  await page.reload();
  await page.waitForSelector("tr[data-service]");
  assert.deepEqual(await texts(page, "tr[data-service] th"), shown);
  assert.equal(await page.locator("#filter").inputValue(), "prod");
  assert.equal(await page.locator('th[aria-sort="descending"]').innerText(), "p99 ↓");
  assert.equal(await page.getByRole("button", { name: "Table" }).getAttribute("aria-pressed"), "true");
  await page.close();
});

test("a row opens by keyboard to who calls it where", async () => {
  const { page } = await openPage(browser.context, server.url, "#q=cart");
  await show(page, mesh());
  const row = page.locator('tr[data-service^="cart."] button');
  await row.focus();
  await page.keyboard.press("Enter");
  assert.equal(await row.getAttribute("aria-expanded"), "true");
  const edges = await texts(page, "tr.edges tbody tr");
  assert.equal(edges.length, 2);
  assert.match(edges[1], /onprem → aws-eu/);
  await picture(page, "edges");
  await page.close();
});

test("every panel offers the command that prints the same", async () => {
  const { page } = await openPage(browser.context, server.url, "#q=cart");
  await browser.context.grantPermissions(["clipboard-read", "clipboard-write"], { origin: server.url });
  await show(page, mesh());
  const commands = await page.locator("button.copy").evaluateAll((all) => all.map((one) => one.dataset.command));
  assert.equal(commands.length, await page.locator("section.panel").count());
  assert.ok(commands.every((command) => /^isthmus (status|get \w+)/.test(command)), commands.join());
  await page.locator("#services button.copy").click();
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "isthmus get services cart");
  await page.close();
});

test("tables, controls and pictures have names that a screen reader can say", async () => {
  const { page } = await openPage(browser.context, server.url);
  await show(page, mesh());
  const nameless = await page.evaluate(() => [
    ...[...document.querySelectorAll("table")].filter((one) => !one.caption?.textContent.trim()),
    ...[...document.querySelectorAll("button")].filter((one) => !(one.getAttribute("aria-label") ?? one.textContent).trim()),
    ...[...document.querySelectorAll("input")].filter((one) => !one.labels?.length),
    ...[...document.querySelectorAll('svg[role="img"]')].filter((one) => !one.getAttribute("aria-label")),
    ...[...document.querySelectorAll("section")].filter((one) => !document.getElementById(one.getAttribute("aria-labelledby"))),
  ].map((one) => one.outerHTML.slice(0, 120)));
  assert.deepEqual(nameless, []);
  await page.close();
});

test("a gateway that goes away is told from one that is live, and its figures stay", async () => {
  const lone = await startServer();
  const { page } = await openPage(browser.context, lone.url);
  const summary = mesh();
  lone.show(summary);
  await showing(page, summary.generated_at);
  await lone.stop();
  await page.waitForSelector('[data-live="no"]', { timeout: 10_000 });
  assert.match(await page.locator("[data-live]").innerText(), /reconnecting, figures of \d+m?s ago/);
  same((await page.locator('[data-figure="rps"]').innerText()).replaceAll("\n", ""), summary.traffic.rps, "requests");
  await picture(page, "gone");
  await page.close();
});
