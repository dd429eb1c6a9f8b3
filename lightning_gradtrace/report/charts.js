"use strict";
// The charts of the page: functions of numbers that return elements; `page.js` has the helpers that they use.

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2 || 1)), size = [1, 2, 5, 10].map((f) => f * step).find((s) => (high - low) / s <= 4) || step;
  const found = [];
  for (let v = Math.ceil(low / size) * size; v <= high + size * 1e-9; v += size) found.push(Number(v.toPrecision(10)));
  return found;
}
function frame(label, x, y, [nameX, nameY], write) {
  const W = 520, H = 215, L = 52, R = 10, T = 24, B = 38;
  const X = (v) => L + (W - L - R) * (v - x[0]) / (x[1] - x[0] || 1), Y = (v) => H - B - (H - B - T) * (v - y[0]) / (y[1] - y[0] || 1);
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label});
  for (const v of ticks(...y)) svg.append(el("line", {class: "axis", x1: L, x2: W - R, y1: Y(v), y2: Y(v)}), el("text", {x: L - 6, y: Y(v) + 4, "text-anchor": "end"}, write ? write(v) : short(v)));
  for (const v of ticks(...x)) svg.append(el("text", {x: X(v), y: H - B + 16, "text-anchor": "middle"}, short(v)));
  svg.append(el("text", {x: 0, y: 12}, nameY), el("text", {x: W - R, y: H - 4, "text-anchor": "end"}, nameX));
  return [svg, X, Y, H - B, T];
}
const span = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);

function bars(x, y, label) {
  const width = x.length > 1 ? x[1] - x[0] : 1, [svg, X, Y, bottom] = frame(label, [x[0], x[x.length - 1] + width], [0, span(y)[1] || 1], ["step", "sum of |s|"]);
  const d = y.map((v, i) => `M${X(x[i]).toFixed(1)} ${bottom}V${Y(v).toFixed(1)}H${Math.max(X(x[i]) + 1, X(x[i] + width) - 1).toFixed(1)}V${bottom}Z`).join("");
  svg.append(el("path", {class: "bar", d}));
  return el("figure", {}, svg, el("figcaption", {}, `Sum of the recorded |shift| per ${short(width)} steps; largest ${number(span(y)[1])}`));
}
// One line per row: a value with its interval, against zero.
function forest(rows, label) {
  const W = 520, L = 118, R = 12, LINE = 26, H = rows.length * LINE + 34, bounds = span(rows.flatMap(([, ...v]) => v).filter((v) => v !== null).concat(0));
  const pad = (bounds[1] - bounds[0]) * .08 || 1, [low, high] = [bounds[0] - pad, bounds[1] + pad], X = (v) => L + (W - L - R) * (v - low) / (high - low);
  const svg = el("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label});
  for (const v of ticks(low, high)) svg.append(el("line", {class: "axis", x1: X(v), x2: X(v), y1: 4, y2: H - 30}), el("text", {x: X(v), y: H - 14, "text-anchor": "middle"}, short(v)));
  svg.append(el("line", {class: "zero", x1: X(0), x2: X(0), y1: 4, y2: H - 30}));
  rows.forEach(([name, effect, a, b], i) => {
    const y = 4 + LINE * (i + .5);
    svg.append(el("text", {x: L - 10, y: y + 4, "text-anchor": "end"}, name));
    if (a !== null && b !== null) svg.append(el("line", {class: "interval", x1: X(a), x2: X(b), y1: y, y2: y}));
    if (effect !== null) svg.append(el("circle", {class: "dot", r: 4.5, cx: X(effect), cy: y}));
  });
  return svg;
}
// Where several series change together: a bar per phase, over what chance brings together.
function phaseBars(phases, steps, label) {
  const middle = phases.map((row) => (row[0] + row[1]) / 2), chance = phases[0][4], ends = span(steps.length ? steps : middle);
  const [svg, X, Y, bottom] = frame(label, ends, [0, Math.max(chance, span(phases.map((row) => row[2]))[1])], ["step", "series that change"]);
  phases.forEach(([from, to, count, , , names], i) => {
    const bar = el("path", {class: "bar", d: `M${(X(middle[i]) - 2).toFixed(1)} ${bottom}V${Y(count)}h4V${bottom}Z`});
    bar.append(el("title", {}, `steps ${from} to ${to}: ${names.replaceAll("_", " ")}`));
    svg.append(bar);
  });
  svg.append(el("line", {class: "change", x1: X(ends[0]), x2: X(ends[1]), y1: Y(chance), y2: Y(chance)}));
  return svg;
}
