// Reads pages of the built documentation in a browser, light and dark, wide and narrow:
//   node docs/check_pages.mjs SITE BROWSER PAGE...
// Prints a sentence for each serious or critical violation that axe-core finds, for each thing that a page asks the
// network for, for each page that is wider than its window, and if the search finds nothing. Exit status 1 if there is any.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

// Where `make docs-check` installs what package.json names.
const require = createRequire(new URL("_build/node/", import.meta.url));
const { chromium } = require("playwright-core");
const GRAVE = ["serious", "critical"];
const SEARCHED = "BinaryConv";
const [site, browserPath, ...pages] = process.argv.slice(2);
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

function addressOf(name) {
  const [path, query] = name.split("?");
  return pathToFileURL(resolve(site, path)).href + (query ? `?${query}` : "");
}

const browser = await chromium.launch({ executablePath: browserPath, args: ["--no-sandbox"] });
const wrong = [];

async function open(name, options) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) wrong.push(`${name}: asks the network for ${request.url()}`);
  });
  // The search shows beginnings of pages where a server gives them, and goes without where the pages are files.
  page.on("pageerror", ({ message }) => message === "Failed to fetch" || wrong.push(`${name}: a script fails: ${message}`));
  await page.goto(addressOf(name), { waitUntil: "load" });
  return page;
}

for (const name of pages) {
  if (!existsSync(resolve(site, name))) {
    wrong.push(`${name}: there is no such page`);
    continue;
  }
  for (const colorScheme of ["light", "dark"]) {
    const page = await open(name, { colorScheme });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
    for (const { id, help, impact, nodes } of violations.filter((found) => GRAVE.includes(found.impact))) {
      const first = nodes[0].html.replace(/\s+/g, " ").slice(0, 160);
      wrong.push(`${name}, ${colorScheme}: ${impact}: ${help} (${id}), ${nodes.length} times, first ${nodes[0].target}: ${first}`);
      if (process.env.EVERY) nodes.forEach((node) => wrong.push(`    ${node.target} ${node.failureSummary.replace(/\s+/g, " ")}`));
    }
    await page.context().close();
  }
  const page = await open(name, { viewport: { width: 390, height: 844 } });
  const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  if (over > 0) wrong.push(`${name}: is ${over} pixels wider than a window of 390`);
  await page.context().close();
}

if (existsSync(resolve(site, "search.html"))) {
  const page = await open(`search.html?q=${SEARCHED}`);
  const found = page.waitForSelector("#search-results li a", { timeout: 20000 });
  await found.catch(() => wrong.push(`search.html: finds nothing for ${SEARCHED}`));
}
await browser.close();

const right = `${pages.length} pages, light and dark: no serious violation, nothing from the network; the search finds`;
console.log([...new Set(wrong)].join("\n") || right);
process.exit(wrong.length ? 1 : 0);
