"use strict";
// Boxes for what is shown, a layout of one group at a time, and the scene that nests them. No DOM: the worker and Python run this too.

const PAD = 14, HEADER = 32, LINE = 15, PORT = 8;
/** From this many readers on, a value's edges are drawn only where they are asked for, except to the first. */
const MANY_READERS = 8;
/** Groups larger than this are laid out in plain rows. */
const MOST_FOR_DAGRE = 500;
/** How much wider the bold 13 px titles are than plain text of that size. */
const BOLD = 1.15;
// QuickJS has no structuredClone; dagre copies arrays of names with it.
if (typeof structuredClone === "undefined") globalThis.structuredClone = (value) => JSON.parse(JSON.stringify(value));

/**
 * About how wide a text is drawn.
 * @param {string} text
 * @param {number} size of the font in pixels
 * @returns {number}
 */
function textWidth(text, size) {
  let width = 0;
  for (let i = 0; i < text.length; i++) {
    const c = text.charCodeAt(i);
    if (c > 0x2e80) width += 1;
    else if (c > 126) width += 0.62;
    else if ("ijl|.,:;'!()[]`ft r-I".includes(text[i])) width += 0.34;
    else if ("mwMW@%".includes(text[i])) width += 0.88;
    else width += c >= 65 && c <= 90 ? 0.68 : 0.57;
  }
  return width * size;
}

/**
 * The lines in a box: what it is, its type, its adaptations, its tensors and marks.
 * @param {object} lens
 * @param {object} item of itemsOf
 * @returns {{text: string, style: string, adaptation?: number, node?: number, mark?: number}[]}
 */
function linesOf(lens, item) {
  return item.kind === "node" ? nodeLines(lens, item) : groupLines(lens, item);
}

/**
 * The lines in the box of a node.
 * @param {object} lens
 * @param {object} item
 * @returns {object[]}
 */
function nodeLines(lens, item) {
  const { model } = lens, i = item.node, op = model.nodes.op[i], adaptation = model.nodes.adaptation[i];
  const called = operatorName(textOf(model, "target", i)), type = shorten(textOf(model, "type", i), 40);
  const name = op === CALL ? called : textOf(model, "name", i).replace(/^%/, "");
  const lines = [{ text: shorten(item.label || name, 40), style: "title" }];
  if (op !== CALL) lines.push({ text: `${["input", "tensor", "", "output"][op]}${type ? ` \u00b7 ${type}` : ""}`, style: "sub" });
  else if (item.label) lines.push({ text: `${shorten(called, 30)}${type ? ` \u00b7 ${type}` : ""}`, style: "sub" });
  else if (type) lines.push({ text: type, style: "sub" });
  if (adaptation >= 0) {
    const part = textOf(model, "part", i);
    lines.push({ text: shorten(`${lens.names[adaptation] ?? "adaptation"}${part ? ` \u00b7 ${part}` : ""}`, 36), style: "tag", adaptation });
  }
  const mark = lens.node[i];
  if (mark === REWIRED || (lens.marks && mark > SAME)) lines.push({ text: ["", "", "+ added", "\u2212 removed", "\u2937 rewired"][mark], style: "mark", mark });
  const tensors = (lens.tensorsOf.get(i) || []).filter((t) => lens.tensors === "all" || (lens.tensors !== "none" && model.nodes.adaptation[t] >= 0));
  for (const t of tensors.slice(0, 3)) {
    const own = textOf(model, "part", t) || pathBelow(textOf(model, "target", t) || textOf(model, "name", t), textOf(model, "module", t));
    lines.push({ text: `${shorten(own, 24)} ${shorten(textOf(model, "type", t), 24)}`, style: "chip", adaptation: model.nodes.adaptation[t], node: t });
  }
  if (tensors.length > 3) lines.push({ text: `${tensors.length - 3} more tensors`, style: "sub" });
  return lines;
}

/**
 * The lines in the box of a group or of a run of layers.
 * @param {object} lens
 * @param {object} item
 * @returns {object[]}
 */
function groupLines(lens, item) {
  const stat = lens.stats[item.group], times = item.groups.length;
  const nodes = `${formatNumber(stat.nodes * times)} ${stat.nodes * times === 1 ? "node" : "nodes"}`;
  const lines = [{ text: shorten(item.label, 40), style: "title" }, { text: times > 1 ? `${times} alike layers \u00b7 ${nodes}` : nodes, style: "sub" }];
  const held = [...stat.adaptations].sort((a, b) => a[0] - b[0]);
  for (const [adaptation, count] of held.slice(0, 4)) {
    lines.push({ text: `${shorten(lens.names[adaptation] ?? "adaptation", 28)}: ${formatNumber(count * times)}${lens.verb}`, style: "tag", adaptation });
  }
  if (held.length > 4) lines.push({ text: `${held.length - 4} more ${lens.noun}`, style: "sub" });
  const said = markText(stat.marks.map((n) => n * times), lens.marks);
  const kinds = [ADDED, REMOVED, REWIRED].filter((m) => stat.marks[m]);
  if (said) lines.push({ text: said, style: "mark", mark: kinds.length === 1 ? kinds[0] : REWIRED });
  return lines;
}

/**
 * Counts of what changed in words: "+4 -1 2 rewired".
 * @param {number[]} marks counts by state
 * @param {boolean} all false: only the rewired
 * @returns {string}
 */
function markText(marks, all) {
  const said = [];
  if (all && marks[ADDED]) said.push(`+${formatNumber(marks[ADDED])}`);
  if (all && marks[REMOVED]) said.push(`\u2212${formatNumber(marks[REMOVED])}`);
  if (marks[REWIRED]) said.push(`${formatNumber(marks[REWIRED])} rewired`);
  return said.join("  ");
}

/**
 * The tree of boxes of what is shown, with the merged edges of each opened box.
 * @param {object} lens
 * @param {(key: string, item: object) => boolean} isOpen
 * @returns {{root: object, boxes: object[], leaf: Int32Array, lens: object}}
 */
function buildBoxes(lens, isOpen) {
  const { model } = lens, boxes = [], leaf = new Int32Array(model.count).fill(-1);
  const cover = (group, index) => {
    for (const stack = [group]; stack.length;) {
      const { nodes, children } = model.groups[stack.pop()];
      for (const i of nodes) leaf[i] = index;
      stack.push(...children);
    }
  };
  const add = (item, parent, local) => {
    const box = { index: boxes.length, key: item.key, item, parent, local, depth: parent < 0 ? 0 : boxes[parent].depth + 1, kids: [], links: [], hasIn: false, hasOut: false };
    boxes.push(box);
    box.open = parent < 0 || (item.kind !== "node" && box.depth < 32 && isOpen(item.key, item));
    box.lines = parent < 0 ? [] : linesOf(lens, item);
    box.mark = item.kind === "node" ? lens.node[item.node] : SAME;
    box.adaptation = item.kind === "node" ? model.nodes.adaptation[item.node] : -1;
    box.stripes = item.kind === "node" ? [] : box.lines.filter((l) => l.style === "tag").map((l) => l.adaptation);
    if (item.kind === "node") leaf[item.node] = box.index;
    else if (!box.open) for (const g of item.groups) cover(g, box.index);
    else (parent < 0 ? itemsOf(lens, 0) : itemsIn(lens, item)).forEach((inner, k) => box.kids.push(add(inner, box.index, k)));
    const wide = (l) => textWidth(l.text, l.style === "title" ? 13 : 11) * (l.style === "title" ? BOLD : 1);
    box.w = Math.min(300, Math.max(64, ...box.lines.map(wide)) + 26 + (item.kind === "node" ? 0 : 16));
    box.h = 12 + box.lines.reduce((h, l) => h + lineHeight(l), 0) + (item.kind === "run" ? 2 : 0);
    box.end = boxes.length;
    return box;
  };
  const root = add({ key: "", kind: "root", groups: [0], group: 0, node: -1, label: "" }, -1, 0);
  linkBoxes(lens, boxes, leaf);
  return { root, boxes, leaf, lens };
}

/**
 * The height of a line in a box.
 * @param {{style: string}} line
 * @returns {number}
 */
function lineHeight(line) {
  return line.style === "title" ? 18 : line.style === "chip" ? 18 : LINE;
}

/**
 * Puts each edge at the smallest box that holds both its ends; ports stand for what comes from outside of an opened box.
 * @param {object} lens
 * @param {object[]} boxes
 * @param {Int32Array} leaf the box of each node
 */
function linkBoxes(lens, boxes, leaf) {
  const { flow } = lens, merged = boxes.map(() => null);
  const link = (owner, a, b, k) => {
    const links = merged[owner] ||= new Map(), key = (a + 1) * 1048576 + b + 1;
    let found = links.get(key);
    if (!found) links.set(key, found = { a, b, ids: [], states: [0, 0, 0, 0, 0], far: false });
    found.ids.push(k);
    found.states[flow.state[k]] += 1;
  };
  for (let k = 0; k < flow.size; k++) {
    let a = leaf[flow.source[k]], b = leaf[flow.target[k]];
    if (a < 0 || b < 0 || a === b) continue;
    while (boxes[a].parent !== boxes[b].parent) {
      if (boxes[a].depth >= boxes[b].depth) {
        const up = boxes[a].parent;
        boxes[up].hasOut = true;
        link(up, boxes[a].local, -2, k);
        a = up;
      } else {
        const up = boxes[b].parent;
        boxes[up].hasIn = true;
        link(up, -1, boxes[b].local, k);
        b = up;
      }
    }
    if (a !== b) link(boxes[a].parent, boxes[a].local, boxes[b].local, k);
  }
  for (const box of boxes) {
    if (!merged[box.index]) continue;
    box.links = [...merged[box.index].values()];
    thinOut(box.links);
  }
}

/**
 * Marks the edges of values with many readers as far: all but the first, and those to readers that read nothing else.
 * @param {object[]} links
 */
function thinOut(links) {
  const fan = new Map(), held = new Set();
  for (const l of links) fan.set(l.a, (fan.get(l.a) || 0) + 1);
  for (const l of links) if (fan.get(l.a) <= MANY_READERS) held.add(l.b);
  const begun = new Set();
  for (const l of links) {
    if (fan.get(l.a) <= MANY_READERS) continue;
    if (!begun.has(l.a) || !held.has(l.b)) { begun.add(l.a); held.add(l.b); } else l.far = true;
  }
}

/**
 * What the layout needs of a tree of boxes; small enough to send to the worker.
 * @param {object} box
 * @returns {object}
 */
function jobOf(box) {
  if (!box.open) return { w: box.w, h: box.h, open: false };
  const n = box.kids.length, pairs = [];
  for (const l of box.links) if (!l.far) pairs.push(l.a < 0 ? n : l.a, l.b < 0 ? n + (box.hasIn ? 1 : 0) : l.b);
  const head = box.depth ? box.lines.reduce((w, l) => w + (l.style === "title" ? textWidth(l.text, 13) * BOLD : textWidth(l.text, 11)) + 14, 24) : 0;
  return { w: Math.min(head, 620), h: box.depth ? HEADER : 0, open: true, root: !box.depth, kids: box.kids.map(jobOf), pairs, hasIn: box.hasIn, hasOut: box.hasOut };
}

/**
 * Lays out one group: sizes and pairs of indices in, centres and routes out.
 * @param {{w: number[], h: number[], pairs: number[]}} problem
 * @param {object|null} engine dagre; null: plain rows
 * @returns {{w: number, h: number, x: number[], y: number[], routes: number[][]}}
 */
function layoutGroup(problem, engine) {
  const n = problem.w.length;
  if (!n) return { w: 40, h: 20, x: [], y: [], routes: [] };
  if (!engine || n > MOST_FOR_DAGRE || problem.pairs.length > 6 * MOST_FOR_DAGRE) return layoutRows(problem);
  const g = new engine.graphlib.Graph();
  g.setGraph({ rankdir: "TB", nodesep: 26, ranksep: 30, edgesep: 12, marginx: 0, marginy: 0, ranker: n > 150 ? "longest-path" : "network-simplex" });
  g.setDefaultEdgeLabel(() => ({}));
  for (let i = 0; i < n; i++) g.setNode(String(i), { width: problem.w[i], height: problem.h[i] });
  for (let k = 0; k < problem.pairs.length; k += 2) g.setEdge(String(problem.pairs[k]), String(problem.pairs[k + 1]), {});
  try { engine.layout(g); } catch { return layoutRows(problem); }
  const x = [], y = [], routes = [];
  for (let i = 0; i < n; i++) { const at = g.node(String(i)); x.push(at.x); y.push(at.y); }
  for (let k = 0; k < problem.pairs.length; k += 2) {
    const { points } = g.edge(String(problem.pairs[k]), String(problem.pairs[k + 1]));
    routes.push(attach(points.flatMap((p) => [p.x, p.y]), problem, problem.pairs[k], problem.pairs[k + 1], x, y));
  }
  return settle(problem, x, y, routes);
}

/**
 * Lets a route leave below its source and arrive above its target: dagre may end it at the side of a tall box.
 * @param {number[]} route
 * @param {{w: number[], h: number[]}} problem
 * @param {number} a source
 * @param {number} b target
 * @param {number[]} x centres
 * @param {number[]} y centres
 * @returns {number[]}
 */
function attach(route, problem, a, b, x, y) {
  const n = route.length, bottom = y[a] + problem.h[a] / 2, top = y[b] - problem.h[b] / 2;
  const near = (i, wish) => Math.max(x[i] - problem.w[i] * 0.36, Math.min(x[i] + problem.w[i] * 0.36, wish));
  if (n > 4 && route[3] >= bottom && route[n - 3] <= top) {
    [route[0], route[1]] = [near(a, route[2]), bottom];
    [route[n - 2], route[n - 1]] = [near(b, route[n - 4]), top];
  }
  return route;
}

/**
 * Moves a layout so that it begins at 0, 0 and tells its size.
 * @param {{w: number[], h: number[]}} problem
 * @param {number[]} x centres
 * @param {number[]} y centres
 * @param {number[][]} routes
 * @returns {object}
 */
function settle(problem, x, y, routes) {
  let left = Infinity, top = Infinity, right = -Infinity, bottom = -Infinity;
  const see = (l, t, r, b) => { left = Math.min(left, l); top = Math.min(top, t); right = Math.max(right, r); bottom = Math.max(bottom, b); };
  for (let i = 0; i < x.length; i++) see(x[i] - problem.w[i] / 2, y[i] - problem.h[i] / 2, x[i] + problem.w[i] / 2, y[i] + problem.h[i] / 2);
  for (const r of routes) for (let k = 0; k < r.length; k += 2) see(r[k], r[k + 1], r[k], r[k + 1]);
  return { w: right - left, h: bottom - top, x: x.map((v) => v - left), y: y.map((v) => v - top), routes: routes.map((r) => r.map((v, k) => v - (k % 2 ? top : left))) };
}

/**
 * A layout in plain rows by the longest way from a source, for groups that are too large for dagre.
 * @param {{w: number[], h: number[], pairs: number[]}} problem
 * @returns {object}
 */
function layoutRows(problem) {
  const n = problem.w.length, rank = new Array(n).fill(0), into = Array.from({ length: n }, () => []);
  for (let k = 0; k < problem.pairs.length; k += 2) {
    const [a, b] = [problem.pairs[k], problem.pairs[k + 1]];
    if (a < b || a === problem.first) into[b].push(a);
  }
  for (let i = 0; i < n; i++) for (const a of into[i]) rank[i] = Math.max(rank[i], rank[a] + 1);
  const rows = [], x = new Array(n).fill(0), y = new Array(n).fill(0);
  rank.forEach((r, i) => (rows[r] ||= []).push(i));
  let top = 0;
  for (const row of rows) {
    if (!row) continue;
    const wish = (i) => into[i].length ? into[i].reduce((sum, a) => sum + x[a], 0) / into[i].length : 0;
    row.sort((a, b) => wish(a) - wish(b) || a - b);
    // A long row is broken, so that a graph without modules does not become one line.
    for (let at = 0; at < row.length; at += 60) {
      const part = row.slice(at, at + 60), wide = part.reduce((sum, i) => sum + problem.w[i] + 26, -26), tall = Math.max(...part.map((i) => problem.h[i]));
      let left = -wide / 2;
      for (const i of part) { x[i] = left + problem.w[i] / 2; y[i] = top + tall / 2; left += problem.w[i] + 26; }
      top += tall + 34;
    }
  }
  const routes = [];
  for (let k = 0; k < problem.pairs.length; k += 2) {
    const [a, b] = [problem.pairs[k], problem.pairs[k + 1]], down = y[a] <= y[b] ? 1 : -1;
    routes.push([x[a], y[a] + down * problem.h[a] / 2, x[b], y[b] - down * problem.h[b] / 2]);
  }
  return settle(problem, x, y, routes);
}

/**
 * Lays out a job from the inside out; groups with the same sizes and edges share one layout.
 * @param {object} job of jobOf
 * @param {object|null} engine dagre
 * @param {Map<string, object>} cache
 * @returns {object|null} null for a closed box
 */
function layoutTree(job, engine, cache) {
  if (!job.open) return null;
  const inner = job.kids.map((kid) => layoutTree(kid, engine, cache));
  const w = job.kids.map((kid, i) => inner[i] ? inner[i].w : kid.w), h = job.kids.map((kid, i) => inner[i] ? inner[i].h : kid.h);
  for (const port of [job.hasIn, job.hasOut]) if (port) { w.push(PORT); h.push(PORT); }
  const key = `${w.join()};${h.join()};${job.pairs.join()}`;
  let found = cache.get(key);
  if (!found) {
    if (cache.size > 4000) cache.clear();
    cache.set(key, found = layoutGroup({ w, h, pairs: job.pairs, first: job.hasIn ? job.kids.length : -1 }, engine));
  }
  const pad = job.root ? 24 : PAD, wide = Math.max(found.w, job.w - 2 * pad);
  return { ...found, w: wide + 2 * pad, h: found.h + job.h + 2 * pad, dx: pad + (wide - found.w) / 2, dy: job.h + pad, kids: inner };
}

/**
 * Sets the place of each box and the route of each edge in one coordinate system.
 * @param {{root: object, boxes: object[], leaf: Int32Array, lens: object}} built of buildBoxes
 * @param {object} layout of layoutTree
 * @returns {object} the scene
 */
function composeScene(built, layout) {
  const place = (box, at, left, top) => {
    box.x = left; box.y = top;
    if (!box.open) return;
    box.w = at.w; box.h = at.h;
    const ox = left + at.dx, oy = top + at.dy, n = box.kids.length;
    box.kids.forEach((kid, i) => {
      const inner = at.kids[i], w = inner ? inner.w : kid.w, h = inner ? inner.h : kid.h;
      place(kid, inner, ox + at.x[i] - w / 2, oy + at.y[i] - h / 2);
    });
    box.inPort = box.hasIn ? { x: ox + at.x[n], y: oy + at.y[n] } : null;
    box.outPort = box.hasOut ? { x: ox + at.x[at.x.length - 1], y: oy + at.y[at.x.length - 1] } : null;
    let drawn = 0;
    for (const l of box.links) {
      const from = l.a < 0 ? box.inPort : box.kids[l.a], to = l.b < 0 ? box.outPort : box.kids[l.b];
      if (l.far) {
        l.points = [from.x + (from.w || 0) / 2, from.y + (from.h || 0), to.x + (to.w || 0) / 2, to.y];
      } else l.points = at.routes[drawn++].map((v, k) => v + (k % 2 ? oy : ox));
    }
  };
  place(built.root, layout, 0, 0);
  return { ...built, width: layout.w, height: layout.h };
}

/**
 * The way to a module or a node: the keys to open, and the item that then shows it.
 * @param {object} lens
 * @param {string} path of the module
 * @param {number} node or -1
 * @returns {{keys: string[], item: object|null}}
 */
function wayTo(lens, path, node = -1) {
  const { groups } = lens.model, keys = [], within = (g, p) => groups[g].path === p || p.startsWith(`${groups[g].path}.`);
  let items = itemsOf(lens, 0);
  for (let depth = 0; depth < 32; depth++) {
    const item = items.find((it) => it.kind === "node" && it.node === node && node >= 0)
      || items.find((it) => it.groups.some((g) => within(g, path)))
      || (node < 0 && items.find((it) => it.groups.length && groups[it.group].path.startsWith(`${path}.`)));
    if (!item) return { keys, item: null };
    const here = item.kind !== "run" && (groups[item.group].path === path || !within(item.group, path));
    if (item.kind === "node" || (node < 0 && (here || !item.groups.some((g) => within(g, path))))) return { keys, item };
    keys.push(item.key);
    items = itemsIn(lens, item);
  }
  return { keys, item: null };
}
