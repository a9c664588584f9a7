"use strict";
// The module tree at the left: one list of rows, with the keys of an ARIA tree.

/** More rows than this are not drawn at once. */
const MOST_ROWS = 1500;

/**
 * The module tree.
 * @param {HTMLElement} host
 * @param {object|null} top the TREE of the data
 * @param {object[]} adaptations
 * @param {{select: (path: string) => void, open: (path: string) => void}} on
 * @returns {{show: (path: string) => void}}
 */
function createTree(host, top, adaptations, on) {
  const list = el("ul", { class: "tree", role: "tree", "aria-label": "Modules" });
  host.append(el("h2", { text: "Modules" }), list);
  if (!top || (!top.children.length && !top.name)) {
    list.replaceWith(el("p", { class: "empty", text: "The data has no module tree." }));
    return { show() {} };
  }
  const opened = new Set(), parents = new Map(), byPath = new Map();
  const index = (branch, parent) => {
    for (const stack = [[branch, parent]]; stack.length;) {
      const [at, above] = stack.pop();
      parents.set(at, above);
      for (const path of at.paths) if (!byPath.has(path)) byPath.set(path, at);
      for (const child of at.children) stack.push([child, at]);
    }
  };
  index(top, null);
  const start = top.name ? [top] : top.children;
  for (let at = start.length === 1 ? start[0] : start.find((t) => t.children.length); at && opened.size < 3; at = at.children.length === 1 ? at.children[0] : null) opened.add(at);
  let rows = [], current = null, chosen = null, typed = "", typedAt = 0;

  const rowOf = (branch, level, size, place) => {
    const held = new Map();
    for (const stack = [branch]; stack.length;) {
      const at = stack.pop();
      for (const a of at.added || []) held.set(a.adaptation, true);
      stack.push(...at.children);
      if (held.size === adaptations.length) break;
    }
    const marks = adaptations.map((a, i) => held.has(a.name) ? el("span", { class: `swatch tone-${i}`, title: `Holds ${shorten(a.name, 40)}` }, el("span", { class: "unseen", text: `, ${shorten(a.name, 40)}` })) : null);
    const row = el("li", {
      role: "treeitem", class: "row", tabindex: -1, "aria-level": level, "aria-setsize": size, "aria-posinset": place,
      "aria-expanded": branch.children.length ? String(opened.has(branch)) : null, "aria-selected": String(branch === chosen),
      title: shorten(branch.paths[0] || branch.name, 200),
    },
    el("span", { class: "twist", "aria-hidden": "true", text: branch.children.length ? (opened.has(branch) ? "\u25be" : "\u25b8") : "" }),
    el("span", { class: "name", text: shorten(branch.name || "(model)", 60) }),
    branch.paths.length > 1 ? el("span", { class: "times", text: `\u00d7 ${branch.paths.length}` }) : null,
    ...marks,
    el("span", { class: "figure", text: branch.base_parameters ? formatShort(branch.base_parameters) : "", title: `${formatNumber(branch.base_parameters)} base parameters, ${formatNumber(branch.trainable_parameters)} trainable` }));
    row.style.paddingInlineStart = `${4 + (level - 1) * 14}px`;
    row.addEventListener("click", (event) => {
      current = branch;
      if (event.target.classList.contains("twist")) toggle(branch);
      else choose(branch);
    });
    row.addEventListener("dblclick", () => on.open(branch.paths[0]));
    return row;
  };
  const draw = (focus) => {
    rows = [];
    const walk = (branches, level) => branches.forEach((branch, k) => {
      if (rows.length >= MOST_ROWS) return;
      rows.push({ branch, row: rowOf(branch, level, branches.length, k + 1) });
      if (opened.has(branch) && level < 100) walk(branch.children, level + 1);
    });
    walk(start, 1);
    list.replaceChildren(...rows.map((r) => r.row));
    if (rows.length >= MOST_ROWS) list.append(el("li", { class: "empty", role: "none", text: "More modules are not listed; use the search." }));
    if (!rows.some((r) => r.branch === current)) current = rows[0].branch;
    const at = rows.find((r) => r.branch === current);
    at.row.tabIndex = 0;
    if (focus) at.row.focus();
  };
  const toggle = (branch) => {
    if (!branch.children.length) return;
    if (!opened.delete(branch)) opened.add(branch);
    draw(true);
  };
  const mark = () => { for (const r of rows) r.row.setAttribute("aria-selected", String(r.branch === chosen)); };
  const choose = (branch) => { chosen = branch; mark(); move(branch); on.select(branch.paths[0]); };
  const move = (branch) => {
    for (const r of rows) r.row.tabIndex = r.branch === branch ? 0 : -1;
    current = branch;
    rows.find((r) => r.branch === branch)?.row.focus();
  };
  list.addEventListener("keydown", (event) => {
    const at = rows.findIndex((r) => r.branch === current), { branch } = rows[at] || {};
    if (!branch || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = (k) => { if (rows[k]) move(rows[k].branch); };
    const keys = {
      ArrowDown: () => step(at + 1), ArrowUp: () => step(at - 1), Home: () => step(0), End: () => step(rows.length - 1),
      ArrowRight: () => { if (branch.children.length && !opened.has(branch)) toggle(branch); else if (branch.children.length) step(at + 1); },
      ArrowLeft: () => { if (opened.has(branch) && branch.children.length) toggle(branch); else if (rows.some((r) => r.branch === parents.get(branch))) move(parents.get(branch)); },
      Enter: () => choose(branch), " ": () => choose(branch),
    };
    if (keys[event.key]) keys[event.key]();
    else if (event.key.length === 1 && !"/+-[]".includes(event.key)) {
      typed = event.timeStamp - typedAt > 700 ? event.key : typed + event.key;
      typedAt = event.timeStamp;
      const order = [...rows.slice(at + (typed.length > 1 ? 0 : 1)), ...rows.slice(0, at + 1)];
      const found = order.find((r) => r.branch.name.toLowerCase().startsWith(typed.toLowerCase()));
      if (found) move(found.branch);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  draw(false);
  return {
    /** Marks the module of a path, with its parents opened. */
    show(path) {
      if (!path) { chosen = null; mark(); return; }
      let branch = byPath.get(path);
      for (let at = path; !branch && at; at = at.slice(0, Math.max(0, at.lastIndexOf(".")))) branch = byPath.get(at);
      if (!branch) branch = like(byPath, path);
      chosen = branch || null;
      for (let above = branch && parents.get(branch); above; above = parents.get(above)) opened.add(above);
      if (branch) current = branch;
      const inside = list.contains(document.activeElement);
      draw(inside);
      scrollInto(rows.find((r) => r.branch === branch)?.row, host.parentElement);
    },
  };
}

/**
 * The branch of a path whose layer number stands for alike ones.
 * @param {Map<string, object>} byPath
 * @param {string} path
 * @returns {object|undefined}
 */
function like(byPath, path) {
  for (let at = path.length; at > 0; at = path.lastIndexOf(".", at - 1)) {
    const branch = byPath.get(path.slice(0, at));
    if (branch) return byPath.get(branch.paths[0] + path.slice(at)) || branch;
  }
  return undefined;
}

/**
 * The branch of the tree that a module path stands for; alike layers share one.
 * @param {object|null} top
 * @param {string} path
 * @returns {object|null}
 */
function branchAt(top, path) {
  let at = top;
  while (at) {
    if (at.paths.includes(path)) return at;
    const next = at.children.find((child) => child.paths.some((p) => path === p || path.startsWith(`${p}.`)));
    if (!next) return null;
    const own = next.paths.find((p) => path === p || path.startsWith(`${p}.`));
    if (own !== next.paths[0]) path = next.paths[0] + path.slice(own.length); // children are those of the first path
    at = next;
  }
  return null;
}
