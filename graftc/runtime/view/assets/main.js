"use strict";
// The page: its state, tabs, deep links, keys, theme and print.

const TABS = ["graph", "timeline", "report", "spec"], VIEWS = ["after", "before", "diff"];
const byId = (id) => document.getElementById(id);
const page = { data: null, model: null, lens: null, scene: null };
const state = { tab: "graph", view: "after", mode: "", frame: 0, sel: null, open: new Set(), tensors: "adaptations", hidden: new Set() };
const models = new Map(), lenses = new Map();
let drawing = null, tree = null, steps = null, boxList = null, theme = "light", turn = 0, whole = Promise.resolve(), hovered = -1, defaults = "", entries = null;

/**
 * The data of the page: base64 of gzip of JSON.
 * @returns {Promise<object>}
 */
async function readData() {
  const text = byId("data").textContent.trim(), bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text());
}

/**
 * A function that lays out a job: in the worker, or in plain rows here where no worker starts.
 * @returns {(job: object) => Promise<object>}
 */
function createEngine() {
  const waiting = new Map(), here = (job) => layoutTree(job, null, new Map());
  let worker = null, next = 0;
  const fail = () => { worker = null; for (const w of waiting.values()) w.done(here(w.job)); waiting.clear(); };
  try {
    const url = URL.createObjectURL(new Blob([byId("worker").textContent], { type: "text/javascript" }));
    worker = new Worker(url);
    worker.onmessage = ({ data }) => { const w = waiting.get(data.id); waiting.delete(data.id); if (w) w.done(data.layout || here(w.job)); };
    worker.onerror = (event) => { event.preventDefault(); fail(); };
  } catch { worker = null; }
  return (job) => new Promise((done) => {
    if (!worker) { done(here(job)); return; }
    next += 1;
    waiting.set(next, { job, done });
    worker.postMessage({ id: next, job });
  });
}
let engine = null;

/** The lens of the state; the last few are kept. */
function currentLens() {
  const view = state.tab === "timeline" ? "frame" : state.view, key = JSON.stringify([state.mode, view, view === "frame" ? state.frame : 0, [...state.hidden].sort(), state.tensors]);
  if (!models.has(state.mode)) models.set(state.mode, openGraph(page.data.graphs[state.mode]));
  page.model = models.get(state.mode);
  if (!lenses.has(key)) {
    if (lenses.size > 7) lenses.delete(lenses.keys().next().value);
    lenses.set(key, makeLens(page.model, { view, frame: state.frame, hidden: state.hidden, tensors: state.tensors, names: page.data.adaptations.map((a) => a.name), verb: page.words.verb, noun: page.words.many.toLowerCase() }));
  }
  return lenses.get(key);
}

/**
 * Draws what the state asks for.
 * @param {{anchor?: string, top?: boolean, show?: boolean}} how anchor: the key of a box that stays in its place; top: a new first view; show: bring the selection in sight
 * @returns {Promise<void>}
 */
function refresh(how = {}) {
  const mine = ++turn;
  whole = (async () => {
    page.lens = currentLens();
    if (how.show && state.sel) openWay(state.sel);
    byId("stage").setAttribute("aria-busy", "true");
    const built = buildBoxes(page.lens, (key) => state.open.has(key)), layout = await engine(jobOf(built.root));
    if (mine !== turn) return;
    page.scene = composeScene(built, layout);
    hovered = -1;
    drawing.setScene(page.scene, how.anchor);
    restyle();
    if (how.top) drawing.fitTop();
    if (how.show && state.sel) drawing.show(selectedBox());
    byId("stage").removeAttribute("aria-busy");
    byId("canvas").setAttribute("aria-label", `Graph of ${shorten(page.data.model, 60)}: ${page.scene.boxes.length - 1} boxes for ${formatNumber(page.lens.stats[0].nodes)} nodes`);
    boxList.show(page.scene, selectedBox()?.key);
    drawPanels();
  })();
  return whole;
}

/** The key that the scene gives to the selection. */
function selectedKey() {
  const { sel } = state;
  if (!sel) return "";
  if (sel.kind === "node") return `%${sel.node}`;
  if (sel.kind !== "group") return "";
  return itemOf(sel)?.key ?? sel.key;
}

/** The box of the selection, if one is shown; that of the reader for a tensor. */
function selectedBox() {
  if (!page.scene || !state.sel) return null;
  const key = selectedKey(), { boxes } = page.scene;
  return boxes.find((b, i) => i && b.key === key) || (state.sel.kind === "node" ? boxes.find((b) => b.lines.some((l) => l.node === state.sel.node)) : null) || null;
}

/** The style for what is selected and under the pointer. */
function restyle() {
  const chosen = selectedBox(), index = hovered >= 0 ? hovered : chosen ? chosen.index : -1;
  const around = index > 0 && page.scene ? relatedTo(page.scene, index) : null;
  const edge = state.sel?.kind === "edge" && hovered < 0 ? edgeOf(state.sel) : null;
  drawing.setStyle(styleOf(theme, page.data.adaptations, { selected: selectedKey(), hover: hovered, related: edge ? new Set([edge.link]) : around && around.related.size ? around.related : null, near: hovered >= 0 && around && around.related.size ? around.near : null }));
}

/** The boxes and the merged edge of an edge selection. */
function edgeOf(sel) {
  for (const box of page.scene?.boxes || []) {
    const link = box.key === sel.owner && box.links.find((l) => l.a === sel.a && l.b === sel.b);
    if (link) return { from: box.kids[link.a] || null, to: box.kids[link.b] || null, link };
  }
  return null;
}

/** The item of a selected group. */
function itemOf(sel) {
  const shown = page.scene?.boxes.find((b, i) => i && b.key === sel.key && b.item.kind !== "node");
  if (shown) return shown.item;
  const path = page.model.byPath.has(sel.key) ? sel.key : sel.key.replace(/\[(\d+)-\d+\]$/, ".$1");
  if (!page.model.byPath.has(path)) return null;
  const group = page.model.byPath.get(path), { nodes } = page.lens.stats[group];
  const way = path && nodes ? wayTo(page.lens, path).item : null;
  return way && (way.group === group || way.kind === "run") ? way : { key: path, kind: nodes ? "group" : "node", group, groups: [group], node: -1, label: path };
}

/** Opens what hides a selection. */
function openWay(sel) {
  const { model, lens } = page;
  let node = sel.kind === "node" ? sel.node : -1, path = sel.key;
  if (node >= 0) {
    if (model.nodes.op[node] === TENSOR) for (const [reader, held] of lens.tensorsOf) if (held.includes(node)) { node = reader; break; }
    path = model.groups[model.groupOf[node]].path;
  } else if (sel.kind !== "group") return;
  else if (!model.byPath.has(path)) path = path.replace(/\[(\d+)-\d+\]$/, "");
  for (const key of wayTo(lens, path, node).keys) state.open.add(key);
}

/** Fills the details, the tree and the steps. */
function drawPanels() {
  const right = byId("right"), { sel } = state;
  let parts = null;
  if (sel?.kind === "node") parts = nodeDetails(page, sel.node);
  else if (sel?.kind === "group") parts = groupDetails(page, itemOf(sel) || { key: sel.key, kind: "node", group: -1, groups: [-1], node: -1, label: sel.key });
  else if (sel?.kind === "edge") { const edge = edgeOf(sel); parts = edge && edgeDetails(page, edge); }
  else if (sel?.kind === "adaptation") parts = adaptationDetails(page, sel.index);
  const timeline = state.tab === "timeline";
  if (timeline) parts = parts ? [linkTo("Back to the step", () => go({ sel: null })), ...parts] : stepDetails(page);
  right.replaceChildren(...(parts || [el("h2", { text: "Details" }), el("p", { class: "empty", text: "Select a node, a group or an edge to see what it is, who made it, and what it reads." }), hints()]).filter(Boolean));
  right.scrollTop = 0;
  byId("modules").hidden = timeline;
  byId("steps").hidden = !timeline;
  if (timeline) steps.show(page.lens.frame);
  const path = sel?.kind === "node" ? textOf(page.model, "module", sel.node) : sel?.kind === "group" ? sel.key.replace(/\[(\d+)-\d+\]$/, ".$1") : "";
  if (!timeline) tree.show(path);
  drawToolbar();
}

/** The keys of the page, in a list. */
function hints() {
  return factList([["1, 2, 3", "After, before, diff"], ["/ or Ctrl-K", "Search"], ["Enter, + and \u2212", "Open and close the selected group"], ["f", "Fit the graph"], ["Arrow keys", "Move the graph, or step through the timeline"], ["Double click", "Open or close a group"], ["Escape", "Select nothing"]]);
}

/**
 * Changes the state, draws it, and keeps it in the address.
 * @param {object} change of the state
 * @param {object} how of refresh; also replace: no new entry in the history
 * @returns {Promise<void>}
 */
function go(change, how = {}) {
  const before = state.tab;
  Object.assign(state, change);
  if (page.lens && ["view", "mode", "frame"].some((k) => k in change)) {
    keepOpen();
    if (state.sel) how = { show: true, ...how };
  }
  writeHash(how.replace);
  if (state.tab !== before) showTab();
  if (state.tab === "report" || state.tab === "spec") return Promise.resolve();
  const only = Object.keys(change).every((k) => k === "sel") && !how.show;
  if (only && page.scene) { restyle(); drawPanels(); boxList.show(page.scene, selectedKey()); return whole; }
  return refresh(how);
}

/** Opens what was open in another graph too, where its layers may be alike that were not. */
function keepOpen() {
  page.lens = currentLens();
  const open = new Set(state.open);
  for (const key of state.open) for (const above of wayTo(page.lens, key).keys) open.add(above);
  state.open = open;
}

/** Shows the part of the tab, and marks the tab. */
function showTab() {
  const stage = state.tab === "graph" || state.tab === "timeline";
  byId("stage").hidden = !stage;
  byId("stage").setAttribute("aria-labelledby", `tab-${stage ? state.tab : "graph"}`);
  for (const name of ["report", "spec"]) byId(name).hidden = state.tab !== name;
  for (const name of TABS) {
    const tab = byId(`tab-${name}`), on = state.tab === name;
    tab.setAttribute("aria-selected", String(on));
    tab.tabIndex = on ? 0 : -1;
  }
}

page.select = (sel) => go({ sel, tab: state.tab === "timeline" ? "timeline" : "graph" }, { show: true });
page.isOpen = (key) => state.open.has(key);
page.show = (key) => drawing.show(page.scene.boxes.find((b) => b.key === key));
page.toggle = (key) => {
  const open = new Set(state.open);
  if (!open.delete(key)) open.add(key);
  say(open.has(key) ? "Opened" : "Closed");
  return go({ open }, { anchor: key });
};
page.openAll = (item) => {
  const open = new Set(state.open);
  for (const stack = [item]; stack.length && open.size < 8000;) {
    const at = stack.pop();
    if (at.kind === "node") continue;
    open.add(at.key);
    stack.push(...itemsIn(page.lens, at));
  }
  say("Opened all inside");
  return go({ open }, { anchor: item.key });
};
page.spec = (line) => {
  const done = go({ tab: "spec" });
  byId("spec").querySelectorAll(".aim").forEach((row) => row.classList.remove("aim"));
  const row = byId(`line-${line}`);
  if (row) { row.classList.add("aim"); row.scrollIntoView({ block: "center" }); row.focus(); }
  return done;
};

/** Tells screen readers what changed. */
function say(text) { byId("said").textContent = text; }

/** The view that a page opens with: of two compiled models what differs. */
const firstView = () => page.data.differences ? "diff" : "after";

/** Puts the state into the address. */
function writeHash(replace) {
  const asked = new URLSearchParams({ tab: state.tab });
  if (state.view !== firstView()) asked.set("view", state.view);
  if (state.mode !== Object.keys(page.data.graphs)[0]) asked.set("mode", state.mode);
  if (state.tab === "timeline") asked.set("frame", String(state.frame));
  if (state.tensors !== "adaptations") asked.set("tensors", state.tensors);
  if (state.hidden.size) asked.set("hide", [...state.hidden].join());
  if (state.sel) asked.set("sel", selText(page, state.sel));
  const open = [...state.open].sort();
  if (open.join("\n") !== defaults) for (const key of open.length ? open.slice(0, 300) : [""]) asked.append("open", key);
  const hash = `#${asked}`;
  if (hash === location.hash) return;
  try { history[replace ? "replaceState" : "pushState"](null, "", hash); } catch { /* an address that may not change: the page works without */ }
}

/** Takes the state from the address; what it does not know is left out. */
function readHash() {
  const asked = new URLSearchParams(location.hash.slice(1, 200000)), pick = (name, known, other) => known.includes(asked.get(name)) ? asked.get(name) : other;
  const modes = Object.keys(page.data.graphs);
  state.tab = pick("tab", TABS, "graph");
  state.view = pick("view", VIEWS, firstView());
  state.mode = pick("mode", modes, modes[0]);
  state.tensors = pick("tensors", ["all", "adaptations", "none"], "adaptations");
  const last = Math.max(0, (page.data.graphs[state.mode].frames || []).length - 1), frame = Number(asked.get("frame") ?? last);
  state.frame = Number.isInteger(frame) && frame >= 0 ? Math.min(frame, last) : last;
  state.hidden = new Set((asked.get("hide") || "").split(",").filter(Boolean).map(Number).filter((i) => page.data.adaptations[i]));
  page.lens = currentLens();
  state.open = asked.has("open") ? new Set(asked.getAll("open").filter(Boolean)) : new Set(defaults ? defaults.split("\n") : []);
  state.sel = asked.has("sel") ? selOf(page, asked.get("sel")) : null;
}

/**
 * A button of the toolbar.
 * @param {string} text
 * @param {() => void} act
 * @param {object} more attributes
 * @returns {HTMLElement}
 */
const tool = (text, act, more = {}) => el("button", { type: "button", text, on: { click: act }, ...more });

/** Builds the toolbar again when what it shows has changed; the focus stays. */
function drawToolbar() {
  const timeline = state.tab === "timeline", { adaptations } = page.data, bar = byId("toolbar");
  const key = JSON.stringify([timeline, state.view, state.mode, state.tensors, [...state.hidden], page.lens.frame]);
  if (bar.dataset.key === key) return;
  bar.dataset.key = key;
  const focus = bar.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  const pressed = (on, id) => ({ "aria-pressed": String(on), "data-id": id });
  const views = el("div", { class: "segment", role: "group", "aria-label": "View" }, ...VIEWS.map((v, i) => tool(["After", "Before", "Diff"][i], () => go({ view: v }, { anchor: selectedKey() || undefined }), { ...pressed(state.view === v, v), title: `${["After", "Before", "Diff"][i]} (${i + 1})` })));
  const frame = (page.model.graph.frames || [])[page.lens.frame];
  const modes = Object.keys(page.data.graphs), mode = el("div", { class: "segment", role: "group", "aria-label": "Mode" }, ...modes.map((m) => tool(m, () => setMode(m), pressed(state.mode === m, m))));
  const choice = (label, options, value, act, id) => el("label", { class: "choice" }, `${label} `, (() => {
    const select = el("select", { "data-id": id, on: { change: (e) => act(e.target.value) } }, ...options.map(([v, t]) => el("option", { value: v, text: t })));
    select.value = value;
    return select;
  })());
  const level = choice("Level", [["", "Choose \u2026"], ["top", "Top groups"], ["layers", "Layers"], ["nodes", "Nodes of each kind of layer"]], "", (v) => { if (v) go({ open: keysOfLevel(page.lens, v) }, { top: true }); bar.querySelector("[data-id=level]").value = ""; }, "level");
  const tensors = choice("Tensors", [["none", "None"], ["adaptations", page.words.roles ? "With a role" : "Of adaptations"], ["all", "All"]], state.tensors, (v) => go({ tensors: v }), "tensors");
  const legend = el("div", { class: "legend", role: "group", "aria-label": page.words.many }, ...adaptations.map((a, i) => el("span", { class: "entry" },
    tool("", () => { const hidden = new Set(state.hidden); if (!hidden.delete(i)) hidden.add(i); go({ hidden }); }, { ...pressed(!state.hidden.has(i), `a${i}`), class: "adaptation", title: state.hidden.has(i) ? "Show its nodes" : "Hide its nodes" }),
    adaptations.length > 1 ? tool("only", () => go({ hidden: new Set(adaptations.map((_, k) => k).filter((k) => k !== i && !isOnly(i))) }), { ...pressed(isOnly(i), `o${i}`), class: "only", "aria-label": `Only ${shorten(a.name, 40)}` }) : null)));
  legend.querySelectorAll(".adaptation").forEach((button, i) => button.append(el("span", { class: `swatch tone-${i}`, "aria-hidden": "true" }), shorten(adaptations[i].name, 28), state.hidden.has(i) ? el("span", { class: "more", text: " (hidden)" }) : ""));
  bar.replaceChildren(...[timeline ? el("strong", { class: "now", text: frame ? `Step ${page.lens.frame + 1}: ${shorten(frame.step, 40)}` : "No steps" }) : page.words.roles ? null : views, modes.length > 1 ? mode : null, level, tensors,
    el("div", { class: "segment", role: "group", "aria-label": "Zoom" }, tool("\u2212", () => drawing.zoom(0.8), { "aria-label": "Zoom out", "data-id": "out" }), tool("+", () => drawing.zoom(1.25), { "aria-label": "Zoom in", "data-id": "in" }), tool("Fit", () => drawing.fit(), { title: "Fit (f)", "data-id": "fit" })),
    tool("Download SVG", downloadSvg, { "data-id": "svg" }), legend].filter(Boolean));
  if (focus) bar.querySelector(`[data-id="${focus}"]`)?.focus();
}

/** Whether all adaptations but one are hidden. */
const isOnly = (i) => !state.hidden.has(i) && state.hidden.size === page.data.adaptations.length - 1;

/** Changes the mode; the selected node keeps its name. */
function setMode(mode) {
  const name = state.sel?.kind === "node" ? textOf(page.model, "name", state.sel.node) : null;
  state.mode = mode;
  page.lens = currentLens();
  const node = name === null ? -1 : nodeNamed(page.model, name);
  const last = Math.max(0, (page.model.graph.frames || []).length - 1);
  byId("steps").replaceChildren();
  steps = createTimeline(byId("steps"), page.model.graph, (frame) => go({ frame, sel: null }));
  entries = null;
  return go({ sel: node >= 0 ? { kind: "node", node } : state.sel?.kind === "node" ? null : state.sel, frame: Math.min(state.frame, last) });
}

/** The drawn scene as SVG text. */
const currentSvg = (shade) => sceneSvg(page.scene, styleOf(shade, page.data.adaptations), wordsOf(page.data, page.lens, state.mode));

/** Saves the drawn scene as a file. */
function downloadSvg() {
  const url = URL.createObjectURL(new Blob([currentSvg(theme)], { type: "image/svg+xml" })), link = el("a", { href: url, download: "graph.svg" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say("The SVG file is saved");
}

/**
 * Sets the theme, and the colours of the adaptations in it.
 * @param {boolean|Event} printed true: the light theme, for paper
 */
function setTheme(printed = false) {
  const asked = printed === true ? "light" : byId("theme").value;
  theme = asked === "dark" || (asked === "system" && matchMedia("(prefers-color-scheme: dark)").matches) ? "dark" : "light";
  document.documentElement.dataset.theme = theme;
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(page.data.adaptations.map((a, i) => { const t = toneOf(a.colour, theme); return `.tone-${i} { background: ${t.ink}; }`; }).join("\n"));
  document.adoptedStyleSheets = [sheet];
  if (drawing) restyle();
}

/** Fills the heading and the tabs. */
function drawHead() {
  drawTitle(page);
  const tabs = byId("tabs");
  TABS.forEach((name, i) => tabs.append(el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": i < 2 ? "stage" : name, "aria-selected": "false", tabindex: -1, hidden: page.words.roles && name === "timeline", text: ["Graph", "Timeline", "Report", page.words.spec][i], on: { click: () => go({ tab: name }) } })));
  tabs.addEventListener("keydown", (event) => {
    const to = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const shown = TABS.filter((t) => !byId(`tab-${t}`).hidden), name = to ? shown[(shown.indexOf(state.tab) + to + shown.length) % shown.length] : { Home: TABS[0], End: TABS[TABS.length - 1] }[event.key];
    if (!name) return;
    event.preventDefault();
    event.stopPropagation();
    go({ tab: name });
    byId(`tab-${name}`).focus();
  });
}

/** Listens to keys, the history, the theme and the printer. */
function listen() {
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if ((event.key === "k" && (event.ctrlKey || event.metaKey)) || (event.key === "/" && !typing)) { event.preventDefault(); byId("search").focus(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("stage").hidden) return;
    const onCanvas = event.target === byId("canvas") || event.target === document.body, timeline = state.tab === "timeline", box = selectedBox();
    const group = box && box.item.kind !== "node" ? box : null, last = (page.model.graph.frames || []).length - 1;
    const step = (frame) => go({ frame: Math.max(0, Math.min(last, frame)), sel: null });
    const moves = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] };
    const steer = { ArrowLeft: () => step(state.frame - 1), ArrowRight: () => step(state.frame + 1), Home: () => step(0), End: () => step(last) };
    const reading = byId("right").contains(event.target);
    if (timeline && steer[event.key] && event.target !== byId("grip")) steer[event.key]();
    else if (onCanvas && moves[event.key]) drawing.pan(...moves[event.key]);
    else if ("123".includes(event.key) && !timeline) go({ view: VIEWS[event.key - 1] }, { anchor: selectedKey() || undefined });
    else if (event.key === "f") drawing.fit();
    else if (event.key === "Escape") go({ sel: null });
    else if (!reading && group && ((event.key === "+" && !group.open) || (event.key === "-" && group.open) || (event.key === "Enter" && onCanvas))) page.toggle(group.key);
    else return;
    event.preventDefault();
  });
  const back = () => { readHash(); showTab(); if (state.tab === "graph" || state.tab === "timeline") refresh({ show: Boolean(state.sel) }); };
  addEventListener("popstate", back);
  byId("theme").addEventListener("change", () => { try { localStorage.setItem("graftc-theme", byId("theme").value); } catch { /* no storage here */ } setTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setTheme);
  addEventListener("beforeprint", () => { setTheme(true); if (page.scene) byId("print").replaceChildren(document.importNode(new DOMParser().parseFromString(currentSvg("light"), "image/svg+xml").documentElement, true)); });
  addEventListener("afterprint", () => { byId("print").replaceChildren(); setTheme(); });
  const grip = byId("grip"), wide = (w) => { byId("work").style.setProperty("--left", `${Math.max(140, Math.min(620, w))}px`); };
  grip.addEventListener("pointerdown", (event) => { grip.setPointerCapture(event.pointerId); grip.onpointermove = (e) => wide(e.clientX - byId("left").getBoundingClientRect().left); });
  grip.addEventListener("pointerup", () => { grip.onpointermove = null; });
  grip.addEventListener("keydown", (event) => { const by = { ArrowLeft: -20, ArrowRight: 20 }[event.key]; if (by) { wide(byId("left").offsetWidth + by); event.stopPropagation(); event.preventDefault(); } });
}

/** Shows what the pointer is over. */
function pointAt(hit, [x, y]) {
  const index = hit && !hit.box.open ? hit.box.index : -1, tip = byId("tip");
  tip.hidden = index < 0;
  if (index >= 0) {
    const { item } = hit.box, { model } = page;
    tip.textContent = hit.node >= 0 ? shorten(textOf(model, "name", hit.node), 120) : item.kind === "node" ? shorten(textOf(model, "name", item.node), 120) : shorten(item.key, 120);
    tip.style.transform = `translate(${x + 14}px, ${y + 16}px)`;
  }
  if (index === hovered) return;
  hovered = index;
  restyle();
}

/** Names the opened groups around the middle of the canvas, once their headings are out of sight. */
function nameAround(hit, camera) {
  const names = [];
  let away = false;
  for (let box = hit && hit.box; box && box.parent >= 0; box = page.scene.boxes[box.parent]) {
    if (!box.open) continue;
    names.unshift(box.lines[0].text);
    away ||= box.y + HEADER / 2 < camera.y || box.x + 40 < camera.x;
  }
  const text = away ? names.join(" \u203a ") : "", crumbs = byId("crumbs");
  if (crumbs.textContent === text) return;
  crumbs.textContent = text;
  crumbs.hidden = !text;
}

/** Takes a click on the canvas: a tensor's mark, a box, an edge, or nothing. */
function pick(hit, point) {
  byId("canvas").focus({ preventScroll: true });
  const edge = point && (!hit || hit.box.open) ? edgeAt(page.scene, hit ? hit.box.index : 0, ...point) : null;
  if (edge) return go({ sel: edge });
  if (!hit) return state.sel ? go({ sel: null }) : null;
  if (hit.node >= 0) return go({ sel: { kind: "node", node: hit.node } });
  return selectBox(hit.box);
}

/** Selects what a box stands for. */
const selectBox = (box) => go({ sel: box.item.kind === "node" ? { kind: "node", node: box.item.node } : { kind: "group", key: box.key } });

/** Reads the data, draws the first view, and tells that it stands. */
async function start() {
  page.data = await readData();
  page.data.adaptations ||= [];
  page.words = wordsFor(page.data);
  try { const kept = localStorage.getItem("graftc-theme"); if (["light", "dark", "system"].includes(kept)) byId("theme").value = kept; } catch { /* no storage here */ }
  engine = createEngine();
  state.mode = Object.keys(page.data.graphs)[0];
  page.lens = currentLens();
  defaults = [...keysOfLevel(page.lens, "top")].sort().join("\n");
  drawHead();
  setTheme();
  readHash();
  byId("left").append(el("div", { id: "modules" }), el("div", { id: "steps", hidden: true }));
  tree = createTree(byId("modules"), page.data.tree, page.data.adaptations, { select: (path) => page.select({ kind: "group", key: path }), open: (path) => graftcPage.open(path) });
  steps = createTimeline(byId("steps"), page.model.graph, (frame) => go({ frame, sel: null }));
  drawing = createCanvas(byId("canvas"), { select: pick, toggle: (box) => page.toggle(box.key), hover: pointAt, place: nameAround });
  boxList = createBoxList(byId("boxes"), { select: selectBox, toggle: (box) => page.toggle(box.key) });
  createReport(byId("report"), page);
  createSpec(byId("spec"), page);
  createSearch(byId("search"), byId("found"), () => entries ||= entriesOf(page.model, page.data.adaptations), (value) => { byId("canvas").focus({ preventScroll: true }); page.select(value); });
  listen();
  byId("loading").remove();
  showTab();
  byId("search").disabled = false;
  await refresh({ top: true, show: Boolean(state.sel) });
  drawing.draw();
  document.documentElement.dataset.ready = "true";
}

globalThis.graftcPage = {
  ready: null, data: null,
  state: () => ({ ...state, open: [...state.open], hidden: [...state.hidden], theme, hash: location.hash, frames: (page.model.graph.frames || []).length, boxes: page.scene?.boxes.length ?? 0, camera: drawing.camera() }),
  select(name) { const node = nodeNamed(page.model, name), index = page.data.adaptations.findIndex((a) => a.name === name); return page.select(node >= 0 ? { kind: "node", node } : page.model.byPath.has(name) || index < 0 ? { kind: "group", key: name } : { kind: "adaptation", index }); },
  open(group) { const way = wayTo(page.lens, group), open = new Set([...state.open, ...way.keys, ...(way.item && way.item.kind !== "node" ? [way.item.key] : [group])]); return go({ open, tab: state.tab === "timeline" ? "timeline" : "graph", sel: { kind: "group", key: group } }, { show: true }); },
  frame: (n) => go({ tab: "timeline", frame: n, sel: null }),
  scene: () => ({ width: page.scene.width, height: page.scene.height,
    boxes: page.scene.boxes.slice(1).map((b) => ({ key: b.key, kind: b.item.kind, label: b.lines[0]?.text ?? "", lines: b.lines.map((l) => l.text), x: b.x, y: b.y, w: b.w, h: b.h, open: b.open, mark: b.mark, adaptation: b.adaptation, depth: b.depth })),
    edges: page.scene.boxes.flatMap((b) => b.links.map((l) => ({ from: b.kids[l.a]?.key ?? "", to: b.kids[l.b]?.key ?? "", count: l.ids.length, far: l.far }))) }),
  fps: (ms) => drawing.fps(ms),
};
globalThis.graftcPage.ready = start().then(() => { globalThis.graftcPage.data = page.data; }, (error) => {
  const text = `The graph cannot be shown: ${visibleText(error?.message)}`, loading = byId("loading");
  if (loading) { loading.textContent = text; loading.setAttribute("role", "alert"); } else say(text);
  document.documentElement.dataset.failed = "true";
});
