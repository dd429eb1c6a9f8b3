// The page's only script. Text from the trace is only ever set as textContent, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const CHUNK = 100;

function el(tag, attributes, ...children) {
  const node = tag === "svg" || SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null && value !== false) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const SVG = new Set(["svg", "path", "line", "circle", "rect", "text", "g", "title"]);
const DASH = "\u2013";
const number = (v, digits) => v === null || v === undefined ? DASH : digits === undefined ? short(v) : v.toFixed(digits);
function short(v) {
  if (Number.isInteger(v)) return v.toLocaleString("en");
  const size = Math.abs(v);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? v.toExponential(1) : String(Number(v.toPrecision(3)));
}
function signed(v) {
  if (v === null || v === undefined) return DASH;
  const size = Math.abs(v).toFixed(3);
  return (Number(size) === 0 ? "" : v < 0 ? "\u2212" : "+") + size;
}
// Blanks and line ends of a token are shown; other control characters have no picture of their own.
// What has no picture at all, or would turn the text around, is shown by its number.
const numbered = (text) => [...text].map((c) => "\u27e8" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9").join("");
const visible = (text) => text === "" ? "\u2205" : /^\s+$/.test(text) && !/^[\ufeff\u2028\u2029]+$/.test(text) ? text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423")
  : /^[\p{Cf}\p{Mn}\u2028\u2029\ufe0f]+$/u.test(text) ? numbered(text) : text.replace(/[\u0000-\u001f\u007f]/g, "\ufffd").replace(/[\u202a-\u202e\u2066-\u2069]/g, numbered);
const LONGEST = 60;
const word = (i) => { const text = [...visible(data.words[i])]; return text.length > LONGEST ? text.slice(0, LONGEST).join("") + "\u2026" : text.join(""); };
const token = (i, tag) => el(tag || "span", {class: "w", dir: "auto", title: data.words[i].length > LONGEST ? data.words[i].slice(0, 500) : null}, word(i));
const paramName = (p) => data.params[p][1];
const unit = (n) => (n.a === "in" ? "column " : "row ") + n.n;
const keyOf = (n) => data.params[n.p][0] + "~" + n.a + "~" + n.n;
const byKey = new Map(data.neurons.map((n, i) => [keyOf(n), i]));

// --- State: all of it in the address, so that a link or a reload shows the same ---------------------------------------

const MEASURES = {
  m: ["shift (sum of |s|)", (n) => n.m],
  v: ["evidence (\u2212log10 q of its best word)", (n) => n.v],
  r: ["flips against random samples", (n) => n.c.random ? n.c.random[2] : null],
};
const COLUMNS = [
  ["name", "neuron", (n) => n.p * 1e7 + n.n, false],
  ["t", "notable words", (n) => n.t.length, false],
  ["s", "samples", (n) => n.s, true],
  ["m", "shift", (n) => n.m, true],
  ["v", "evidence", (n) => n.v, true],
  ["r", "flips", MEASURES.r[1], true],
].filter(([id, , value]) => ["name", "t", "s"].includes(id) || data.neurons.some((n) => value(n) !== null));
// At first by evidence: a neuron to which every sample is attributed has many words, and they say nothing.
const state = {n: "", q: "", p: "", sort: COLUMNS.some(([id]) => id === "v") ? "v" : "", dir: "desc", colour: ""};
const usual = {...state};

function readState() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return false; // a link to a section
  const given = new URLSearchParams(hash);
  for (const name of Object.keys(state)) state[name] = given.get(name) ?? usual[name];
  if (!COLUMNS.some(([id]) => id === state.sort)) state.sort = usual.sort;
  if (!["asc", "desc"].includes(state.dir)) state.dir = "desc";
  if (!byKey.has(state.n)) state.n = "";
  if (!data.params[state.p]) state.p = "";
  if (!colours.includes(state.colour)) state.colour = colours[0] || "";
  return true;
}
function hashOf(change) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries({...state, ...change})) if (value !== usual[name] && !(name === "colour" && value === colours[0])) given.set(name, value);
  return "#" + (given.toString() || "=");
}
function go(change, replace) {
  const hash = hashOf(change);
  if (replace) { history.replaceState(null, "", hash); update(); } else if (location.hash === hash) update(); else location.hash = hash;
}

// --- List -----------------------------------------------------------------------------------------------------------

let shown = [], filled = 0;
const searched = data.neurons.map((n) => [data.params[n.p][0], paramName(n.p), unit(n), n.a, ...n.t.map((i) => data.words[i])].join("\n").toLowerCase());

function filterList() {
  const parts = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  shown = data.neurons.map((_, i) => i).filter((i) => (state.p === "" || data.neurons[i].p === Number(state.p)) && parts.every((part) => searched[i].includes(part)));
  const column = COLUMNS.find(([id]) => id === state.sort);
  if (column) {
    const sign = state.dir === "asc" ? 1 : -1, value = column[2];
    const last = (v) => v === null || v === undefined;
    shown.sort((a, b) => {
      const x = value(data.neurons[a]), y = value(data.neurons[b]);
      return last(x) || last(y) ? last(x) - last(y) || a - b : sign * (x - y) || a - b;
    });
  }
}
function drawHead() {
  const row = $("list").tHead.rows[0];
  row.replaceChildren(...COLUMNS.map(([id, text, , right]) => {
    const on = state.sort === id;
    const button = el("button", {type: "button", id: "sort-" + id}, text);
    button.onclick = () => go({sort: id, dir: on && state.dir === "desc" ? "asc" : "desc"}, true);
    return el("th", {scope: "col", class: right ? "n" : null, "aria-sort": on ? state.dir + "ending" : "none"}, button);
  }));
}
function drawRows(from, to) {
  const rows = shown.slice(from, to).map((i, k) => {
    const n = data.neurons[i], key = keyOf(n), chosen = state.n ? key === state.n : i === shown[0];
    const link = el("a", {href: hashOf({n: key}), "aria-current": chosen ? "true" : null}, paramName(n.p) + " " + unit(n));
    const words = el("td", {class: "tokens"});
    n.t.slice(0, 8).forEach((t, j) => words.append(...(j ? [" "] : []), token(t)));
    if (n.t.length > 8) words.append(" +" + (n.t.length - 8));
    const cells = COLUMNS.slice(2).map(([id, , value]) => el("td", {class: "n"}, id === "r" ? signed(value(n)) : number(value(n))));
    return el("tr", {class: chosen ? "chosen" : null, "aria-rowindex": from + k + 2}, el("th", {scope: "row"}, link), words, ...cells);
  });
  $("list").tBodies[0].append(...rows);
  filled = Math.min(to, shown.length);
  $("more").parentNode.hidden = filled >= shown.length;
}
function drawList(atLeast) {
  filterList();
  $("list").setAttribute("aria-rowcount", shown.length + 1);
  $("list").tBodies[0].replaceChildren();
  drawHead();
  drawRows(0, Math.max(CHUNK, atLeast || 0));
  $("count").textContent = shown.length === data.neurons.length ? `${short(shown.length)} neurons` : `${short(shown.length)} of ${short(data.neurons.length)} neurons`;
  if (!shown.length) $("list").tBodies[0].append(el("tr", {}, el("td", {colspan: COLUMNS.length}, data.neurons.length ? "No neuron matches." : "No neuron has selected entries under the thresholds of this analysis.")));
}
$("more").onclick = () => {
  const first = filled;
  drawRows(filled, filled + CHUNK);
  $("list").tBodies[0].rows[first]?.querySelector("a")?.focus(); // the button may be gone
};
new IntersectionObserver((seen) => { if (seen.some((s) => s.isIntersecting) && document.activeElement !== $("more")) drawRows(filled, filled + CHUNK); }).observe($("more"));

// --- One neuron -----------------------------------------------------------------------------------------------------

const CONTROLS = [["random", "random samples"], ["neuron", "other neurons"], ["frequency", "other tokens"], ["null", "permuted links"]];

function table(caption, head, rows, texts = [0]) {
  const cells = (row, tag) => row.map((cell, i) => el(tag === "th" || i === 0 ? "th" : "td", {scope: tag === "th" ? "col" : i === 0 ? "row" : null, class: texts.includes(i) ? null : "n"}, cell));
  return el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...cells(head, "th"))), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row, "td")))));
}
const scrolling = (label, ...inside) => el("div", {class: "wide", tabindex: "0", role: "region", "aria-label": label}, ...inside);
function drawDetail() {
  const box = $("detail"), n = data.neurons[byKey.get(state.n) ?? shown[0]]; // without a choice the first one
  if (!n) {
    box.replaceChildren(el("h3", {id: "detail-title"}, "No neuron"), el("p", {class: "note"}, "A neuron of the list is shown here: its words, its samples, when it moved, and what happens without it."));
    return;
  }
  const facts = [`${short(n.e)} kept entries`, `${short(n.s)} samples`];
  if (n.m !== null) facts.push(`moved by ${short(n.m)} in all`);
  if (n.v !== null) facts.push(`evidence ${short(n.v)}`);
  const words = el("p", {});
  n.t.forEach((t, j) => words.append(...(j ? [" "] : []), token(t, "mark")));
  box.replaceChildren(
    el("h3", {id: "detail-title"}, `${paramName(n.p)} ${unit(n)}`),
    el("p", {class: "note"}, `${data.params[n.p][0]}; ${facts.join(", ")}`),
    el("h4", {}, "Notable words"), n.t.length ? words : el("p", {class: "note"}, "None under these thresholds."),
  );
  if (n.l.length > 1) box.append(el("h4", {}, "When it moved"), bars(data.bins, n.l, `Recorded movement of ${paramName(n.p)} ${unit(n)} over the steps`));
  const side = el("div", {class: "tables"});
  if (n.f.length) side.append(flipTable(n));
  const known = CONTROLS.filter(([id]) => n.c[id]);
  if (known.length) side.append(scrolling("Controls of this neuron", table("Flip proportion of its words against controls", ["control", "neuron", "on control", "difference", "95 % interval"], known.map(([id, text]) => {
    const [value, control, effect, low, high] = n.c[id];
    return [text, number(value, 3), number(control, 3), signed(effect), low === null ? DASH : `${signed(low)} to ${signed(high)}`];
  }))));
  if (side.children.length) box.append(el("h4", {}, "Switched off"), side);
  else box.append(el("p", {class: "note"}, "Not switched off. For flips and controls the report needs the model (--model); --ablate says of how many neurons."));
  if (n.x.length) drawSamples(box, n);
}
function flipTable(n) {
  const notable = new Set(n.t);
  const flips = table("Flipped predictions; notable words are marked", ["token", "flips", "count", "proportion"], n.f.map(([w, flips, count]) => [token(w, notable.has(w) ? "mark" : "span"), short(flips), short(count), count ? (flips / count).toFixed(3) : DASH]));
  [...flips.tBodies[0].rows].slice(12).forEach((row) => { row.hidden = true; });
  const box = scrolling("Flipped predictions of this neuron", flips);
  if (n.f.length > 12) {
    const button = el("button", {type: "button"}, `Show all ${n.f.length}`);
    button.onclick = () => { [...flips.tBodies[0].rows].forEach((row) => { row.hidden = false; }); button.remove(); };
    box.append(button);
  }
  return box;
}
function drawSamples(box, n) {
  const notable = new Set(n.t), list = el("ol", {class: "samples"});
  box.append(el("h4", {}, "Samples that moved it most"), list);
  const add = (from, to) => list.append(...n.x.slice(from, to).map(([id, moved]) => {
    const text = el("div", {class: "text"}), words = data.texts[id];
    (words || []).forEach((w, j) => text.append(...(j ? [" "] : []), notable.has(w) ? token(w, "mark") : token(w)));
    if (!words) text.append(el("span", {class: "note"}, "no text stored"));
    return el("li", {tabindex: "-1"}, el("span", {class: "note"}, `sample ${id}, moved it by ${number(moved)}`), text);
  }));
  add(0, 5);
  if (n.x.length > 5) {
    const button = el("button", {type: "button"}, `Show ${n.x.length - 5} more samples`);
    button.onclick = () => { add(5, n.x.length); button.remove(); list.children[5].focus(); };
    box.append(button);
  }
}

// --- Charts ---------------------------------------------------------------------------------------------------------

function drawEffects() {
  const names = new Map(CONTROLS), rows = data.effects.filter(([, effect]) => effect !== null).map(([id, ...v]) => [names.get(id) || id, ...v]);
  if (!rows.length) return;
  const said = rows.map(([name, effect, a, b]) => `${name} ${signed(effect)}` + (a === null ? "" : `, ${signed(a)} to ${signed(b)}`)).join("; ");
  $("effects").append(el("figure", {}, forest(rows, `Flips of its words minus those of each control: ${said}`), el("figcaption", {}, "A neuron switched off minus each control: mean over neurons, 95 % interval; right of 0 is more than the control. Rate of flips at its words; for permuted links the share of its words among the flipped.")));
}
function drawCharts() {
  const [x, y] = data.loss, box = $("charts");
  if (x.length) {
    const what = data.changes.length ? `, ${data.changes.length} change points (dashed)` : "";
    const [svg, X, Y, bottom, top] = frame(`Training loss, from ${number(y[0])} to ${number(y[y.length - 1])}${what}`, span(x), span(y), ["step", "loss"]);
    svg.append(el("path", {class: "line", d: "M" + y.map((v, i) => `${X(x[i]).toFixed(1)} ${Y(v).toFixed(1)}`).join("L")}));
    for (const [at, before, after] of data.changes) svg.append(el("line", {class: "change", x1: X(at), x2: X(at), y1: top, y2: bottom}, el("title", {}, `step ${at}: from ${number(before)} to ${number(after)}`)));
    box.append(el("figure", {}, svg, el("figcaption", {}, `Loss by step${what}`)));
    if (data.changes.length) box.lastChild.append(fold("Change points as a table", table("Change points of the loss", ["step", "mean before", "mean after"], data.changes.map((row) => row.map((v) => number(v))))));
  } else box.append(el("p", {class: "note"}, "No loss was recorded."));
  if (data.phases.length) {
    const note = "Change points of the loss, of movement, sparsity and norms by parameter. Series share the run's randomness, and a steady drift is a staircase of changes: read the number beside what is expected by chance.";
    const what = `Phases: series that change together, of ${number(data.phases[0][3])}; ${number(data.phases[0][4])} by chance (dashed)`;
    const rows = data.phases.map((row) => row.map((v) => typeof v === "number" ? number(v) : v.replaceAll("_", " ")));
    const listed = table("Phases", ["from step", "to step", "series that change", "of", "by chance", "which"], rows, [0, 5]);
    $("phases").append(el("figure", {}, phaseBars(data.phases, x, what), el("figcaption", {}, what)), fold("Phases as a table", el("p", {class: "note"}, note), listed));
  }
  const [at, residual] = data.residual, log = residual.map((v) => Math.log10(Math.max(v, 1e-12)));
  if (at.length) {
    const [low, high] = span(log), [svg, X, Y] = frame(`Residual of the ledger, largest ${number(span(residual)[1])}`, span(at), [Math.floor(Math.min(low, -7)), Math.ceil(Math.max(high, -5))], ["step", "relative residual"], (v) => "1e" + v);
    log.forEach((v, i) => svg.append(el("circle", {class: "dot", r: 2.5, cx: X(at[i]).toFixed(1), cy: Y(v).toFixed(1)})));
    box.append(el("figure", {}, svg, el("figcaption", {}, `Relative residual of the ledger at ${short(at.length)} checked steps; largest ${number(span(residual)[1])}`)));
  } else box.append(el("p", {class: "note"}, "The ledger was never computed."));
}
const fold = (title, ...inside) => el("details", {}, el("summary", {}, title), ...inside);

// --- Map ------------------------------------------------------------------------------------------------------------

const rowsOfMap = (() => {
  const rows = new Map(data.map.map((row) => [row.p + row.a, {...row}]));
  for (const n of data.neurons) if (!rows.has(n.p + n.a)) rows.set(n.p + n.a, {p: n.p, a: n.a, m: null});
  for (const row of rows.values()) {
    row.own = new Map(data.neurons.map((n, i) => [n, i]).filter(([n]) => n.p === row.p && n.a === row.a).map(([n, i]) => [n.n, i]));
    row.size = Math.max(row.m ? row.m.length : 0, ...[...row.own.keys()].map((k) => k + 1));
  }
  return [...rows.values()].sort((a, b) => a.p - b.p || a.a.localeCompare(b.a));
})();
const colours = Object.keys(MEASURES).filter((id) => data.neurons.some((n) => MEASURES[id][1](n) !== null) || (id === "m" && data.map.length));
const CELL = 24;
let cursor = [0, 0];

const valueAt = (row, k) => state.colour === "m" && row.m ? row.m[k] ?? null : row.own.has(k) ? MEASURES[state.colour][1](data.neurons[row.own.get(k)]) : null;
function mix(share) {
  const style = getComputedStyle(document.documentElement), hex = (name) => style.getPropertyValue(name).trim().match(/\w\w/g).map((h) => parseInt(h, 16));
  const [a, b] = [hex("--low"), hex("--high")];
  return `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * share)).join()})`;
}
function drawMap() {
  const canvas = $("map"), rows = rowsOfMap;
  $("map-section").hidden = !rows.length || !colours.length;
  if ($("map-section").hidden) return;
  $("map-names").replaceChildren(...rows.map((row) => el("div", {}, paramName(row.p) + (row.a === "out" ? " rows" : ""), el("span", {}, ` ${short(row.size)}`))));
  const width = Math.max(200, canvas.parentNode.clientWidth - $("map-names").offsetWidth - 20), height = rows.length * CELL, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), shades = Array.from({length: 65}, (_, i) => mix(i / 64));
  pen.scale(ratio, ratio);
  let top = 0;
  for (const row of rows) for (let k = 0; k < row.size; k++) top = Math.max(top, valueAt(row, k) ?? 0);
  rows.forEach((row, r) => {
    const size = width / row.size, step = Math.max(1, Math.ceil(1 / size));
    for (let k = 0; k < row.size; k += step) { // of several neurons in one pixel the largest is drawn
      let v = null, own = false;
      for (let j = k; j < Math.min(k + step, row.size); j++) { const w = valueAt(row, j); if (w !== null && (v === null || w > v)) v = w; own ||= row.own.has(j); }
      pen.fillStyle = v === null ? style.getPropertyValue("--card") : shades[top > 0 ? Math.round(64 * Math.sqrt(Math.max(0, v) / top)) : 0];
      pen.fillRect(k * size, r * CELL + 1, Math.max(1, size * step - (size > 3 ? 1 : 0)), CELL - 3);
      if (own && size > 3) { pen.strokeStyle = style.getPropertyValue("--contrast"); pen.lineWidth = 1; pen.strokeRect(k * size + .5, r * CELL + 1.5, size - 2, CELL - 4); }
    }
  });
  const [r, k] = cursor, size = width / rows[r].size;
  if (document.activeElement === canvas) { pen.strokeStyle = style.getPropertyValue("--ink"); pen.lineWidth = 2; pen.strokeRect(k * size - 1, r * CELL, Math.max(4, size + 1), CELL - 1); }
  const legend = $("legend").getContext("2d");
  shades.forEach((shade, i) => { legend.fillStyle = shade; legend.fillRect(i * 120 / 65, 0, 3, 10); });
  $("legend-low").textContent = "0"; $("legend-high").textContent = number(top) + " (square root scale)";
}
function describe() {
  const row = rowsOfMap[cursor[0]], k = cursor[1], i = row.own.get(k), v = valueAt(row, k);
  const words = i === undefined ? "not in the list" : data.neurons[i].t.slice(0, 6).map(word).join(" ") || "no notable words";
  $("map-cell").textContent = `${paramName(row.p)} ${unit({a: row.a, n: k})}: ${number(v)}; ${words}`;
}
function cellAt(event) {
  const box = $("map").getBoundingClientRect(), r = Math.min(rowsOfMap.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / CELL)));
  return [r, Math.min(rowsOfMap[r].size - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * rowsOfMap[r].size)))];
}
function openCell() {
  const i = rowsOfMap[cursor[0]].own.get(cursor[1]);
  if (i !== undefined) open(i);
}
function open(i) { go({n: keyOf(data.neurons[i])}); focusDetail = true; }
let focusDetail = false;
$("map").onmousemove = (event) => { cursor = cellAt(event); describe(); };
$("map").onclick = (event) => { cursor = cellAt(event); describe(); openCell(); };
$("map").onfocus = () => { describe(); drawMap(); };
$("map").onblur = drawMap;
$("map").onkeydown = (event) => {
  const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e9], End: [0, 1e9]}[event.key];
  if (event.key === "Enter") return openCell();
  if (!move) return;
  event.preventDefault();
  const r = Math.min(rowsOfMap.length - 1, Math.max(0, cursor[0] + move[0]));
  cursor = [r, Math.min(rowsOfMap[r].size - 1, Math.max(0, cursor[1] + move[1]))];
  describe(); drawMap();
};

// --- Start ----------------------------------------------------------------------------------------------------------

let drawn = null;
function update() {
  if (!readState()) return;
  const list = JSON.stringify([state.q, state.p, state.sort, state.dir]);
  const focused = document.activeElement?.id;
  // The same rows, another neuron: keep those that were unfolded.
  drawList(drawn === list ? filled : 0);
  drawn = list;
  if (focused && focused.startsWith("sort-")) $(focused)?.focus();
  if ($("search").value !== state.q) $("search").value = state.q;
  $("param").value = state.p;
  $("colour").value = state.colour;
  drawDetail();
  drawMap();
}
window.addEventListener("hashchange", (event) => {
  const before = state.n;
  update();
  if (state.n && state.n !== before) { $("detail").focus({preventScroll: true}); $("detail").scrollTop = 0; if (matchMedia("(max-width: 70rem)").matches || focusDetail) $("detail").scrollIntoView({block: "nearest"}); }
  focusDetail = false;
});
window.addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
let waiting = 0;
$("search").oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => go({q: $("search").value}, true), 120); };
$("param").onchange = () => go({p: $("param").value}, true);
$("colour").onchange = () => go({colour: $("colour").value}, true);
$("param").append(el("option", {value: ""}, "all"), ...data.params.map(([, name], p) => [name, p]).filter(([, p]) => data.neurons.some((n) => n.p === p)).map(([name, p]) => el("option", {value: p}, name)));
$("colour").append(...colours.map((id) => el("option", {value: id}, MEASURES[id][0])));

const run = new Map(data.run);
for (const name of ["model", "optimizer", "steps", "occurrences", "trace", "ledger, largest residual"]) if (run.has(name)) $("facts").append(el("li", {}, el("span", {}, name), run.get(name)));
drawEffects();
drawCharts();
const pooled = data.pooled.map((r) => [r.control, r.measure, r.neurons, r.value, r.control_value, r.effect]);
$("pooled").append(pooled.length ? scrolling("Controls", table("Controls, averaged over neurons", ["control", "measure", "neurons", "value", "on control", "difference [95 % interval]"], pooled, [0, 1])) : el("p", {class: "note"}, "No neuron was switched off in this report."));
if (data.layers.length) $("layers").append(scrolling("Layers", table("Layers: distinct flipped tokens, and the share of them that was notable beforehand", ["parameter", "neurons", "mean flipped tokens", "notable share"], data.layers.map((r) => [r.param, r.neurons, r.flipped, r.share]))));
update();
document.documentElement.dataset.ready = Math.round(performance.now()) + " ms";
