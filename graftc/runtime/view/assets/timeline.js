"use strict";
// The steps of the compiler: the list at the left, and what a step did in words at the right.

/**
 * The list of steps.
 * @param {HTMLElement} host
 * @param {object} graph of the data
 * @param {(frame: number) => void} go
 * @returns {{show: (frame: number) => void}}
 */
function createTimeline(host, graph, go) {
  const frames = graph.frames || [], last = frames.length - 1;
  const act = (label, title, to) => el("button", { type: "button", text: label, title, "aria-label": title, on: { click: () => go(Math.max(0, Math.min(last, to()))) } });
  let now = 0;
  const position = el("span", { class: "position" });
  const count = (kind, sign, n) => el("span", { class: n ? kind : "", text: `${sign}${formatNumber(n)}${kind === "rewired" ? " rewired" : ""}` });
  const rows = frames.map((f, i) => el("li", { class: "step", on: { click: () => go(i) } },
    el("button", { type: "button", class: "link", text: `${i + 1}. ${shorten(f.step, 60)}`, on: { click: (e) => { e.stopPropagation(); go(i); } } }),
    el("p", { class: "counts" }, count("added", "+", f.added), count("removed", "\u2212", f.removed), count("rewired", "", f.rewired), el("span", { text: `${formatNumber(f.nodes)} nodes` }),
      f.seconds === null || f.seconds === undefined ? null : el("span", { text: f.seconds < 1e-4 ? "under 0.1 ms" : f.seconds < 0.1 ? `${Number((f.seconds * 1000).toPrecision(2))} ms` : `${Number(f.seconds).toFixed(2)} s` }), f.verified === true ? el("span", { text: "verified" }) : null)));
  host.append(el("h2", { text: "Steps" }));
  if (!frames.length) {
    host.append(el("p", { class: "empty", text: "No step is recorded: the graph is the base model's own." }));
    return { show() {} };
  }
  host.append(...[
    el("div", { class: "buttons", role: "group", "aria-label": "Step through the rewrites" }, act("First", "First step (Home)", () => 0), act("Back", "One step back (left arrow)", () => now - 1),
      act("Next", "Next step (right arrow)", () => now + 1), act("Last", "Last step (End)", () => last), position),
    graph.exact ? null : el("p", { class: "note", text: "This artifact has no record of each step. Steps are told from what the nodes say of themselves; edges may be shown with a later step than their own." }),
    el("ol", { class: "steps", "aria-label": "Steps of the compiler" }, ...rows)].filter(Boolean));
  return {
    /** Marks the step that the canvas shows. */
    show(frame) {
      now = Math.max(0, Math.min(last, frame));
      rows.forEach((row, i) => { row.classList.toggle("current", i === now); if (i === now) row.setAttribute("aria-current", "step"); else row.removeAttribute("aria-current"); });
      scrollInto(rows[now], host.parentElement);
      position.textContent = `${now + 1} of ${frames.length}`;
    },
  };
}

/**
 * The nodes that a step changed, alike ones of several layers together.
 * @param {object} model
 * @param {object} lens of the frame
 * @returns {{mark: number, text: string, place: string, nodes: number[], layers: number[]}[]}
 */
function changesOf(model, lens) {
  const found = new Map();
  for (let i = 0; i < model.count; i++) {
    const mark = lens.node[i];
    if (mark < ADDED) continue;
    const { path } = model.groups[model.groupOf[i]], layer = /(?:^|\.)(\d+)(?=\.|$)/.exec(path);
    const place = path.replace(/(^|\.)\d+(?=\.|$)/g, "$1*"), part = textOf(model, "part", i);
    const name = model.nodes.op[i] === CALL ? operatorName(textOf(model, "target", i)) : `${["input", "tensor", "", "output"][model.nodes.op[i]]}${layer ? "" : ` ${textOf(model, "name", i)}`}`;
    const key = JSON.stringify([mark, place, name, part, model.nodes.adaptation[i]]);
    let entry = found.get(key);
    if (!entry) found.set(key, entry = { mark, text: part ? `${name} \u00b7 ${part}` : name, place, adaptation: model.nodes.adaptation[i], nodes: [], layers: [] });
    entry.nodes.push(i);
    if (layer && !entry.layers.includes(Number(layer[1]))) entry.layers.push(Number(layer[1]));
  }
  return [...found.values()];
}

/**
 * Numbers as ranges: "0-3, 5".
 * @param {number[]} numbers
 * @returns {string}
 */
function rangesOf(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b), said = [];
  for (let i = 0; i < sorted.length;) {
    let j = i;
    while (j + 1 < sorted.length && sorted[j + 1] === sorted[j] + 1) j += 1;
    said.push(j > i ? `${sorted[i]}\u2013${sorted[j]}` : String(sorted[i]));
    i = j + 1;
  }
  return said.join(", ");
}

/**
 * What a step did, in words.
 * @param {object} page
 * @returns {(Node|null)[]}
 */
function stepDetails(page) {
  const { model, lens } = page, frames = model.graph.frames || [], frame = frames[lens.frame];
  if (!frame) return [el("h2", { text: "Steps" }), el("p", { class: "empty", text: "No step is recorded." })];
  const changes = changesOf(model, lens), places = new Map();
  for (const change of changes) {
    if (!places.has(change.place)) places.set(change.place, []);
    places.get(change.place).push(change);
  }
  const signs = ["", "", "+", "\u2212", "\u2937"], names = ["", "", "added", "removed", "rewired"];
  const parts = [...places].slice(0, 200).map(([place, list]) => el("section", {}, el("h3", { class: "whole", text: place || "(the model itself)" }),
    el("ul", { class: "changes" }, ...list.map((c) => el("li", { class: names[c.mark] },
      el("span", { class: "sign", "aria-hidden": "true", text: signs[c.mark] }), el("span", { class: "unseen", text: `${names[c.mark]}: ` }),
      linkTo(shorten(c.text, 60), () => page.select({ kind: "node", node: c.nodes[0] }), shorten(textOf(model, "name", c.nodes[0]), 200)),
      el("span", { class: "more", text: `${c.nodes.length > 1 ? ` ${formatNumber(c.nodes.length)} alike` : ""}${c.layers.length > 1 ? `, layers ${rangesOf(c.layers)}` : ""}${c.mark === REWIRED ? ", rewired" : ""}` }))))));
  const verified = frame.verified === true ? "Yes" : frame.verified === false ? "Not checked" : "";
  return [
    el("p", { class: "kind", text: `Step ${lens.frame + 1} of ${frames.length}` }),
    el("h2", { class: "whole", text: frame.step }),
    factList([["Added", frame.added], ["Removed", frame.removed], ["Rewired", frame.rewired], ["Nodes and tensors after it", frame.nodes], ["Inserted, tensors too", frame.inserted ?? ""], ["Verified", verified], ["Seconds", frame.seconds ?? ""]]),
    changes.length ? null : el("p", { class: "empty", text: lens.before === lens.frame ? "This step made the graph: every node is of it." : model.graph.exact ? "This step left every node and edge as it was." : "What this step changed is not recorded." }),
    ...parts,
  ];
}
