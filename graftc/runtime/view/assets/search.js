"use strict";
// The search box: nodes, modules and adaptations, where names of alike layers are put together.

/**
 * What a query finds, best first; names that differ in numbers only are counted as one.
 * @param {{text: string, kind: string, pattern: string, lower: string, value: *}[]} entries
 * @param {string} query words that must all occur
 * @param {number} most
 * @returns {{entry: object, count: number, score: number}[]}
 */
function searchEntries(entries, query, most = 40) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean), found = new Map();
  if (!words.length) return [];
  for (const entry of entries) {
    let score = 0;
    for (const word of words) {
      const at = entry.lower.indexOf(word);
      if (at < 0) { score = -1; break; }
      score += at === 0 || ".:_ ".includes(entry.lower[at - 1]) ? 2 : 1;
      if (entry.lower.length === word.length) score += 6;
    }
    if (score < 0) continue;
    score += { adaptation: 3, module: 2, node: 1, operator: 0 }[entry.kind] - Math.min(1.5, entry.text.length / 80);
    const exact = entry.lower === query.toLowerCase().trim(), key = exact ? entry.lower : entry.kind + entry.pattern, known = found.get(key);
    if (known) known.count += 1; else found.set(key, { entry, count: 1, score: exact ? score + 20 : score });
  }
  return [...found.values()].sort((a, b) => b.score - a.score).slice(0, most);
}

/**
 * What can be found in a model.
 * @param {object} model
 * @param {object[]} adaptations
 * @returns {object[]}
 */
function entriesOf(model, adaptations) {
  const entry = (kind, text, more, value, like = "") => {
    const cut = text.length > 400 ? text.slice(0, 400) : text;
    return { kind, text, more, value, lower: `${cut} ${more}`.trim().toLowerCase(), pattern: `${cut.replace(/\d+/g, "#")} ${like}` };
  };
  const all = adaptations.map((a, i) => entry("adaptation", String(a.name), String(a.method || ""), { kind: "adaptation", index: i }));
  for (const group of model.groups) if (group.path) all.push(entry("module", group.path, "", { kind: "group", key: group.path }));
  for (let i = 0; i < model.count; i++) {
    const op = model.nodes.op[i];
    all.push(entry("node", textOf(model, "name", i), op === CALL ? operatorName(textOf(model, "target", i)) : ["input", "tensor", "", "output"][op], { kind: "node", node: i }, textOf(model, "type", i)));
  }
  return all;
}

/**
 * Wires the search box.
 * @param {HTMLInputElement} input
 * @param {HTMLElement} list
 * @param {() => object[]} entries
 * @param {(value: object) => void} choose
 */
function createSearch(input, list, entries, choose) {
  let found = [], active = -1;
  const close = () => { list.hidden = true; active = -1; input.setAttribute("aria-expanded", "false"); input.removeAttribute("aria-activedescendant"); };
  const mark = (k) => {
    active = k;
    [...list.children].forEach((li, i) => li.setAttribute("aria-selected", String(i === k)));
    if (k >= 0) { input.setAttribute("aria-activedescendant", `found-${k}`); list.children[k].scrollIntoView({ block: "nearest" }); }
  };
  const take = (k) => {
    if (!found[k]) return;
    close();
    input.value = "";
    input.blur();
    choose(found[k].entry.value);
  };
  const look = () => {
    found = searchEntries(entries(), input.value);
    list.replaceChildren(...found.map((f, k) => el("li", { role: "option", id: `found-${k}`, "aria-selected": "false", on: { mousedown: (e) => { e.preventDefault(); take(k); } } },
      el("span", { class: "kind", text: f.entry.kind }), el("span", { class: "what", text: shorten(f.entry.text, 60) }),
      el("span", { class: "more", text: [f.entry.more, f.count > 1 ? `${f.count} alike` : ""].filter(Boolean).join(", ") }))));
    if (!found.length && input.value.trim()) list.append(el("li", { role: "option", "aria-disabled": "true", "aria-selected": "false", class: "empty", text: "Nothing has this name." }));
    list.hidden = !input.value.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    if (found.length) mark(0);
  };
  input.addEventListener("input", look);
  input.addEventListener("focus", () => { if (input.value.trim()) look(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && found.length) mark((active + 1) % found.length);
    else if (event.key === "ArrowUp" && found.length) mark((active - 1 + found.length) % found.length);
    else if (event.key === "Enter") take(Math.max(0, active));
    else if (event.key === "Escape") { input.value = ""; close(); input.blur(); } else return;
    event.preventDefault();
    event.stopPropagation();
  });
}
