// Starts the gateway's dashboard server and a browser for it.

import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const BROWSERS = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

/** The server of `gateway/examples/dashboard.rs`: real router, page and headers; summaries from here. */
export async function startServer() {
  const command = process.env.DASHBOARD_SERVER;
  const child = command
    ? spawn(command, { stdio: ["pipe", "pipe", "inherit"] })
    : spawn("cargo", ["run", "--quiet", "-p", "isthmus-gateway", "--example", "dashboard"], { stdio: ["pipe", "pipe", "inherit"] });
  const url = await new Promise((resolve, reject) => {
    createInterface({ input: child.stdout }).once("line", resolve);
    child.once("error", reject);
    child.once("exit", (code) => reject(new Error(`the dashboard server ended with ${code}`)));
  });
  return {
    url,
    show: (summary) => child.stdin.write(`${JSON.stringify(summary)}\n`),
    stop: () => new Promise((resolve) => { child.once("exit", resolve); child.stdin.end(); }),
  };
}

export async function startBrowser() {
  const executablePath = process.env.CHROMIUM ?? BROWSERS.find(existsSync);
  if (!executablePath) throw new Error("no chromium: apt install chromium, or set CHROMIUM");
  const profile = mkdtempSync(join(tmpdir(), "isthmus-browser-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath, headless: true, args: FLAGS, viewport: { width: 1440, height: 1180 }, colorScheme: "dark",
  });
  const stop = async () => {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  };
  return { context, stop };
}

/** Opens the page; remembers whatever it complained about or asked of other hosts. */
export async function openPage(context, url, hash = "") {
  const page = await context.newPage();
  const complaints = [];
  page.on("console", (message) => { if (message.type() === "error") complaints.push(message.text()); });
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => { if (!request.url().startsWith(url)) complaints.push(`asked ${request.url()}`); });
  await page.goto(`${url}/${hash}`);
  await page.waitForSelector("main[data-generated-at]");
  return { page, complaints };
}

/** Waits until the page shows the summary made at `generatedAt`. */
export const showing = (page, generatedAt) => page.waitForSelector(`main[data-generated-at="${generatedAt}"]`, { timeout: 5_000 });

/** A picture for people, where they asked for it. */
export async function picture(page, name) {
  const dir = process.env.SCREENSHOTS;
  if (dir) await page.screenshot({ path: join(dir, `${name}.png`), fullPage: true });
}
