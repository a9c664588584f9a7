"use strict";
// Draws a scene on a canvas: pan, zoom, what is under the pointer, a small map, and the list of boxes for screen readers.

/**
 * An element.
 * @param {string} tag
 * @param {object} props class, text, on (listeners), and attributes; null and false are left out
 * @param {...(Node|string|null)} inside
 * @returns {HTMLElement}
 */
function el(tag, props = {}, ...inside) {
  const svg = ["svg", "path", "line", "circle", "g", "text", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = visibleText(value);
    else if (name === "on") for (const [type, listen] of Object.entries(value)) node.addEventListener(type, listen);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.filter((child) => child !== null && child !== undefined));
  return node;
}

/**
 * Scrolls a list, and nothing around it, until an entry is in sight.
 * @param {HTMLElement|undefined} entry
 * @param {HTMLElement} host that scrolls
 */
function scrollInto(entry, host) {
  if (!entry) return;
  const a = entry.getBoundingClientRect(), b = host.getBoundingClientRect();
  if (a.top < b.top) host.scrollTop -= b.top - a.top + 8;
  else if (a.bottom > b.bottom) host.scrollTop += a.bottom - b.bottom + 8;
}

/**
 * A pen that draws on a canvas whose transform is set.
 * @param {CanvasRenderingContext2D} ctx
 * @returns {object}
 */
function canvasPen(ctx) {
  let font = "", dashed = false;
  const dash = (pattern) => { if (pattern || dashed) { ctx.setLineDash(pattern || []); dashed = Boolean(pattern); } };
  const trace = (path) => {
    ctx.beginPath();
    for (const [c, ...v] of path) {
      if (c === "M") ctx.moveTo(v[0], v[1]);
      else if (c === "L") ctx.lineTo(v[0], v[1]);
      else if (c === "Q") ctx.quadraticCurveTo(v[0], v[1], v[2], v[3]);
      else ctx.bezierCurveTo(v[0], v[1], v[2], v[3], v[4], v[5]);
    }
  };
  return {
    zoom: 1,
    begin(zoom) { this.zoom = zoom; font = ""; dashed = true; dash(null); ctx.globalAlpha = 1; },
    fade(alpha) { ctx.globalAlpha = alpha; },
    box(x, y, w, h, r, s) {
      ctx.beginPath();
      if (r > 0 && Math.min(w, h) * this.zoom > 6) ctx.roundRect(x, y, w, h, Math.min(r, w / 2, h / 2)); else ctx.rect(x, y, w, h);
      if (s.fill) { ctx.fillStyle = s.fill; ctx.fill(); }
      if (s.stroke) { dash(s.dash); ctx.strokeStyle = s.stroke; ctx.lineWidth = Math.max(s.width || 1, 0.6 / this.zoom); ctx.stroke(); }
    },
    text(x, y, text, s) {
      if (s.size * this.zoom < 4.2) return;
      const wanted = `${s.bold ? "600 " : ""}${s.size}px ${FONT}`;
      if (wanted !== font) ctx.font = font = wanted;
      ctx.textAlign = s.middle ? "center" : "left";
      ctx.fillStyle = s.fill;
      if (s.most) ctx.fillText(text, x, y, s.most); else ctx.fillText(text, x, y);
    },
    line(points, s) {
      const path = curveOf(points, s.far);
      dash(s.dash);
      ctx.strokeStyle = s.stroke;
      ctx.lineWidth = Math.max(s.width, 0.7 / this.zoom);
      trace(path);
      ctx.stroke();
      if (!s.arrow) return;
      const a = arrowOf(path, 4 + s.width * 0.5);
      ctx.beginPath(); ctx.moveTo(a[0], a[1]); ctx.lineTo(a[2], a[3]); ctx.lineTo(a[4], a[5]);
      ctx.fillStyle = s.stroke;
      ctx.fill();
    },
  };
}

/**
 * The edges at a box, its neighbours, wherever in the scene they are drawn.
 * @param {object} scene
 * @param {number} index of the box
 * @returns {{related: Set<object>, near: Set<number>}}
 */
function relatedTo(scene, index) {
  const { boxes, leaf, lens } = scene, { flow } = lens, end = boxes[index].end;
  const ids = new Set(), related = new Set(), near = new Set();
  const inside = (i) => leaf[i] >= index && leaf[i] < end;
  for (let k = index; k < end; k++) near.add(k);
  for (let k = 0; k < flow.size; k++) {
    if (inside(flow.source[k]) === inside(flow.target[k])) continue;
    ids.add(k);
    near.add(leaf[flow.source[k]]).add(leaf[flow.target[k]]);
  }
  // Of an opened group only what comes and goes is marked, not its ways inside.
  const own = (box) => boxes[index].open && box.index >= index && box.index < end;
  if (ids.size) for (const box of boxes) if (!own(box)) for (const l of box.links) if (l.ids.some((k) => ids.has(k))) related.add(l);
  return { related, near };
}

/**
 * What is at a point of the scene.
 * @param {object} scene
 * @param {number} x
 * @param {number} y
 * @returns {{box: object, node: number, toggle: boolean}|null} node: of a tensor's mark; toggle: the sign that opens or closes
 */
function hitAt(scene, x, y) {
  let found = null;
  for (let i = 1; i < scene.boxes.length;) {
    const box = scene.boxes[i];
    if (x < box.x || y < box.y || x > box.x + box.w || y > box.y + box.h) { i = box.end; continue; }
    found = box;
    i += 1;
  }
  if (!found) return null;
  let node = -1, at = found.y + 6;
  for (const l of found.open ? [] : found.lines) {
    if (l.style === "chip" && y >= at && y < at + lineHeight(l)) node = l.node;
    at += lineHeight(l);
  }
  return { box: found, node, toggle: found.item.kind !== "node" && x > found.x + found.w - 26 && y < found.y + 27 };
}

/**
 * The merged edge at a point, among those of one opened box.
 * @param {object} scene
 * @param {number} index of the box
 * @param {number} x
 * @param {number} y
 * @param {number} reach how far away it may be
 * @returns {{kind: string, owner: string, a: number, b: number}|null}
 */
function edgeAt(scene, index, x, y, reach) {
  const box = scene.boxes[index];
  let best = reach, found = null;
  for (const l of box.links) {
    for (let k = 0; !l.far && k + 3 < l.points.length; k += 2) {
      const [x0, y0, x1, y1] = l.points.slice(k, k + 4), dx = x1 - x0, dy = y1 - y0;
      const t = Math.max(0, Math.min(1, ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1))), away = Math.hypot(x - x0 - t * dx, y - y0 - t * dy);
      if (away < best) { best = away; found = { kind: "edge", owner: box.key, a: l.a, b: l.b }; }
    }
  }
  return found;
}

/**
 * The canvas of a page.
 * @param {HTMLElement} host holds it
 * @param {{select: Function, toggle: Function, hover: Function, place: Function}} on what happened; place: what is in the middle
 * @returns {object}
 */
function createCanvas(host, on) {
  const canvas = el("canvas", { class: "drawing", "aria-hidden": "true" });
  const map = el("canvas", { class: "map", "aria-hidden": "true", width: 150, height: 110 });
  host.append(canvas, map);
  const ctx = canvas.getContext("2d"), pen = canvasPen(ctx);
  const camera = { x: 0, y: 0, zoom: 1 };
  let scene = null, style = null, wide = 0, tall = 0, asked = 0, moving = 0, still = null, frames = 0;

  const size = () => {
    const ratio = globalThis.devicePixelRatio || 1;
    wide = host.clientWidth; tall = host.clientHeight;
    canvas.width = Math.max(1, Math.round(wide * ratio));
    canvas.height = Math.max(1, Math.round(tall * ratio));
    ask();
  };
  const ask = () => { if (!asked) asked = requestAnimationFrame(draw); };
  const draw = () => {
    asked = 0;
    if (!scene || !style || !wide) return;
    frames += 1;
    const ratio = canvas.width / wide, { zoom } = camera;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.fillStyle = style.palette.paper;
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    ctx.setTransform(zoom * ratio, 0, 0, zoom * ratio, -camera.x * zoom * ratio, -camera.y * zoom * ratio);
    pen.begin(zoom);
    paintScene(pen, scene, style, { left: camera.x, top: camera.y, right: camera.x + wide / zoom, bottom: camera.y + tall / zoom, zoom });
    drawMap();
    on.place(hitAt(scene, camera.x + wide / 2 / zoom, camera.y + tall / 2 / zoom), camera);
  };
  const mapScale = () => Math.min(map.width / scene.width, map.height / scene.height);
  const drawMap = () => {
    const m = map.getContext("2d"), scale = mapScale();
    const all = scene.width * camera.zoom <= wide && scene.height * camera.zoom <= tall * 1.1;
    map.hidden = all || wide < 380;
    if (map.hidden) return;
    const dx = (map.width - scene.width * scale) / 2, dy = (map.height - scene.height * scale) / 2;
    if (!still) {
      still = document.createElement("canvas");
      still.width = map.width; still.height = map.height;
      const s = still.getContext("2d");
      s.fillStyle = style.palette.box;
      s.fillRect(0, 0, map.width, map.height);
      for (const box of scene.boxes.slice(1, 4000)) {
        if (box.depth > 4) continue;
        const tone = style.tones[box.adaptation >= 0 ? box.adaptation : box.open ? -1 : box.stripes[0]];
        s.fillStyle = tone ? tone.ink : box.open ? style.palette.shade : style.palette.line;
        s.globalAlpha = box.open ? 0.5 : 1;
        s.fillRect(dx + box.x * scale, dy + box.y * scale, Math.max(1, box.w * scale), Math.max(1, box.h * scale));
      }
    }
    m.drawImage(still, 0, 0);
    m.strokeStyle = style.palette.accent;
    m.lineWidth = 2;
    m.strokeRect(dx + camera.x * scale, dy + camera.y * scale, wide / camera.zoom * scale, tall / camera.zoom * scale);
  };
  const clampZoom = (zoom) => Math.max(0.02, Math.min(4, zoom));
  const go = (to) => {
    cancelAnimationFrame(moving);
    if (globalThis.matchMedia("(prefers-reduced-motion: reduce)").matches || document.hidden) { Object.assign(camera, to); ask(); return; }
    const from = { ...camera }, start = performance.now();
    const step = (now) => {
      const t = Math.max(0, Math.min(1, (now - start) / 200)), ease = 1 - (1 - t) ** 3;
      for (const k of ["x", "y", "zoom"]) camera[k] = from[k] + (to[k] - from[k]) * ease;
      ask();
      if (t < 1) moving = requestAnimationFrame(step);
    };
    moving = requestAnimationFrame(step);
  };
  const centred = (x, y, zoom) => ({ x: x - wide / zoom / 2, y: y - tall / zoom / 2, zoom });
  const zoomAt = (px, py, factor) => {
    cancelAnimationFrame(moving);
    const zoom = clampZoom(camera.zoom * factor), x = camera.x + px / camera.zoom, y = camera.y + py / camera.zoom;
    Object.assign(camera, { zoom, x: x - px / zoom, y: y - py / zoom });
    ask();
  };
  const at = (event) => { const r = canvas.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
  const hit = (event) => {
    if (!scene) return null;
    const [px, py] = at(event);
    return hitAt(scene, camera.x + px / camera.zoom, camera.y + py / camera.zoom);
  };

  const down = new Map();
  let dragged = 0;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    down.set(event.pointerId, at(event));
    dragged = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = down.get(event.pointerId), here = at(event);
    if (!last) { const h = hit(event); on.hover(h, here); return; }
    const others = [...down].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
    if (others.length) {
      const o = others[0], before = Math.hypot(last[0] - o[0], last[1] - o[1]), now = Math.hypot(here[0] - o[0], here[1] - o[1]);
      if (before > 0) zoomAt((here[0] + o[0]) / 2, (here[1] + o[1]) / 2, now / before);
    } else {
      cancelAnimationFrame(moving);
      camera.x -= (here[0] - last[0]) / camera.zoom;
      camera.y -= (here[1] - last[1]) / camera.zoom;
      ask();
    }
    dragged += Math.hypot(here[0] - last[0], here[1] - last[1]);
    if (dragged > 4) canvas.classList.add("dragging");
    down.set(event.pointerId, here);
  });
  const up = (event) => {
    if (!down.delete(event.pointerId)) return;
    canvas.classList.remove("dragging");
    if (dragged > 4 || event.type === "pointercancel") return;
    const h = hit(event), [px, py] = at(event);
    if (h && h.toggle) on.toggle(h.box); else on.select(h, [camera.x + px / camera.zoom, camera.y + py / camera.zoom, 7 / camera.zoom]);
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => on.hover(null, [0, 0]));
  canvas.addEventListener("dblclick", (event) => { const h = hit(event); if (h && !h.toggle && h.box.item.kind !== "node") on.toggle(h.box); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const unit = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? tall : 1;
    if (event.shiftKey && !event.ctrlKey) { camera.x += (event.deltaX || event.deltaY) * unit / camera.zoom; ask(); return; }
    zoomAt(...at(event), Math.exp(-Math.max(-240, Math.min(240, event.deltaY * unit)) * (event.ctrlKey ? 0.008 : 0.0018)));
  }, { passive: false });
  map.addEventListener("pointerdown", (event) => {
    const r = map.getBoundingClientRect(), scale = mapScale();
    const x = (event.clientX - r.left - (map.width - scene.width * scale) / 2) / scale, y = (event.clientY - r.top - (map.height - scene.height * scale) / 2) / scale;
    go(centred(x, y, camera.zoom));
  });
  new ResizeObserver(size).observe(host);

  return {
    /** Shows a scene; the box of the anchor's key stays where it was. */
    setScene(next, anchor) {
      const before = scene && anchor && scene.boxes.find((b) => b.key === anchor), after = before && next.boxes.find((b) => b.key === anchor);
      scene = next; still = null;
      if (after) {
        cancelAnimationFrame(moving);
        camera.x += after.x + after.w / 2 - (before.x + before.w / 2);
        camera.y += after.y - before.y;
      }
      ask();
    },
    setStyle(next) { if (style && next.palette !== style.palette) still = null; style = next; ask(); },
    fit() { if (scene && wide) { const zoom = clampZoom(Math.min(1.25, (wide - 20) / scene.width, (tall - 20) / scene.height)); go(centred(scene.width / 2, scene.height / 2, zoom)); } },
    /** Fits the width and shows the top: the first view of a tall graph. */
    fitTop() {
      if (!scene || !wide) return;
      const zoom = clampZoom(Math.min(1.1, (wide - 20) / scene.width, Math.max(0.55, (tall - 20) / scene.height)));
      const room = tall / zoom - scene.height;
      Object.assign(camera, { zoom, x: scene.width / 2 - wide / zoom / 2, y: room > 0 ? -room / 2 : 0 });
      ask();
    },
    /** Moves so that a box is in sight and large enough to read. */
    show(box) {
      if (!box || !wide) return;
      const zoom = clampZoom(Math.max(Math.min(camera.zoom, 1.6), Math.min(0.9, (wide - 40) / box.w)));
      const tallBox = box.h * zoom > tall - 40;
      go({ ...centred(box.x + box.w / 2, box.y + box.h / 2, zoom), ...(tallBox ? { y: box.y - 46 / zoom } : {}) });
    },
    pan(dx, dy) { cancelAnimationFrame(moving); camera.x += dx / camera.zoom; camera.y += dy / camera.zoom; ask(); },
    zoom(factor) { zoomAt(wide / 2, tall / 2, factor); },
    camera: () => ({ ...camera }),
    draw() { if (asked) { cancelAnimationFrame(asked); draw(); } },
    /** Pans to and fro for some milliseconds; resolves to the frames drawn in a second. */
    fps(ms) {
      return new Promise((done) => {
        const start = performance.now(), first = frames, from = { ...camera };
        const step = (now) => {
          const t = now - start;
          camera.x = from.x + Math.sin(t / 150) * 200 / camera.zoom;
          camera.y = from.y + Math.sin(t / 230) * 200 / camera.zoom;
          ask();
          if (t < ms) requestAnimationFrame(step); else { Object.assign(camera, from); ask(); done((frames - first) * 1000 / t); }
        };
        requestAnimationFrame(step);
      });
    },
  };
}

/**
 * The visible boxes as a list, for those who do not see the canvas; it appears when it has the focus.
 * @param {HTMLElement} host
 * @param {{select: (box: object) => void, toggle: (box: object) => void}} on
 * @returns {{show: (scene: object, chosen: string) => void}}
 */
function createBoxList(host, on) {
  const list = el("ul", { role: "listbox", "aria-label": "Visible nodes and groups", tabindex: 0 });
  host.append(el("h2", { text: "Visible nodes and groups" }), el("p", { class: "more", text: "Up and down move, Enter selects, plus opens, minus closes." }), list);
  let boxes = [], at = 0, stale = null;
  const fill = () => {
    if (!stale) return;
    const { scene, chosen } = stale;
    stale = null;
    boxes = scene.boxes.slice(1, 801);
    at = Math.max(0, boxes.findIndex((b) => b.key === chosen));
    list.replaceChildren(...boxes.map((box, k) => {
      const item = el("li", { role: "option", id: `box-${k}`, "aria-selected": String(box.key === chosen), text: boxText(box), on: { click: () => { at = k; on.select(box); } } });
      item.style.paddingInlineStart = `${box.depth * 12}px`;
      return item;
    }));
    if (scene.boxes.length > 801) list.append(el("li", { role: "option", "aria-disabled": "true", "aria-selected": "false", text: `and ${formatNumber(scene.boxes.length - 801)} more` }));
    if (!boxes.length) list.append(el("li", { role: "option", "aria-disabled": "true", "aria-selected": "false", text: "Nothing is shown." }));
  };
  const mark = () => {
    list.querySelector(".active")?.classList.remove("active");
    const item = list.children[at];
    if (!item || !boxes.length) return;
    item.classList.add("active");
    scrollInto(item, host);
    list.setAttribute("aria-activedescendant", item.id);
  };
  list.addEventListener("focus", () => { fill(); mark(); });
  list.addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e6, End: 1e6 }[event.key], box = boxes[at];
    if (move) at = Math.max(0, Math.min(boxes.length - 1, at + move));
    else if (!box) return;
    else if (event.key === "Enter" || event.key === " ") on.select(box);
    else if (box.item.kind !== "node" && ((event.key === "+" && !box.open) || (event.key === "-" && box.open))) on.toggle(box);
    else return;
    mark();
    event.preventDefault();
    event.stopPropagation();
  });
  return {
    /** Tells what is shown; the list is made when it is looked at, or at once for a small scene. */
    show(scene, chosen) {
      stale = { scene, chosen };
      if (scene.boxes.length < 200 || document.activeElement === list) { fill(); mark(); }
    },
  };
}

/**
 * A box in words.
 * @param {object} box
 * @returns {string}
 */
function boxText(box) {
  const state = box.item.kind === "node" ? "" : box.open ? ", open" : ", closed";
  return `${box.lines.map((l) => l.text).join(", ")}${state}`;
}
