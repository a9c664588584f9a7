"use strict";
// Colours, and how a scene is painted: the canvas and the SVG text share it through a pen. No DOM: Python runs this file too.

const PALETTES = {
  light: { paper: "#f6f7f9", box: "#ffffff", closed: "#eef1f6", group: ["#fbfcfd", "#f2f4f8", "#fbfcfd"], line: "#7b8595", edge: "#8791a0", text: "#1a2130", sub: "#515b6c",
    accent: "#0b57d0", added: "#12702f", removed: "#b3261e", rewired: "#805300", shade: "#dfe3ea" },
  dark: { paper: "#15181d", box: "#262b33", closed: "#2b323c", group: ["#1b1f25", "#21262d", "#1b1f25"], line: "#778292", edge: "#75808f", text: "#e9ecf1", sub: "#b0b9c7",
    accent: "#8ab4f8", added: "#6fd391", removed: "#ff9c94", rewired: "#f2c063", shade: "#39414d" },
};
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', 'Noto Sans', sans-serif";

/**
 * The three channels of a colour; grey if it is none.
 * @param {string} hex
 * @returns {number[]}
 */
function channels(hex) {
  const text = /^#[0-9a-f]{6}$/i.test(hex) ? hex : "#808890";
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

/**
 * A mix of two colours.
 * @param {string} a
 * @param {string} b
 * @param {number} share of b, 0 to 1
 * @returns {string}
 */
function mix(a, b, share) {
  const [p, q] = [channels(a), channels(b)];
  return `#${p.map((v, i) => Math.round(v + (q[i] - v) * share).toString(16).padStart(2, "0")).join("")}`;
}

/**
 * The contrast of two colours as WCAG defines it.
 * @param {string} a
 * @param {string} b
 * @returns {number}
 */
function contrast(a, b) {
  const light = (hex) => {
    const [r, g, bl] = channels(hex).map((v) => { const c = v / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * bl + 0.05;
  };
  const [x, y] = [light(a), light(b)];
  return Math.max(x, y) / Math.min(x, y);
}

/**
 * What a colour of the data becomes in a theme: a tint to fill with and a colour that is readable on it.
 * @param {string} hex
 * @param {string} theme light or dark
 * @returns {{fill: string, ink: string}}
 */
function toneOf(hex, theme) {
  const palette = PALETTES[theme], fill = mix(palette.box, hex, theme === "dark" ? 0.22 : 0.13);
  let ink = mix(hex, hex, 0);
  for (let step = 0; step < 20 && contrast(ink, fill) < 4.6; step++) ink = mix(ink, theme === "dark" ? "#ffffff" : "#000000", 0.1);
  return { fill, ink };
}

/**
 * The style of a drawing: palette, tones of the adaptations, and what stands out.
 * @param {string} theme
 * @param {object[]} adaptations of the data
 * @param {object} more selected, hover, related
 * @returns {object}
 */
function styleOf(theme, adaptations, more = {}) {
  return { palette: PALETTES[theme], tones: adaptations.map((a) => toneOf(a.colour, theme)), selected: "", hover: -1, related: null, near: null, ...more };
}

/**
 * Paints a scene with a pen.
 * @param {object} pen box(), text(), line(), fade()
 * @param {object} scene of composeScene
 * @param {object} style of styleOf
 * @param {{left: number, top: number, right: number, bottom: number, zoom: number}} view what is in sight
 */
function paintScene(pen, scene, style, view) {
  const { boxes } = scene, { palette } = style, late = [];
  const outside = (x, y, w, h) => x > view.right || y > view.bottom || x + w < view.left || y + h < view.top;
  for (let i = 0; i < boxes.length;) {
    const box = boxes[i], small = Math.max(box.w, box.h) * view.zoom;
    if (i > 0 && (outside(box.x, box.y, box.w + 8, box.h + 8) || small < 1.5)) { i = box.end; continue; }
    const dim = style.near && !style.near.has(i) && !box.open;
    if (i > 0 && box.open && small < 36) {
      pen.box(box.x, box.y, box.w, box.h, 8, { fill: palette.shade, stroke: palette.line, width: 1 });
      box.stripes.forEach((a, k) => style.tones[a] && pen.box(box.x + box.w * (0.06 + 0.12 * k), box.y + box.h * 0.1, box.w * 0.08, box.h * 0.8, 0, { fill: style.tones[a].ink }));
      i = box.end;
      continue;
    }
    if (i > 0) { pen.fade(dim ? 0.45 : 1); paintBox(pen, box, style, view.zoom); }
    if (box.open) {
      pen.fade(style.near ? 0.4 : 1);
      for (const l of box.links) {
        const b = l.bounds ||= boundsOf(l.points);
        if (outside(b[0], b[1], b[2] - b[0], b[3] - b[1])) continue;
        if (style.related && style.related.has(l)) { late.push([box, l]); continue; }
        if (l.far) paintStub(pen, l, style, view.zoom);
        else if (Math.max(b[2] - b[0], b[3] - b[1]) * view.zoom > 2.5) paintLink(pen, scene, box, l, style, view.zoom, false);
      }
      pen.fade(1);
      paintPorts(pen, box, style, view.zoom);
    }
    i += 1;
  }
  pen.fade(1);
  for (const [box, l] of late) paintLink(pen, scene, box, l, style, view.zoom, true);
}

/**
 * Paints where edges come into an opened group and leave it.
 * @param {object} pen
 * @param {object} box
 * @param {object} style
 * @param {number} zoom
 */
function paintPorts(pen, box, style, zoom) {
  if (zoom < 0.25) return;
  for (const [port, name] of [[box.inPort, "in"], [box.outPort, "out"]]) {
    if (!port) continue;
    pen.box(port.x - 4, port.y - 4, 8, 8, 4, { fill: style.palette.edge, stroke: style.palette.edge, width: 1 });
    pen.text(port.x + 8, port.y + (name === "in" ? -3 : 4), name, { size: 10, fill: style.palette.sub });
  }
}

/**
 * The smallest rectangle around a route.
 * @param {number[]} points
 * @returns {number[]}
 */
function boundsOf(points) {
  const b = [Infinity, Infinity, -Infinity, -Infinity];
  for (let k = 0; k < points.length; k += 2) {
    b[0] = Math.min(b[0], points[k]); b[1] = Math.min(b[1], points[k + 1]);
    b[2] = Math.max(b[2], points[k]); b[3] = Math.max(b[3], points[k + 1]);
  }
  return b;
}

/**
 * Paints one box: a node, a group, or the frame and heading of an opened group.
 * @param {object} pen
 * @param {object} box
 * @param {object} style
 * @param {number} zoom
 */
function paintBox(pen, box, style, zoom) {
  const { palette, tones } = style, { x, y, w, h, item } = box;
  const chosen = style.selected === box.key, hovered = style.hover === box.index;
  const tone = box.adaptation >= 0 ? tones[box.adaptation] : null, removed = box.mark === REMOVED;
  const stroke = chosen || hovered ? palette.accent : removed ? palette.removed : tone ? tone.ink : palette.line;
  const line = { stroke, width: chosen ? 3 : hovered || tone || removed ? 1.8 : 1.1, dash: removed ? [6, 4] : null };
  const round = item.kind === "node" ? 6 : 9;
  if (box.open) {
    pen.box(x, y, w, h, round, { ...line, fill: palette.group[box.depth % 3] });
  } else {
    if (item.kind === "run") for (const off of [7, 3.5]) pen.box(x + off, y + off, w, h, round, { fill: palette.closed, stroke, width: 1 });
    const pill = item.kind === "node" && box.lines[1] && /^(input|output)/.test(box.lines[1].text);
    pen.box(x, y, w, h, pill ? Math.min(18, h / 2) : round, { ...line, fill: tone ? tone.fill : item.kind === "node" ? palette.box : palette.closed });
  }
  const bars = box.adaptation >= 0 ? [box.adaptation] : box.stripes;
  bars.forEach((a, k) => tones[a] && pen.box(x + 3 + k * 6, y + 6, 4, Math.max(6, (box.open ? HEADER : h) - 12), 2, { fill: tones[a].ink }));
  if (zoom < 0.28) return;
  if (item.kind !== "node" && zoom > 0.4) {
    const cx = x + w - 21, cy = y + 8;
    pen.box(cx, cy, 14, 14, 3, { fill: palette.box, stroke: palette.line, width: 1 });
    pen.text(cx + 7, cy + 11, box.open ? "\u2212" : "+", { size: 12, bold: true, fill: palette.text, middle: true });
  }
  const left = x + 11 + (box.adaptation < 0 ? Math.max(0, bars.length - 1) * 6 + (bars.length ? 3 : 0) : 3);
  if (box.open) { paintHeading(pen, box, style, left); return; }
  const room = x + w - left - 8;
  let at = y + 6;
  box.lines.forEach((l, k) => { paintLine(pen, l, left, at, k || item.kind === "node" ? room : room - 18, style); at += lineHeight(l); });
}

/**
 * Paints the heading of an opened group on one line.
 * @param {object} pen
 * @param {object} box
 * @param {object} style
 * @param {number} left
 */
function paintHeading(pen, box, style, left) {
  let at = left;
  for (const l of box.lines) {
    const title = l.style === "title", width = textWidth(l.text, title ? 13 : 11) * (title ? BOLD : 1), room = box.x + box.w - 26 - at;
    if (room < 24) break;
    pen.text(at, box.y + 20, l.text, { size: title ? 13 : 11, bold: title, fill: lineInk(l, style), most: Math.min(room, width + 8) });
    at += width + 14;
  }
}

/**
 * The colour of a line of text.
 * @param {object} l
 * @param {object} style
 * @returns {string}
 */
function lineInk(l, style) {
  const { palette, tones } = style;
  if (l.style === "title") return palette.text;
  if (l.style === "mark") return palette[["sub", "sub", "added", "removed", "rewired"][l.mark]];
  return l.adaptation >= 0 && tones[l.adaptation] ? tones[l.adaptation].ink : palette.sub;
}

/**
 * Paints one line of a box.
 * @param {object} pen
 * @param {object} l
 * @param {number} x
 * @param {number} y
 * @param {number} room its greatest width
 * @param {object} style
 */
function paintLine(pen, l, x, y, room, style) {
  const ink = lineInk(l, style);
  if (l.style === "chip") {
    const tone = style.tones[l.adaptation], chosen = style.selected === `%${l.node}`;
    pen.box(x - 1, y + 1.5, Math.min(room, textWidth(l.text, 11) + 12), 15, 4, { fill: tone ? tone.fill : style.palette.closed, stroke: chosen ? style.palette.accent : ink, width: chosen ? 2 : 1 });
    pen.text(x + 5, y + 12.5, l.text, { size: 10.5, fill: ink, most: room - 8 });
  } else if (l.style === "title") pen.text(x, y + 14, l.text, { size: 13, bold: true, fill: ink, most: room });
  else pen.text(x, y + 11.5, l.text, { size: 11, fill: ink, most: room });
}

/**
 * Paints one merged edge, with how many it stands for.
 * @param {object} pen
 * @param {object} scene
 * @param {object} box its owner
 * @param {object} l
 * @param {object} style
 * @param {number} zoom
 * @param {boolean} strong
 */
function paintLink(pen, scene, box, l, style, zoom, strong) {
  const { palette, tones } = style, { states } = l, all = l.ids.length;
  const marks = scene.lens.marks, removed = marks && states[REMOVED] === all, added = marks && states[ADDED] === all;
  const ends = [box.kids[l.a], box.kids[l.b]].map((kid) => kid && kid.adaptation >= 0 ? tones[kid.adaptation] : null), tone = ends[1] || ends[0];
  const stroke = removed ? palette.removed : strong ? palette.accent : added ? palette.added : tone ? tone.ink : palette.edge;
  const width = (strong ? 1.4 : 0) + Math.min(3.2, 1.2 + Math.log2(all) * 0.35);
  pen.line(l.points, { stroke, width, dash: removed ? [6, 4] : null, arrow: zoom > 0.3 && l.b >= 0, far: l.far });
  if (all > 1 && zoom > 0.55 && l.a >= 0 && l.b >= 0 && !l.far) {
    const p = l.points, k = 2 * Math.floor(p.length / 4);
    pen.text(p[k] + 5, p[k + 1] + 3, formatNumber(all), { size: 10, fill: palette.sub });
  }
}

/**
 * Paints the end of an edge whose way is left out: its source has many readers.
 * @param {object} pen
 * @param {object} l
 * @param {object} style
 * @param {number} zoom
 */
function paintStub(pen, l, style, zoom) {
  if (zoom < 0.3 || l.b < 0) return;
  const [, , x, y] = l.points, side = x + 12;
  pen.line([side, y - 9, side, y], { stroke: style.palette.edge, width: 1.1, arrow: zoom > 0.5 });
  pen.box(side - 2, y - 12, 4, 4, 2, { fill: style.palette.edge });
}

/**
 * The Bezier curve through a route, as a list of commands.
 * @param {number[]} p x, y, x, y ...
 * @param {boolean} far one bow around what lies between its ends
 * @returns {(string|number)[][]}
 */
function curveOf(p, far = false) {
  const n = p.length / 2, path = [["M", p[0], p[1]]];
  if (far) {
    const [x0, y0, x1, y1] = p, side = 110 + Math.min(160, Math.abs(y1 - y0) * 0.06) + Math.abs(x1 - x0) * 0.2;
    path.push(["C", Math.max(x0, x1) + side, y0 + 20, Math.max(x0, x1) + side, y1 - 20, x1 + 12, y1]);
    return path;
  }
  if (n === 2) {
    const [x0, y0, x1, y1] = [p[0], p[1], p[2 * n - 2], p[2 * n - 1]], bend = Math.max(12, Math.abs(y1 - y0) * 0.4);
    path.push(x0 === x1 ? ["L", x1, y1] : ["C", x0, y0 + bend, x1, y1 - bend, x1, y1]);
    return path;
  }
  for (let k = 1; k < n - 1; k++) {
    const [x, y, nx, ny] = [p[2 * k], p[2 * k + 1], p[2 * k + 2], p[2 * k + 3]];
    path.push(k === n - 2 ? ["Q", x, y, nx, ny] : ["Q", x, y, (x + nx) / 2, (y + ny) / 2]);
  }
  return path;
}

/**
 * The corners of the arrow head at the end of a curve.
 * @param {(string|number)[][]} path of curveOf
 * @param {number} size
 * @returns {number[]}
 */
function arrowOf(path, size) {
  const last = path[path.length - 1], [x, y] = last.slice(-2), before = last.length > 3 ? last.slice(-4, -2) : path[path.length - 2].slice(-2);
  const length = Math.hypot(x - before[0], y - before[1]) || 1, ux = (x - before[0]) / length, uy = (y - before[1]) / length;
  return [x, y, x - ux * size * 1.7 - uy * size * 0.8, y - uy * size * 1.7 + ux * size * 0.8, x - ux * size * 1.7 + uy * size * 0.8, y - uy * size * 1.7 - ux * size * 0.8];
}

/**
 * Text for SVG: visible, and escaped.
 * @param {*} text
 * @returns {string}
 */
function escapeXml(text) {
  return visibleText(text).replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]);
}

/**
 * A pen that writes SVG elements.
 * @param {string[]} out
 * @returns {object}
 */
function svgPen(out) {
  const n = (v) => String(Math.round(v * 10) / 10);
  const line = (s) => `${s.stroke ? ` stroke="${s.stroke}" stroke-width="${n(s.width || 1)}"` : ""}${s.dash ? ` stroke-dasharray="${s.dash.join(" ")}"` : ""}`;
  return {
    fade() {},
    box(x, y, w, h, r, s) { out.push(`<rect x="${n(x)}" y="${n(y)}" width="${n(w)}" height="${n(h)}" rx="${n(r)}" fill="${s.fill || "none"}"${line(s)}/>`); },
    text(x, y, text, s) {
      const fit = s.most && textWidth(text, s.size) > s.most ? ` textLength="${n(s.most)}" lengthAdjust="spacingAndGlyphs"` : "";
      out.push(`<text x="${n(x)}" y="${n(y)}" font-size="${s.size}"${s.bold ? ' font-weight="600"' : ""}${s.middle ? ' text-anchor="middle"' : ""} fill="${s.fill}"${fit}>${escapeXml(text)}</text>`);
    },
    line(points, s) {
      const path = curveOf(points, s.far);
      out.push(`<path d="${path.map(([c, ...v]) => c + v.map(n).join(" ")).join("")}" fill="none"${line(s)}/>`);
      if (s.arrow) out.push(`<path d="M${arrowOf(path, 4 + s.width * 0.5).map(n).join(" ")}Z" fill="${s.stroke}"/>`);
    },
  };
}

/**
 * A scene as a self-contained SVG document.
 * @param {object} scene
 * @param {object} style
 * @param {{title: string, note: string, legend: {text: string, adaptation: number}[], width: number}} words
 * @returns {string}
 */
function sceneSvg(scene, style, words) {
  const out = [], pen = svgPen(out), { palette } = style;
  const head = 52 + Math.ceil(words.legend.length / 3) * 20;
  const wide = Math.max(scene.width, 420, textWidth(words.title, 17) + 60), shift = (wide - scene.width) / 2, tall = scene.height + head;
  const width = words.width || Math.ceil(wide);
  out.push(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${Math.ceil(tall * width / wide)}" viewBox="0 0 ${Math.ceil(wide)} ${Math.ceil(tall)}" role="img" font-family="${escapeXml(FONT)}">`);
  out.push(`<title>${escapeXml(words.title)}: ${escapeXml(words.note)}</title>`);
  pen.box(0, 0, Math.ceil(wide), Math.ceil(tall), 0, { fill: palette.paper });
  pen.text(20, 28, words.title, { size: 17, bold: true, fill: palette.text });
  pen.text(20, 47, words.note, { size: 12, fill: palette.sub });
  words.legend.forEach((entry, k) => {
    const x = 20 + (k % 3) * Math.min(280, (wide - 40) / 3), y = 58 + Math.floor(k / 3) * 20;
    pen.box(x, y + 2, 12, 12, 3, { fill: style.tones[entry.adaptation].fill, stroke: style.tones[entry.adaptation].ink, width: 1.5 });
    pen.text(x + 18, y + 12, entry.text, { size: 12, fill: palette.text, most: Math.min(280, (wide - 40) / 3) - 24 });
  });
  out.push(`<g transform="translate(${Math.round(shift)} ${head})">`);
  paintScene(pen, scene, style, { left: -1e9, top: -1e9, right: 1e9, bottom: 1e9, zoom: 1 });
  out.push("</g></svg>");
  return out.join("\n");
}

/**
 * The words around an SVG of a view.
 * @param {object} data
 * @param {object} lens
 * @param {string} mode
 * @returns {{title: string, note: string, legend: object[]}}
 */
function wordsOf(data, lens, mode) {
  const views = { after: "after rewriting", before: "before rewriting", diff: "what rewriting changed" };
  const step = lens.view === "frame" && (lens.model.graph.frames || [])[lens.frame];
  return {
    title: shorten(data.title || data.model, 70),
    note: `${shorten(data.model, 60)}, ${mode} mode, ${step ? `after step ${lens.frame + 1}: ${shorten(step.step, 40)}` : views[lens.view] || lens.view}, ${formatNumber(lens.stats[0].nodes)} nodes`,
    legend: (data.adaptations || []).map((a, i) => ({ text: shorten(a.method && a.method !== a.name ? `${a.name} (${a.method})` : a.name, 34), adaptation: i }))
      .filter((entry) => lens.stats[0].adaptations.has(entry.adaptation)),
  };
}

/**
 * The SVG of a model's graph, for Python.
 * @param {object} data what the page gets
 * @param {{mode?: string, view?: string, frame?: number, open?: string[]|string, tensors?: string, theme?: string, width?: number}} asked
 * @returns {string}
 */
function graftcSvg(data, asked = {}) {
  const mode = data.graphs[asked.mode] ? asked.mode : Object.keys(data.graphs)[0];
  const adaptations = data.adaptations || [];
  const lens = makeLens(openGraph(data.graphs[mode]), { view: asked.view || "after", frame: asked.frame || 0, tensors: asked.tensors, names: adaptations.map((a) => a.name), ...(data.categories === "roles" ? { verb: "", noun: "roles" } : {}) });
  lens.peek = asked.open === "layer";
  const keys = keysOfLevel(lens, lens.peek ? "nodes" : "top");
  for (const path of Array.isArray(asked.open) ? asked.open : []) {
    const way = wayTo(lens, path);
    for (const key of [...way.keys, ...(way.item ? [way.item.key] : [])]) keys.add(key);
  }
  const built = buildBoxes(lens, (key) => keys.has(key));
  const scene = composeScene(built, layoutTree(jobOf(built.root), globalThis.dagre || null, new Map()));
  return sceneSvg(scene, styleOf(asked.theme === "dark" ? "dark" : "light", adaptations), { ...wordsOf(data, lens, mode), width: asked.width });
}
globalThis.graftcSvg = graftcSvg;
