"use strict";
// The report: tables and plots of what the data measures. Each figure carries its exact value.

/**
 * A table cell with a figure of the data.
 * @param {string} path of the value in the data
 * @param {*} value
 * @param {(value: *) => string} format
 * @returns {HTMLElement}
 */
function figureCell(path, value, format = formatNumber) {
  const known = value !== null && value !== undefined;
  return el("td", { class: typeof value === "number" ? "number" : "", "data-figure": path, "data-value": known ? String(value) : "", text: known ? format(value) : "\u2013" });
}

/**
 * A table in a frame that scrolls.
 * @param {string} caption
 * @param {string[]} heads
 * @param {HTMLElement[][]} rows of cells
 * @returns {HTMLElement}
 */
function tableOf(caption, heads, rows) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", { text: caption }), el("thead", {}, el("tr", {}, ...heads.map((h, k) => el("th", { scope: "col", class: rows[0]?.[k]?.classList.contains("number") ? "number" : null, text: h })))), el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells)))));
}

/**
 * Ticks of an axis at round values.
 * @param {number} low
 * @param {number} high
 * @returns {number[]}
 */
function ticksOf(low, high) {
  const step = 10 ** Math.floor(Math.log10(high / 3 - low / 3 || 1)), wide = [1, 2, 5, 10].map((k) => k * step).find((s) => (high - low) / s <= 5) || step, ticks = [];
  for (let t = Math.ceil(low / wide) * wide; t <= high + wide * 1e-6; t += wide) ticks.push(Number(t.toPrecision(12)));
  return ticks;
}

/**
 * A plot with axes, as SVG elements.
 * @param {{label: string, x: number[], y: number[], log?: boolean, whole?: boolean, wide?: number, xName: string, yName: string}} axes
 *   x and y: the values' ranges; whole: only whole numbers at x; wide: the width
 * @param {(place: {x: (v: number) => number, y: (v: number) => number}) => Node[]} inside
 * @returns {SVGElement}
 */
function plotOf(axes, inside) {
  const W = axes.wide || 720, H = axes.wide ? 220 : 280, L = 64, B = 40, T = 14, R = 14;
  const of = (v) => axes.log ? Math.log10(Math.max(v, 1e-300)) : Math.max(-1e300, Math.min(1e300, v));
  let [low, high] = axes.y.map(of), [left, right] = axes.x;
  if (axes.log) { low = Math.floor(low - 0.05); high = Math.ceil(high + 0.05); }
  if (!(high > low)) { const around = axes.log ? 1 : Math.abs(low) * 0.5 || 1; low -= around; high += around; }
  if (!(right > left)) { left -= 0.5; right += 0.5; }
  const place = { x: (v) => L + (v - left) / (right - left) * (W - L - R), y: (v) => H - B - (of(v) - low) / (high - low) * (H - B - T), left: L, right: W - R };
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img", "aria-label": axes.label });
  const yTicks = axes.log ? Array.from({ length: high - low + 1 }, (_, k) => low + k).filter((_, k, all) => k % Math.ceil(all.length / 7) === 0) : ticksOf(low, high);
  for (const t of yTicks) {
    const v = axes.log ? 10 ** t : t, y = place.y(v);
    svg.append(el("line", { x1: L, x2: W - R, y1: y, y2: y, class: "rule" }), el("text", { x: L - 8, y: y + 4, class: "tick end", text: axes.log ? `1e${t}` : formatNumber(v) }));
  }
  for (const t of ticksOf(left, right).filter((v) => v >= left && v <= right && (!axes.whole || Number.isInteger(v)))) svg.append(el("text", { x: place.x(t), y: H - B + 18, class: "tick middle", text: formatNumber(t) }));
  svg.append(el("line", { x1: L, x2: W - R, y1: H - B, y2: H - B, class: "axis" }), el("line", { x1: L, x2: L, y1: T, y2: H - B, class: "axis" }),
    el("text", { x: (L + W - R) / 2, y: H - 4, class: "tick middle", text: axes.xName }), ...inside(place));
  const name = el("text", { x: 0, y: 0, class: "tick middle", transform: `translate(13 ${(H - B + T) / 2}) rotate(-90)`, text: axes.yName });
  svg.append(name);
  return svg;
}

/**
 * One point for each of several values, and the line that they must not pass.
 * @param {{title: string, unit: string, of: string, log: boolean, mark: string}} words
 * @param {{name: string, value: number}[]} points
 * @param {number|null} bound
 * @returns {HTMLElement|null}
 */
function boundPlot(words, points, bound) {
  const seen = points.map((p, i) => ({ ...p, i })).filter((p) => typeof p.value === "number" && Number.isFinite(p.value) && (!words.log || p.value > 0));
  if (!seen.length) return null;
  const known = typeof bound === "number" && bound > 0, values = [...seen.map((p) => p.value), ...(known ? [bound] : [])], low = words.log ? Math.min(...values) : 0, high = Math.max(...values) * (words.log ? 1 : 1.1);
  const exact = points.length - seen.length;
  return el("figure", {},
    el("figcaption", { text: words.title + (words.log && exact ? `; ${exact} of ${points.length} are 0` : "") }),
    el("ul", { class: "key" }, el("li", {}, el("span", { class: `mark ${words.mark}`, "aria-hidden": "true" }), words.of), known ? el("li", {}, el("span", { class: "mark dashed", "aria-hidden": "true" }), `At most ${plain(bound)}`) : null),
    plotOf({ label: `${words.title}: ${seen.length} values, at most ${formatNumber(Math.max(...seen.map((p) => p.value)))}${known ? `, allowed ${plain(bound)}` : ""}`, x: [0, points.length - 1], y: [low, high], log: words.log, whole: true, xName: "In graph order", yName: words.unit }, (place) => [
      known ? el("line", { x1: place.left, x2: place.right, y1: place.y(bound), y2: place.y(bound), class: "budget" }) : null,
      ...seen.map((p) => words.mark === "round" ? el("circle", { cx: place.x(p.i), cy: place.y(p.value), r: 4, class: "algebra" }, el("title", { text: `${shorten(p.name, 100)}: ${p.value}` }))
        : el("rect", { x: place.x(p.i) - 3.5, y: place.y(p.value) - 3.5, width: 7, height: 7, class: "rounding" }, el("title", { text: `${shorten(p.name, 100)}: ${p.value}` })))].filter(Boolean)));
}

/**
 * The certificate: its figures, and its errors beside what they may be.
 * @param {object} certificate
 * @returns {HTMLElement[]}
 */
function certificateParts(certificate) {
  const { sites = [], outputs = {}, routes = [], budget, bounds = {} } = certificate;
  const named = (key) => sites.map((s) => ({ name: s.site, value: s[key] }));
  const parts = [el("p", { class: certificate.passed ? "passed" : "failed", text: certificate.passed ? "Passed: every site and the outputs keep to their bounds." : "Not passed." }),
    el("dl", { class: "facts" }, ...[["Budget of the outputs", "certificate.budget", budget], ...Object.entries(outputs).map(([name, v]) => [`Largest difference of ${shorten(name, 40)}`, `certificate.outputs.${name}`, v])]
      .flatMap(([label, path, v]) => [el("dt", { text: label }), el("dd", { "data-figure": path, "data-value": v, text: plain(v) })]))];
  if ((certificate.failures || []).length) parts.push(el("ul", {}, ...certificate.failures.map((f) => el("li", { text: plain(f) }))));
  parts.push(
    boundPlot({ title: "Each site in float64, before rounding", unit: "Relative error", of: "A site", log: true, mark: "round" }, named("algebra"), bounds.algebra),
    boundPlot({ title: "Rounding of folded weights", unit: "Units in the last place", of: "A site", log: false, mark: "square" }, named("rounding"), bounds.rounding),
    Object.keys(outputs).length < 2 ? null : boundPlot({ title: "Outputs of the whole model, folded against unfolded", unit: "Difference", of: "An output", log: true, mark: "round" }, Object.entries(outputs).map(([name, value]) => ({ name, value })), budget));
  if (sites.length) parts.push(el("details", {}, el("summary", { text: `The ${sites.length} sites in figures` }), tableOf("Certificate by site", ["Site", "Adaptations", "Change", "Algebra", "Rounding", "Retention"],
    sites.map((s, i) => [el("th", { scope: "row", text: shorten(s.site, 80), title: shorten(s.site, 300) }), el("td", { text: plain(s.adaptations) }),
      ...["change", "algebra", "rounding"].map((k) => figureCell(`certificate.sites.${i}.${k}`, s[k])), el("td", { text: plain(s.retention) })]))));
  const other = routes.map((r, i) => ({ ...r, i })).filter((r) => r.flips);
  if (other.length) parts.push(tableOf("Choices that the folded model makes otherwise", ["Router", "Choices", "Others", "Gap", "Explained by rounding"],
    other.map((r) => [el("th", { scope: "row", text: shorten(r.module || r.choice, 80), title: shorten(r.choice, 300) }),
      ...["choices", "flips", "gap", "bound"].map((k) => figureCell(`certificate.routes.${r.i}.${k}`, r[k]))])));
  return parts.filter(Boolean);
}

/**
 * A line plot for each group of curves.
 * @param {object[]} curves
 * @returns {HTMLElement[]}
 */
function curveParts(curves) {
  const groups = new Map();
  curves.forEach((curve, i) => {
    const pairs = (curve.steps || []).map((s, k) => [s, curve.values[k]]).filter(([s, v]) => Number.isFinite(s) && Number.isFinite(v));
    // What belongs to sites is one plot with a line for each; other numbers have plots of their own.
    const key = /: /.test(curve.group || "") ? curve.group : `${curve.group}\n${curve.name}`;
    if (pairs.length) groups.set(key, [...(groups.get(key) || []), { curve, i, pairs }]);
  });
  const span = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  return [...groups.values()].map((lines) => {
    const every = lines.flatMap((line) => line.pairs), one = lines.length === 1 ? lines[0] : null;
    const title = one ? `${shorten(one.curve.group || "", 60)}${one.curve.group ? ": " : ""}${shorten(one.curve.name, 60)}` : `${shorten(lines[0].curve.group, 60)}, ${lines.length} sites`;
    return el("figure", {}, plotOf({ label: `${title}, ${every.length} values`, x: span(every.map((p) => p[0])), y: span(every.map((p) => p[1])), whole: true, wide: 500, xName: "Step", yName: "" }, (place) =>
      lines.map((line) => el("path", { class: "curve", d: line.pairs.map(([s, v], k) => `${k ? "L" : "M"}${place.x(s).toFixed(1)} ${place.y(v).toFixed(1)}`).join("") }, el("title", { text: shorten(line.curve.name, 100) })))),
    el("figcaption", { text: title }),
    el("details", { open: one ? "" : null }, el("summary", { text: one ? "Last value" : "First and last values" }), tableOf(title, [one ? "Name" : "Site", "First", "Last"], lines.slice(0, 400).map((line) => [el("th", { scope: "row", text: shorten(line.curve.name, 80) }),
      figureCell(`curves.${line.i}.values.0`, line.curve.values[0]), figureCell(`curves.${line.i}.values.${line.curve.values.length - 1}`, line.curve.values[line.curve.values.length - 1])]))));
  });
}

/**
 * Fills the report.
 * @param {HTMLElement} host
 * @param {object} page
 */
function createReport(host, page) {
  const { data } = page, { adaptations = [], layers = [], targets, curves, warnings = [], summary = {} } = data;
  const none = (text) => el("p", { class: "empty", text });
  const part = (title, ...inside) => el("section", { class: "part" }, el("h2", { text: title }), ...inside.flat());
  const who = (name) => { const i = adaptations.findIndex((a) => a.name === name); return el("th", { scope: "row" }, i >= 0 ? adapterLink(page, i) : visibleText(name)); };
  const only = page.words.roles ? ["places", "layers", "nodes"] : null;
  const figures = [["places", "Places"], ["roles", "Roles"], ["layers", "Layers"], ["trainable_parameters", "Trainable"], ["frozen_parameters", "Frozen"], ["size", "Size"], ["share", "Share of all (%)"], ["bytes", "Bytes"],
    ["flops_per_token", "FLOPs per token, products"], ["value_bytes_per_token", "Value bytes per token"], ["nodes", "Nodes without tensors"]].filter(([k]) => !only || only.includes(k));
  const words = { base_parameters: "Base parameters", base_tensors: "Base tensors", model: "Model", trainable_parameters: "Trained by adaptations", trained_in_full: "Trained in full", percent: "Trained by adaptations, % of base and added", nodes: "Nodes without tensors", inserted: "Inserted nodes without tensors" };
  const found = (summary.passes || []).flatMap((own, i) => own.figures.map((f, k) => [own, f, `summary.passes.${i}.figures.${k}.value`]));
  const scalars = Object.entries(summary).filter(([, v]) => v !== null && typeof v !== "object");
  host.replaceChildren(...[
    warnings.length ? part("Warnings", el("ul", { class: "warnings" }, ...warnings.map((w) => el("li", {}, el("strong", { text: `${w.code} ` }), el("span", { text: w.text }))))) : null,
    data.differences ? part("Differences", data.differences.length ? el("ul", { class: "differences" }, ...data.differences.map((d) => el("li", {}, el("h3", { text: d.what }), ...(Array.isArray(d.lines) ? d.lines : [d.lines]).slice(0, 400).map((line) => el("code", { text: plain(line) }))))) : none("Nothing differs.")) : null,
    part("Summary", scalars.length ? el("dl", { class: "facts" }, ...scalars.flatMap(([k, v]) => [el("dt", { text: words[k] || k.replaceAll("_", " ") }), el("dd", { "data-figure": `summary.${k}`, "data-value": String(v), text: typeof v === "number" ? formatNumber(v) : String(v) })])) : none("The data has no summary.")),
    found.length ? part("Passes of plugins", tableOf("What passes of plugins report", ["Pass", "Figure", "Site", "Value"], found.slice(0, 400).map(([own, f, path]) => [el("th", { scope: "row", text: shorten(own.name, 60) }), el("td", { text: shorten(f.name, 60) }), el("td", { text: shorten(f.site || "whole model", 80) }), figureCell(path, f.value)]))) : null,
    part(page.words.many, page.words.roles ? null : el("p", { class: "empty", text: "FLOPs are those of matrix products with weights, two for a multiply-add; attention over virtual keys is not in them. Bytes of values are those of a row of 512 tokens." }), adaptations.length ? tableOf(page.words.roles ? "The roles of places" : "What each adaptation adds", [page.words.one, "Method", ...figures.map((f) => f[1])], adaptations.map((a, i) => [who(a.name), el("td", { text: a.method, "data-figure": `adaptations.${i}.method`, "data-value": visibleText(a.method) }),
      ...figures.map(([k]) => figureCell(`adaptations.${i}.${k}`, Array.isArray(a[k]) ? a[k].join(", ") : a[k]))])) : none(page.words.empty)),
    page.words.roles ? null : part("By layer", layers.length ? tableOf("What each layer holds", ["Layer", "Adaptation", "Size", "Trainable", "Bytes", "FLOPs per token, products", "Value bytes per token"], layers.map((l, i) => [
      el("th", { scope: "row" }, linkTo(shorten(l.layer, 60) || "(outside of layers)", () => page.select({ kind: "group", key: l.layer }))), el("td", { text: shorten(l.adaptation, 60) }), el("td", { text: shorten(l.size || "", 60) }),
      ...["trainable_parameters", "bytes", "flops_per_token", "value_bytes_per_token"].map((k) => figureCell(`layers.${i}.${k}`, l[k]))])) : none("No layer holds trained tensors.")),
    page.words.roles ? null : part("Certificate", data.certificate ? certificateParts(data.certificate) : none("Nothing was folded and certified yet: `graftc merge` or `graftc verify` makes a certificate.")),
    page.words.roles ? null : part("Folding", adaptations.length ? tableOf("What folds into the base's weights", ["Adaptation", "Folds", "Why"], adaptations.map((a, i) => [who(a.name),
      el("td", { "data-figure": `adaptations.${i}.folds`, "data-value": String(a.folds), text: a.folds === true ? "Yes" : a.folds === false ? "No" : "Not known" }), el("td", { text: a.fold_reason || (a.folds ? "Its change can be added to the weights of the base." : "") })])) : none("There is nothing to fold.")),
    page.words.roles ? null : part("Targets", targets && targets.length ? tableOf("What the spec asked for, and what it matched", ["Adaptation", "Asked for", "Matched", "Nearly matched"], targets.map((t, i) => [who(t.adaptation), el("td", { text: t.asked }), figureCell(`targets.${i}.matched`, t.matched),
      el("td", {}, (t.nearly || []).length ? el("ul", {}, ...t.nearly.slice(0, 50).map((n) => el("li", { text: `${shorten(n.place, 80)}: ${n.reason}` })), t.nearly.length > 50 || t.more ? el("li", { text: `and ${formatNumber((t.more || 0) + Math.max(0, t.nearly.length - 50))} more` }) : null) : "\u2013")])) : none("The data does not say what the spec asked for.")),
    page.words.roles ? null : part("Training", curves && curves.length ? el("div", { class: "curves" }, ...curveParts(curves)) : none("No training log was given.")),
  ].filter(Boolean));
}

/**
 * Fills the title and the figures at the top.
 * @param {object} page
 */
function drawTitle(page) {
  const { data } = page, s = data.summary || {};
  byId("title").textContent = shorten(data.title || data.model, 90);
  byId("title").title = shorten(data.title, 500);
  byId("model").textContent = `${shorten(data.model, 60)}${data.artifact ? `, ${shorten(data.artifact, 60)}` : ""}, graftc ${shorten(data.graftc, 20)}`;
  const figure = (name, key, text) => s[key] === undefined || s[key] === null ? [] : [el("div", {}, el("dt", { text: name }), el("dd", { "data-figure": `summary.${key}`, "data-value": String(s[key]), title: formatNumber(s[key]), text }))];
  byId("figures").append(...figure("Base parameters", "base_parameters", formatShort(s.base_parameters)), ...(data.categories === "roles" ? [] : figure("Trained by adaptations", "trainable_parameters", formatShort(s.trainable_parameters))), ...(s.trained_in_full ? figure("Trained in full", "trained_in_full", formatShort(s.trained_in_full)) : []), ...(data.categories === "roles" ? [] : figure("Of base and added", "percent", `${formatNumber(Number(Number(s.percent).toPrecision(3)))} %`)));
}

/**
 * Fills the spec: its lines with numbers, and the adaptations that they ask for.
 * @param {HTMLElement} host
 * @param {object} page
 */
function createSpec(host, page) {
  const { data } = page;
  const marks = new Map(Object.entries(data.spec?.lines || {}).map(([name, line]) => [line, name]));
  host.append(el("h2", { text: page.words.spec }), data.spec?.text ? el("ol", { class: "code" }, ...data.spec.text.replace(/\n$/, "").split("\n").map((line, k) => {
    const index = data.adaptations.findIndex((a) => a.name === marks.get(k + 1));
    return el("li", { id: `line-${k + 1}`, tabindex: -1, class: marks.has(k + 1) ? "asks" : "" }, el("code", { text: line || " " }), index >= 0 ? el("span", { class: "note" }, adapterLink(page, index)) : null);
  })) : el("p", { class: "empty", text: page.words.roles ? "Every place has a role, or needs none." : "The data has no spec." }));
}
