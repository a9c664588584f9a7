// Bundles dagre (with graphlib) into dagre.js and collects the licences: `npm ci && npm run build`, then remove node_modules.
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const packages = ["@dagrejs/dagre", "@dagrejs/graphlib"];

/**
 * One of the packages' own files, as text.
 * @param {string} name the package
 * @param {string} file the file in it
 * @returns {Promise<string>}
 */
const read = (name, file) => readFile(`${here}node_modules/${name}/${file}`, "utf8");

const versions = await Promise.all(packages.map(async (name) => `${name} ${JSON.parse(await read(name, "package.json")).version}`));
const notice = `/* ${versions.join(", ")}; MIT licence, see LICENSE.txt; bundled by build.mjs. */`;

const bundled = await build({
  stdin: {
    contents: 'import * as all from "@dagrejs/dagre"; globalThis.dagre = all.default ?? all;',
    resolveDir: here,
    loader: "js",
  },
  bundle: true,
  format: "iife",
  minify: true,
  target: "es2020",
  charset: "ascii",
  legalComments: "none",
  write: false,
});
const text = bundled.outputFiles[0].text.trim();
// The page puts this text into a <script>: nothing in it may end the element or begin a comment.
if (/<\/script|<!--/i.test(text)) throw new Error("the bundle holds text that would end a <script> element");
await writeFile(`${here}dagre.js`, `${notice}\n${text}\n`);

const licences = await Promise.all(packages.map(async (name, i) => `${versions[i]}\n\n${(await read(name, "LICENSE")).trim()}\n`));
await writeFile(`${here}LICENSE.txt`, licences.join(`\n${"-".repeat(80)}\n\n`));
