"use strict";
// The graph as groups (modules), what a view shows of it, and what stands in a group. No DOM: Python runs this file too.

/** What a node or an edge is in a view. */
const ABSENT = 0, SAME = 1, ADDED = 2, REMOVED = 3, REWIRED = 4;
/** What a node is. */
const INPUT = 0, TENSOR = 1, CALL = 2, OUTPUT = 3;
/** A list of layers with at most this many different runs is shown without a box of its own. */
const MOST_RUNS_INLINE = 8;

/**
 * Text with control, format and bidirectional characters shown as escapes.
 * @param {*} text
 * @returns {string}
 */
function visibleText(text) {
  return String(text ?? "").replace(/[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029\ufffe\uffff]/gu, (c) => {
    const code = c.codePointAt(0).toString(16);
    return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
  });
}

/**
 * Visible text, shortened in the middle.
 * @param {*} text
 * @param {number} most characters to keep
 * @returns {string}
 */
function shorten(text, most = 60) {
  const whole = visibleText(text);
  if (whole.length <= most) return whole;
  const head = whole.slice(0, Math.ceil((most - 1) / 2)).replace(/[\ud800-\udbff]$/, "");
  const tail = whole.slice(whole.length - Math.floor((most - 1) / 2)).replace(/^[\udc00-\udfff]/, "");
  return `${head}\u2026${tail}`;
}

/**
 * A whole number with thousands separated; fractions keep up to six significant digits.
 * @param {*} value
 * @returns {string}
 */
function formatNumber(value) {
  if (typeof value !== "number") return value == null ? "\u2013" : visibleText(value);
  if (!Number.isFinite(value)) return String(value);
  if (!Number.isInteger(value)) {
    const size = Math.abs(value);
    return size >= 1e-4 && size < 1e7 ? String(Number(value.toPrecision(6))) : value.toExponential(2).replace(/\.?0+e/, "e");
  }
  return String(value).replace(/\B(?=(\d{3})+(?!\d))/g, ",");
}

/**
 * A number in short: 6.74 B, 147 k.
 * @param {*} value
 * @param {number} base 1000, or 1024 for bytes
 * @returns {string}
 */
function formatShort(value, base = 1000) {
  if (typeof value !== "number" || !Number.isFinite(value)) return formatNumber(value);
  const units = base === 1024 ? ["B", "KiB", "MiB", "GiB", "TiB"] : ["", "k", "M", "B", "T"];
  let size = value, unit = 0;
  while (Math.abs(size) >= base && unit < units.length - 1) { size /= base; unit += 1; }
  const digits = unit === 0 ? formatNumber(size) : String(Number(size.toPrecision(3)));
  return units[unit] ? `${digits} ${units[unit]}` : digits;
}

/**
 * The short name of an operator: "aten.linear.default" is "linear".
 * @param {string} target
 * @returns {string}
 */
function operatorName(target) {
  const overload = /^(?:torch\.)?(?:ops\.)?(?:aten|prims)\.(\w+)(?:\.\w+)?$/.exec(target);
  return overload ? overload[1] : String(target).replace(/^(_operator|operator|torch\.nn\.functional|torch\.ops|torch)\./, "").replace(/\.default$/, "");
}

/**
 * The lists of edges that end (or begin) at each node, as offsets into one array.
 * @param {number} count of nodes
 * @param {ArrayLike<number>} ends the node of each edge
 * @returns {{start: Int32Array, edges: Int32Array}}
 */
function edgeLists(count, ends) {
  const start = new Int32Array(count + 1), edges = new Int32Array(ends.length);
  for (let e = 0; e < ends.length; e++) start[ends[e] + 1] += 1;
  for (let i = 0; i < count; i++) start[i + 1] += start[i];
  const next = start.slice();
  for (let e = 0; e < ends.length; e++) edges[next[ends[e]]++] = e;
  return { start, edges };
}

/**
 * A graph with its groups: one for each module path, the parent always before its children.
 * @param {object} graph of the data
 * @returns {object} the model
 */
function openGraph(graph) {
  const { nodes, edges } = graph;
  const strings = graph.strings || [];
  const count = nodes.op.length;
  const groups = [{ id: 0, path: "", name: "", parent: -1, children: [], nodes: [] }];
  const byPath = new Map([["", 0]]), byString = new Map();
  const groupAt = (path) => {
    const known = byPath.get(path);
    if (known !== undefined) return known;
    // Not recursive: a hostile path may have thousands of dots.
    let parent = 0, at = 0;
    while (at >= 0) {
      const dot = path.indexOf(".", at);
      const prefix = dot < 0 ? path : path.slice(0, dot);
      let id = byPath.get(prefix);
      if (id === undefined) {
        id = groups.length;
        groups.push({ id, path: prefix, name: path.slice(at, dot < 0 ? undefined : dot), parent, children: [], nodes: [] });
        groups[parent].children.push(id);
        byPath.set(prefix, id);
      }
      parent = id;
      at = dot < 0 || groups.length > 200000 ? -1 : dot + 1;
    }
    return parent;
  };
  const ins = edgeLists(count, edges.target), outs = edgeLists(count, edges.source);
  const groupOf = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    let from = nodes.module[i];
    if (nodes.op[i] === TENSOR && !strings[from] && outs.start[i] < outs.start[i + 1]) {
      from = nodes.module[edges.target[outs.edges[outs.start[i]]]]; // a tensor of no module stands with its reader
    }
    let id = byString.get(from);
    if (id === undefined) byString.set(from, id = groupAt(strings[from] || ""));
    groupOf[i] = id;
    groups[id].nodes.push(i);
  }
  for (const group of groups) {
    group.numeric = /^\d+$/.test(group.name);
    group.first = group.nodes.length ? group.nodes[0] : count;
  }
  for (let g = groups.length - 1; g > 0; g--) {
    const parent = groups[groups[g].parent];
    parent.first = Math.min(parent.first, groups[g].first);
  }
  return { graph, strings, nodes, edges, count, groups, byPath, groupOf, ins, outs, byName: null };
}

/**
 * A string of one of a model's columns; "" where there is none.
 * @param {object} model
 * @param {string} column
 * @param {number} node
 * @returns {string}
 */
function textOf(model, column, node) {
  const at = model.nodes[column][node];
  return at >= 0 ? model.strings[at] ?? "" : "";
}

/**
 * The node of a name, or -1.
 * @param {object} model
 * @param {string} name
 * @returns {number}
 */
function nodeNamed(model, name) {
  if (!model.byName) {
    model.byName = new Map();
    for (let i = model.count - 1; i >= 0; i--) model.byName.set(textOf(model, "name", i), i);
  }
  return model.byName.get(name) ?? model.byName.get(`%${name}`) ?? -1;
}

/**
 * Whether a node or edge is in the graph after a step.
 * @param {object} columns nodes or edges
 * @param {number} i
 * @param {number} frame -1: the base's own graph
 * @returns {boolean}
 */
function existsIn(columns, i, frame) {
  return frame < 0 ? columns.base[i] === 1 : columns.born[i] <= frame && (columns.gone[i] === -1 || frame < columns.gone[i]);
}

/**
 * What a view shows: the state of each node and edge, and what each group holds.
 * @param {object} model
 * @param {{view: string, frame: number, hidden: Set<number>, tensors: string, names: string[], verb: string, noun: string}} asked
 *   view: after, before, diff or frame; tensors: all, adaptations or none; names: of the adaptations; verb: after their counts; noun: what they are
 * @returns {object} the lens
 */
function makeLens(model, asked) {
  const { nodes, edges, count, groups } = model;
  const frames = model.graph.frames || [], last = frames.length - 1;
  const frame = asked.view === "frame" ? Math.max(0, Math.min(asked.frame, last)) : last;
  // What no output is made of any more is not there after the rewrites; its steps still show it.
  const left = asked.view === "after" || asked.view === "diff" ? nodes.unread : null;
  const inFrame = (columns, f) => (i) => existsIn(columns, i, f) && !(left && f === frame && (columns === nodes ? left[i] : left[columns.target[i]] || left[columns.source[i]]));
  // A first step that made the whole graph has nothing to be compared with.
  const made = frame === 0 && frames.length > 0 && frames[0].added >= frames[0].nodes;
  const before = asked.view !== "frame" ? -1 : made ? 0 : frame - 1;
  const hidden = asked.hidden || new Set();
  const states = (columns, size) => {
    const had = inFrame(columns, before), has = inFrame(columns, frame), state = new Uint8Array(size);
    for (let i = 0; i < size; i++) {
      const old = had(i), now = has(i);
      if (asked.view === "before") state[i] = old ? SAME : ABSENT;
      else state[i] = now ? (old ? SAME : ADDED) : (old && asked.view !== "after" ? REMOVED : ABSENT);
    }
    return state;
  };
  const node = states(nodes, count), edge = states(edges, edges.source.length);
  if (asked.view !== "before") {
    const had = inFrame(edges, before), has = inFrame(edges, frame);
    for (let e = 0; e < edge.length; e++) if (had(e) !== has(e) && node[edges.target[e]] === SAME) node[edges.target[e]] = REWIRED;
    if (asked.view === "diff" && nodes.was) for (let i = 0; i < count; i++) if (node[i] === SAME && nodes.was[i] >= 0) node[i] = REWIRED;
  }
  const lens = { model, view: asked.view, frame, before, tensors: asked.tensors || "adaptations", names: asked.names || [], verb: asked.verb ?? " inserted", noun: asked.noun || "adaptations", marks: asked.view === "diff" || asked.view === "frame", node, edge, items: new Map() };
  for (let i = 0; i < count && hidden.size; i++) if (hidden.has(nodes.adaptation[i])) node[i] = ABSENT;
  flowOf(lens, hidden);
  statsOf(lens, groups);
  return lens;
}

/**
 * Sets the lens's flow: its edges between shown nodes, where a hidden node is passed through, and the tensors of each node.
 * @param {object} lens
 * @param {Set<number>} hidden adaptations
 */
function flowOf(lens, hidden) {
  const { model, node, edge } = lens, { edges, nodes, ins } = model;
  const source = [], target = [], state = [], origin = [];
  const reads = new Map();
  lens.tensorsOf = reads;
  const passed = (i, found, seen) => {
    const stack = [i];
    while (stack.length && seen.size < 2000) {
      const at = stack.pop();
      for (let k = ins.start[at]; k < ins.start[at + 1]; k++) {
        const e = ins.edges[k], s = edges.source[e];
        if (!edge[e] || seen.has(s)) continue;
        seen.add(s);
        if (node[s] !== ABSENT) { if (nodes.op[s] !== TENSOR) found.push(s); }
        else if (hidden.has(nodes.adaptation[s])) stack.push(s);
      }
    }
    return found;
  };
  for (let e = 0; e < edge.length; e++) {
    const s = edges.source[e], t = edges.target[e];
    if (!edge[e] || node[t] === ABSENT) continue;
    if (node[s] === ABSENT) {
      if (!hidden.has(nodes.adaptation[s])) continue;
      for (const from of passed(s, [], new Set())) { source.push(from); target.push(t); state.push(edge[e]); origin.push(e); }
    } else if (nodes.op[s] === TENSOR) {
      if (!reads.has(t)) reads.set(t, []);
      if (!reads.get(t).includes(s)) reads.get(t).push(s);
    } else { source.push(s); target.push(t); state.push(edge[e]); origin.push(e); }
  }
  lens.flow = { source, target, state, origin, size: source.length };
}

/**
 * Sets what each group of the lens holds: counts, FLOPs, adaptations, and a number that alike groups share.
 * @param {object} lens
 * @param {object[]} groups
 */
function statsOf(lens, groups) {
  const { model, node } = lens, { nodes } = model;
  const known = new Map();
  const intern = (key) => {
    let id = known.get(key);
    if (id === undefined) known.set(key, id = known.size);
    return id;
  };
  // What a part is called may hold the number of its layer.
  const parts = new Map(), partOf = (at) => {
    if (!parts.has(at)) parts.set(at, at < 0 ? "" : intern(String(model.strings[at]).replace(/\d+/g, "#")));
    return parts.get(at);
  };
  const reads = new Uint32Array(model.count);
  for (let k = 0; k < lens.flow.size; k++) reads[lens.flow.target[k]] += 1;
  lens.stats = groups.map(() => null);
  for (let g = groups.length - 1; g >= 0; g--) {
    const group = groups[g], keys = [];
    const stat = { nodes: 0, tensors: 0, own: [], marks: [0, 0, 0, 0, 0], adaptations: new Map(), flops: 0, inner: [], alike: 0 };
    for (const i of group.nodes) {
      if (node[i] === ABSENT) continue;
      keys.push(intern(`${nodes.op[i]},${nodes.op[i] === CALL ? nodes.target[i] : ""},${nodes.type[i]},${nodes.adaptation[i]},${partOf(nodes.part[i])},${node[i]},${reads[i]}`));
      stat.marks[node[i]] += 1;
      stat.flops += node[i] === REMOVED ? 0 : nodes.flops[i] || 0;
      if (nodes.adaptation[i] >= 0) stat.adaptations.set(nodes.adaptation[i], (stat.adaptations.get(nodes.adaptation[i]) || 0) + 1);
      if (nodes.op[i] === TENSOR) stat.tensors += 1;
      else { stat.nodes += 1; stat.own.push(i); }
    }
    for (const child of group.children) {
      const inner = lens.stats[child];
      if (!inner.nodes) continue;
      stat.inner.push(child);
      keys.push(`${groups[child].name}:${inner.alike}`);
      stat.nodes += inner.nodes;
      stat.tensors += inner.tensors;
      stat.flops += inner.flops;
      for (let m = 0; m < 5; m++) stat.marks[m] += inner.marks[m];
      for (const [a, n] of inner.adaptations) stat.adaptations.set(a, (stat.adaptations.get(a) || 0) + n);
    }
    stat.alike = intern(keys.join(";"));
    lens.stats[g] = stat;
  }
}

/**
 * Groups in order, with neighbours that are numbered and alike put together.
 * @param {object} lens
 * @param {number[]} ids of groups
 * @returns {number[][]}
 */
function runsOf(lens, ids) {
  const { groups } = lens.model, runs = [];
  const order = ids.every((g) => groups[g].numeric) ? [...ids].sort((a, b) => Number(groups[a].name) - Number(groups[b].name)) : ids;
  for (const g of order) {
    const run = runs[runs.length - 1];
    if (run && groups[g].numeric && groups[run[0]].numeric && lens.stats[run[0]].alike === lens.stats[g].alike) run.push(g);
    else runs.push([g]);
  }
  return runs;
}

/**
 * The path of a module below another.
 * @param {string} path
 * @param {string} above
 * @returns {string}
 */
function pathBelow(path, above) {
  return above && path.startsWith(`${above}.`) ? path.slice(above.length + 1) : path;
}

/**
 * What stands in a group: nodes, groups and runs of alike layers, in graph order.
 * @param {object} lens
 * @param {number} id of the group
 * @returns {{key: string, kind: string, group: number, groups: number[], node: number, label: string, first: number}[]}
 */
function itemsOf(lens, id) {
  const cached = lens.items.get(id);
  if (cached) return cached;
  const { model } = lens, { groups } = model, above = groups[id].path, items = [];
  for (const node of lens.stats[id].own) items.push({ key: `%${node}`, kind: "node", group: id, groups: [], node, label: "", first: node });
  const place = (runs) => {
    for (const run of runs) {
      const item = run.length > 1 ? runItem(lens, run, above) : groupItem(lens, run[0], above);
      if (item.kind === "container") place(item.runs);
      else items.push(item);
    }
  };
  place(runsOf(lens, lens.stats[id].inner));
  items.sort((a, b) => a.first - b.first);
  lens.items.set(id, items);
  return items;
}

/**
 * The item of a run of alike layers.
 * @param {object} lens
 * @param {number[]} run ids of groups
 * @param {string} above the path that the label leaves out
 * @returns {object}
 */
function runItem(lens, run, above) {
  const { groups } = lens.model, first = groups[run[0]], last = groups[run[run.length - 1]], list = groups[first.parent].path;
  const label = `${pathBelow(list, above) === above ? "" : pathBelow(list, above)} ${first.name}\u2013${last.name}`.trim();
  return { key: `${list}[${first.name}-${last.name}]`, kind: "run", group: run[0], groups: run, node: -1, label, first: first.first };
}

/**
 * The item of a group: a chain of single groups is one, a list of layers gives its runs, a group of one node is that node.
 * @param {object} lens
 * @param {number} id
 * @param {string} above the path that the label leaves out
 * @returns {object}
 */
function groupItem(lens, id, above) {
  const { groups } = lens.model, { stats } = lens;
  while (!stats[id].own.length && stats[id].inner.length === 1) id = stats[id].inner[0];
  const stat = stats[id], group = groups[id];
  const item = { key: group.path, kind: "group", group: id, groups: [id], node: -1, label: pathBelow(group.path, above), first: group.first };
  if (stat.nodes === 1 && stat.own.length === 1) return { ...item, key: `%${stat.own[0]}`, kind: "node", node: stat.own[0] };
  if (!stat.own.length && stat.inner.length > 1 && stat.inner.every((g) => groups[g].numeric)) {
    const runs = runsOf(lens, stat.inner);
    if (runs.length <= MOST_RUNS_INLINE) return { ...item, kind: "container", runs };
  }
  return item;
}

/**
 * What stands in an opened item.
 * @param {object} lens
 * @param {object} item a group or a run
 * @returns {object[]}
 */
function itemsIn(lens, item) {
  if (item.kind !== "run") return itemsOf(lens, item.group);
  const { groups } = lens.model, list = groups[groups[item.group].parent];
  const above = list.parent > 0 ? groups[list.parent].path : "";
  if (lens.peek && item.groups.length > 2) {
    item.layers ||= [groupItem(lens, item.groups[0], above), runItem(lens, item.groups.slice(1), above)];
  }
  item.layers ||= item.groups.map((g) => groupItem(lens, g, above)).map((layer) => layer.kind === "container" ? { ...layer, kind: "group" } : layer);
  return item.layers;
}

/**
 * The keys to open for a level of detail.
 * @param {object} lens
 * @param {string} level top: the largest group while it fits; layers: each layer as a box; nodes: also what is in the first of each run of alike ones
 * @returns {Set<string>}
 */
function keysOfLevel(lens, level) {
  const { stats } = lens, keys = new Set();
  const size = (item) => stats[item.group].nodes * item.groups.length;
  const holdsRun = (item, depth) => item.kind === "group" && depth < 32 && itemsOf(lens, item.group).some((it) => it.kind === "run" || holdsRun(it, depth + 1));
  const openAll = (item, depth) => {
    if (item.kind === "node" || depth > 32 || keys.size > 5000) return;
    keys.add(item.key);
    for (const inner of itemsIn(lens, item)) if (!lens.peek || stats[inner.group].adaptations.size || size(inner) < 40) openAll(inner, depth + 1);
  };
  const walk = (items, depth) => {
    for (const item of items) {
      if (item.kind === "run") {
        keys.add(item.key);
        if (level === "nodes") openAll(itemsIn(lens, item)[0], depth + 1);
      } else if (holdsRun(item, depth)) { keys.add(item.key); walk(itemsOf(lens, item.group), depth + 1); }
      else if (level === "nodes" && item.kind === "group" && size(item) <= 400) openAll(item, depth + 1);
    }
  };
  let items = itemsOf(lens, 0);
  for (let depth = 0; depth < 5; depth++) {
    const largest = items.filter((it) => it.kind === "group").sort((a, b) => size(b) - size(a))[0];
    if (!largest || size(largest) < 0.6 * stats[0].nodes || items.length + itemsIn(lens, largest).length > 40) break;
    keys.add(largest.key);
    items = itemsIn(lens, largest);
  }
  if (level !== "top") walk(itemsOf(lens, 0), 0);
  return keys;
}
