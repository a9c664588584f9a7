"use strict";
// The details of what is selected: a node, a group, an edge or an adaptation.

/**
 * A list of names and values; empty values are left out.
 * @param {[string, *][]} rows a value is text, an element, or a list of them
 * @returns {HTMLElement}
 */
function factList(rows) {
  const list = el("dl", { class: "facts" });
  for (const [name, value] of rows) {
    const all = (Array.isArray(value) ? value : [value]).filter((v) => v !== null && v !== undefined && v !== "");
    if (!all.length) continue;
    list.append(el("dt", { text: name }), ...all.map((v) => v instanceof Node ? el("dd", {}, v) : el("dd", { class: typeof v === "number" ? "whole-number" : "", text: typeof v === "number" ? formatNumber(v) : v })));
  }
  return list;
}

/**
 * A heading with what stands under it; nothing when that is empty.
 * @param {string} title
 * @param {(Node|null)[]} inside
 * @returns {HTMLElement|null}
 */
function panelPart(title, inside) {
  const held = inside.filter(Boolean);
  return held.length ? el("section", {}, el("h3", { text: title }), ...held) : null;
}

/**
 * A button that looks like a link.
 * @param {string} text
 * @param {() => void} act
 * @param {string} title
 * @returns {HTMLElement}
 */
function linkTo(text, act, title = "") {
  return el("button", { class: "link", type: "button", title: title || null, text, on: { click: act } });
}

/**
 * Links to nodes, with the position of each where there is one; a long list is cut.
 * @param {object} page
 * @param {{node: number, position?: string}[]} entries
 * @returns {HTMLElement|null}
 */
function nodeLinks(page, entries) {
  if (!entries.length) return null;
  const { model } = page, list = el("ul", { class: "links" });
  for (const { node, position } of entries.slice(0, 40)) {
    const name = textOf(model, "name", node), kind = model.nodes.op[node] === CALL ? operatorName(textOf(model, "target", node)) : ["input", "tensor", "", "output"][model.nodes.op[node]];
    list.append(el("li", {}, position !== undefined && position !== "" ? el("span", { class: "position", text: `${shorten(position, 24)} ` }) : null,
      linkTo(shorten(name, 60), () => page.select({ kind: "node", node }), shorten(name, 300)), el("span", { class: "more", text: ` ${shorten(kind, 40)} ` }),
      adapterLink(page, model.nodes.adaptation[node])));
  }
  if (entries.length > 40) list.append(el("li", { class: "more", text: `and ${formatNumber(entries.length - 40)} more` }));
  return list;
}

/**
 * The incoming edges of a node in a frame.
 * @param {object} model
 * @param {number} node
 * @param {number} frame -1: the base's own graph
 * @returns {{node: number, position: string}[]}
 */
function readsOf(model, node, frame) {
  const found = [];
  for (let k = model.ins.start[node]; k < model.ins.start[node + 1]; k++) {
    const e = model.ins.edges[k];
    if (existsIn(model.edges, e, frame)) found.push({ node: model.edges.source[e], position: model.strings[model.edges.position[e]] ?? "" });
  }
  return found;
}

/**
 * The site of a node, and its row in the certificate.
 * @param {object} data
 * @param {number} adaptation index
 * @param {string} key
 * @returns {{site: object|null, row: object|null}}
 */
function siteOf(data, adaptation, key) {
  const site = (data.sites || []).find((s) => s.adaptation === adaptation && s.key === key) || (data.sites || []).find((s) => s.adaptation === adaptation && s.module === key) || null;
  const row = (data.certificate?.sites || []).find((r) => r.site === key || (site && (r.site === site.key || r.site === site.module))) || null;
  return { site, row };
}

/**
 * A value of the data that may be an object, as text.
 * @param {*} value
 * @returns {string}
 */
function plain(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return formatNumber(value);
  if (Array.isArray(value)) return value.map(plain).join(", ");
  return typeof value === "object" ? Object.entries(value).map(([k, v]) => `${k}: ${plain(v)}`).join(", ") : String(value);
}

/**
 * What the data says about a site: why it was chosen, its tensors, its figures and its certificate.
 * @param {object} page
 * @param {object|null} site
 * @param {object|null} row of the certificate
 * @returns {(HTMLElement|null)[]}
 */
function siteParts(page, site, row) {
  if (!site && !row) return [];
  return [
    site && panelPart("Site", [factList([["Place", linkTo(shorten(site.module, 80), () => page.select({ kind: "group", key: site.module }), shorten(site.module, 300))], ["Kind", site.kind],
      ["Roles", (site.roles || []).join(", ")], ["Layer", site.layer ?? ""], ["Evidence", site.evidence], ["Chosen because", site.why],
      ...Object.entries(site.tensors || {}).map(([k, t]) => [`Tensor ${k}`, `${t[0]}, ${t[1]}, ${t[2] ? "trainable" : "frozen"}`]), ...(site.figures || []).map(([k, v]) => [k, v])])]),
    row && panelPart("Certificate of the site", [factList([["Relative change", row.change], ["Error of the algebra", row.algebra], ["Error of rounding", row.rounding], ["Retention", plain(row.retention)],
      ["Together with", (row.adaptations || []).length > 1 ? row.adaptations.join(", ") : ""]])]),
  ];
}

/**
 * Who made a node: adaptation, method, place, part, step, and the line of the spec.
 * @param {object} page
 * @param {number} node
 * @returns {(HTMLElement|null)[]}
 */
function provenance(page, node) {
  const { model, data } = page, { nodes } = model, frames = model.graph.frames || [], index = nodes.adaptation[node];
  const step = nodes.base[node] ? "The base model" : frames[nodes.born[node]] ? `Step ${nodes.born[node] + 1}: ${frames[nodes.born[node]].step}` : "";
  const gone = nodes.gone[node] >= 0 && frames[nodes.gone[node]] ? `Step ${nodes.gone[node] + 1}: ${frames[nodes.gone[node]].step}` : nodes.base[node] && !existsIn(nodes, node, frames.length - 1) && frames.length ? "A step that is not recorded" : "";
  if (index < 0) return [panelPart("Provenance", [factList([["Made by", step], ["Removed by", gone]])])];
  const adaptation = data.adaptations[index], key = textOf(model, "site", node), { site, row } = siteOf(data, index, key);
  return [
    panelPart("Provenance", [factList([[page.words.by, adapterLink(page, index)], ["Method", adaptation.method], ["At", key], ["Part", textOf(model, "part", node)], ["Made by", step], ["Removed by", gone],
      ["Asked for in", specLink(page, adaptation.name)], ["Folds into the base", page.words.roles ? "" : foldText(adaptation)]])]),
    ...siteParts(page, site, row),
  ];
}

/**
 * What the page calls its categories: adaptations, or the roles of a model's parts.
 * @param {object} data
 * @returns {object}
 */
function wordsFor(data) {
  return data.categories === "roles"
    ? { roles: true, one: "Role", many: "Roles", by: "Has the role", here: "Roles in it", held: "nodes", verb: "", empty: "No role was found.", spec: "Unresolved" }
    : { roles: false, one: "Adaptation", many: "Adaptations", by: "Inserted by", here: "Inserted here", held: "nodes and tensors", verb: " inserted", empty: "No adaptation was inserted.", spec: "Spec" };
}

/**
 * Whether an adaptation folds, and why not.
 * @param {object} adaptation
 * @returns {string}
 */
function foldText(adaptation) {
  const said = adaptation.folds === true ? "Yes" : adaptation.folds === false ? "No" : "Not known";
  return adaptation.fold_reason ? `${said}. ${adaptation.fold_reason}` : said;
}

/**
 * A link to an adaptation with its colour.
 * @param {object} page
 * @param {number} index
 * @returns {HTMLElement}
 */
function adapterLink(page, index) {
  if (!page.data.adaptations[index]) return null;
  return el("span", {}, el("span", { class: `swatch tone-${index}`, "aria-hidden": "true" }), linkTo(shorten(page.data.adaptations[index].name, 60), () => page.select({ kind: "adaptation", index })));
}

/**
 * A link to the line of the spec that asks for an adaptation.
 * @param {object} page
 * @param {string} name
 * @returns {HTMLElement|null}
 */
function specLink(page, name) {
  const lines = page.data.spec?.lines || {}, line = Object.hasOwn(lines, name) ? lines[name] : null;
  return line ? linkTo(`Spec, line ${line}`, () => page.spec(line)) : null;
}

/**
 * The details of a node.
 * @param {object} page
 * @param {number} node
 * @returns {(Node|null)[]}
 */
function nodeDetails(page, node) {
  const { model, lens } = page, { nodes } = model, module = textOf(model, "module", node);
  const kind = ["Input", "Tensor", "Operation", "Output"][nodes.op[node]], state = lens.node[node];
  const type = textOf(model, "type", node), parts = /^([^[]*)\[(.*)\]$/s.exec(type);
  const now = readsOf(model, node, lens.view === "before" ? -1 : lens.frame);
  const frames = (model.graph.frames || []).length, from = lens.view === "frame" ? lens.before : -1, to = lens.view === "frame" ? lens.frame : frames - 1;
  const old = readsOf(model, node, from), fresh = readsOf(model, node, to), same = (a, b) => a.node === b.node && a.position === b.position;
  const lost = old.filter((a) => !fresh.some((b) => same(a, b))), won = fresh.filter((a) => !old.some((b) => same(a, b)));
  const readers = [];
  for (let k = model.outs.start[node]; k < model.outs.start[node + 1]; k++) {
    const e = model.outs.edges[k], t = model.edges.target[e];
    if (lens.edge[e] && !readers.some((r) => r.node === t)) readers.push({ node: t });
  }
  const reads = state === REMOVED || state === ABSENT ? old : now;
  return [
    el("p", { class: "kind", text: `${kind}${state === ADDED && lens.marks ? ", added" : state === REMOVED ? ", removed" : state === REWIRED ? ", rewired" : state === ABSENT ? ", not in this view" : ""}` }),
    el("h2", { class: "whole", text: textOf(model, "name", node) }),
    factList([["Operator", nodes.op[node] === CALL ? textOf(model, "target", node) : ""], ["Type", type], ["Element type", parts ? parts[1] : ""], ["Shape", parts ? `[${parts[2]}]` : ""],
      ["Module", module ? linkTo(shorten(module, 80), () => page.select({ kind: "group", key: module }), shorten(module, 300)) : "(the model itself)"],
      ["Trainable", nodes.op[node] === TENSOR ? (nodes.trainable[node] ? "Yes" : "No") : ""], ["FLOPs per token", nodes.flops[node] || ""], ["Bytes of values per token", nodes.value_bytes?.[node] || ""], ["Was before", nodes.was && state !== SAME ? textOf(model, "was", node) : ""]]),
    (lost.length || won.length) && state === REWIRED ? panelPart("Rewired", [el("h4", { text: "Read before" }), nodeLinks(page, lost) || el("p", { text: "Nothing else" }), el("h4", { text: "Reads now" }), nodeLinks(page, won) || el("p", { text: "Nothing else" })]) : null,
    ...provenance(page, node),
    panelPart(`Reads (${formatNumber(reads.length)})`, [nodeLinks(page, reads)]),
    panelPart(`Read by (${formatNumber(readers.length)})`, [nodeLinks(page, readers)]),
  ];
}

/**
 * The details of a group or a run of alike layers.
 * @param {object} page
 * @param {object} item
 * @returns {(Node|null)[]}
 */
function groupDetails(page, item) {
  const { model, lens, data } = page, times = item.groups.length, path = model.groups[item.group]?.path ?? item.key;
  const stat = lens.stats[item.group] || { nodes: 0, tensors: 0, marks: [0, 0, 0, 0, 0], adaptations: new Map(), flops: 0 };
  const branch = branchAt(data.tree, path), total = data.summary?.base_parameters, open = page.isOpen(item.key);
  const sites = (data.sites || []).filter((s) => s.module === path && data.adaptations[s.adaptation]), own = branch ? [...(branch.tensors || [])] : [];
  const buttons = item.kind === "node" ? null : el("div", { class: "buttons" },
    el("button", { type: "button", text: open ? "Close" : "Open", on: { click: () => page.toggle(item.key) } }),
    el("button", { type: "button", text: "Open all inside", on: { click: () => page.openAll(item) } }),
    el("button", { type: "button", text: "Show", on: { click: () => page.show(item.key) } }));
  const each = times > 1 ? " of each" : "";
  return [
    el("p", { class: "kind", text: times > 1 ? `Opens to ${times} alike layers` : "Module" }),
    el("h2", { class: "whole", text: times > 1 ? item.key : path || "(the model itself)" }),
    buttons,
    stat.nodes ? null : el("p", { class: "empty", text: "No operation of this module is in this view of the graph." }),
    factList([["Roles", (branch?.roles || []).join(", ")], [`Nodes${each}`, stat.nodes], [`Tensors${each}`, stat.tensors], ["Nodes in all", times > 1 ? stat.nodes * times : ""],
      [`Base parameters${each}`, branch ? branch.base_parameters : ""], [`Trainable${each}`, branch ? branch.trainable_parameters : ""],
      ["Share of the base parameters", branch && total ? `${formatNumber(Number((100 * times * branch.base_parameters / total).toPrecision(4)))} %` : ""],
      [`FLOPs per token${each}`, stat.flops || ""], ["Changed", lens.view === "before" ? "" : markText(stat.marks.map((n) => n * times), lens.marks)]]),
    panelPart(page.words.here, [stat.adaptations.size ? el("ul", { class: "links" }, ...[...stat.adaptations].map(([a, n]) => el("li", {}, adapterLink(page, a), ` ${formatNumber(n * times)} ${page.words.held}`))) : null]),
    panelPart("Tensors", [own.length || branch?.added?.length ? el("ul", { class: "links" },
      ...own.map((t) => el("li", {}, el("span", { text: tensorText(t) }))),
      ...(branch?.added || []).flatMap((a) => (a.tensors || []).map((t) => el("li", {}, el("span", { class: `swatch tone-${data.adaptations.findIndex((x) => x.name === a.adaptation)}`, title: shorten(a.adaptation) }), el("span", { text: `${shorten(a.adaptation, 40)}: ${tensorText(t)}` }))))) : null]),
    ...sites.flatMap((site) => [panelPart(page.words.by, [factList([[page.words.one, adapterLink(page, site.adaptation)], ["Asked for in", specLink(page, data.adaptations[site.adaptation].name)], ["Folds into the base", page.words.roles ? "" : foldText(data.adaptations[site.adaptation])]])]),
      ...siteParts(page, site, siteOf(data, site.adaptation, site.key).row)]),
    times > 1 ? panelPart("Layers", [el("p", { class: "wrap" }, ...item.groups.slice(0, 200).map((g) => linkTo(model.groups[g].name, () => page.select({ kind: "group", key: model.groups[g].path }), model.groups[g].path)))]) : null,
  ];
}

/**
 * A tensor of the tree in words.
 * @param {object} t
 * @returns {string}
 */
function tensorText(t) {
  const notes = [t.trainable ? "trainable" : "frozen", t.parameter === false ? "buffer" : "", t.tied ? `tied to ${t.tied === true ? "another" : t.tied}` : "", t.rows ? `rows ${plain(t.rows)}` : ""];
  return `${shorten(t.name, 80)}, ${t.dtype}[${(t.shape || []).join(", ")}], ${notes.filter(Boolean).join(", ")}`;
}

/**
 * The details of a merged edge.
 * @param {object} page
 * @param {{from: object, to: object, link: object}} edge boxes (null: from outside, or to outside) and the edge
 * @returns {(Node|null)[]}
 */
function edgeDetails(page, { from, to, link }) {
  const { model, lens } = page, { flow } = lens, list = el("ul", { class: "links" });
  const name = (box) => box ? shorten(box.lines[0]?.text, 60) : "outside of the group";
  for (const k of link.ids.slice(0, 40)) {
    const [s, t] = [flow.source[k], flow.target[k]], state = flow.state[k];
    list.append(el("li", {}, lens.marks && state > SAME ? el("span", { class: "position", text: `${["", "", "added", "removed"][state]} ` }) : null,
      linkTo(shorten(textOf(model, "name", s), 50), () => page.select({ kind: "node", node: s })), " \u2192 ", linkTo(shorten(textOf(model, "name", t), 50), () => page.select({ kind: "node", node: t })),
      el("span", { class: "more", text: ` ${shorten(textOf(model, "type", s), 40)}` })));
  }
  if (link.ids.length > 40) list.append(el("li", { class: "more", text: `and ${formatNumber(link.ids.length - 40)} more` }));
  return [
    el("p", { class: "kind", text: link.ids.length > 1 ? `Edge that stands for ${formatNumber(link.ids.length)}` : "Edge" }),
    el("h2", { class: "whole", text: `${name(from)} \u2192 ${name(to)}` }),
    panelPart("Values", [list]),
  ];
}

/**
 * The details of an adaptation.
 * @param {object} page
 * @param {number} index
 * @returns {(Node|null)[]}
 */
function adaptationDetails(page, index) {
  const { data } = page, a = data.adaptations[index];
  const sites = (data.sites || []).filter((s) => s.adaptation === index);
  return [
    el("p", { class: "kind", text: page.words.one }),
    el("h2", { class: "whole" }, el("span", { class: `swatch tone-${index}`, "aria-hidden": "true" }), visibleText(a.name)),
    factList([["Method", a.method], ["Places", a.places], ["Roles", (a.roles || []).join(", ")], ["Layers", a.layers], ["Trainable", a.trainable_parameters], ["Frozen", a.frozen_parameters],
      ["Size", a.size || ""], ["Share of all parameters", a.share === undefined || a.share === null ? "" : `${formatNumber(a.share)} %`], ["Bytes", a.bytes], ["FLOPs per token, products", a.flops_per_token],
      ["Bytes of values per token", a.value_bytes_per_token], ["Nodes", a.nodes], ["Folds into the base", page.words.roles ? "" : foldText(a)], ["Asked for in", specLink(page, a.name)], ...(a.figures || []).map(([k, v]) => [k, v])]),
    panelPart(`Sites (${formatNumber(sites.length)})`, [sites.length ? el("ul", { class: "links" }, ...sites.slice(0, 60).map((s) => el("li", {}, linkTo(shorten(s.module, 70), () => page.select({ kind: "group", key: s.module }), shorten(s.module, 300)))),
      sites.length > 60 ? el("li", { class: "more", text: `and ${formatNumber(sites.length - 60)} more` }) : null) : null]),
  ];
}

/**
 * A selection as text for the address.
 * @param {object} page
 * @param {object|null} sel
 * @returns {string}
 */
function selText(page, sel) {
  if (!sel) return "";
  if (sel.kind === "node") { const name = textOf(page.model, "name", sel.node); return name.length <= 200 && nodeNamed(page.model, name) === sel.node ? `node:${name}` : `index:${sel.node}`; }
  if (sel.kind === "group") return `group:${sel.key.slice(0, 2000)}`;
  return sel.kind === "adaptation" ? `adaptation:${sel.index}` : `edge:${sel.a},${sel.b},${sel.owner.slice(0, 500)}`;
}

/**
 * The selection of a text of the address; null if there is none such.
 * @param {object} page
 * @param {string} text
 * @returns {object|null}
 */
function selOf(page, text) {
  const at = text.indexOf(":"), kind = text.slice(0, at), value = text.slice(at + 1), number = Number(value);
  if (kind === "node") { const node = nodeNamed(page.model, value); return node >= 0 ? { kind, node } : null; }
  if (kind === "index") return Number.isInteger(number) && number >= 0 && number < page.model.count ? { kind: "node", node: number } : null;
  if (kind === "group") return page.model.byPath.has(value) || branchAt(page.data.tree, value) || page.model.byPath.has(value.replace(/\[(\d+)-\d+\]$/, ".$1")) ? { kind, key: value } : null;
  if (kind === "adaptation") return page.data.adaptations[number] ? { kind, index: number } : null;
  const edge = /^(-?\d+),(-?\d+),(.*)$/s.exec(value);
  return kind === "edge" && edge ? { kind, a: Number(edge[1]), b: Number(edge[2]), owner: edge[3] } : null;
}
