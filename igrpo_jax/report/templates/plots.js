"use strict";
// The plots of the report, drawn as SVG: the values of the step under the pointer, and zoom by dragging.
//
// data/plots.js calls plotsLoaded once, with the panels in the order of the page's figures. Without this script a figure
// shows its PNG. Names of runs and metrics are inserted by textContent alone; colours are classes of style.css.

const HEIGHT = 250;
const EDGE = { left: 54, right: 12, top: 10, bottom: 24 };
const DASHES = ["none", "6 3", "2 3"];
const SVG = "http://www.w3.org/2000/svg";

function plotsLoaded(data) {
  for (const [place, figure] of [...document.querySelectorAll("figure[data-panel]")].entries()) {
    const panel = data.panels[place];
    const plot = { figure, panel, series: allSeries(panel, data), range: null, at: null, box: node("div", { className: "plot", tabIndex: 0 }) };
    plot.box.setAttribute("role", "img");
    plot.box.setAttribute("aria-label", `${panel.title} by step; arrow keys read the values`);
    plot.legend = node("p", { className: "legend small" });
    plot.back = node("button", { type: "button", className: "small", hidden: true, onclick: () => zoom(plot, null) }, "all steps");
    plot.tip = node("div", { className: "tip small", hidden: true });
    figure.querySelector("a, .lost")?.replaceWith(plot.box);
    plot.box.after(plot.legend);
    listen(plot);
    new ResizeObserver(() => draw(plot)).observe(plot.box);
  }
  document.body.dataset.plots = data.panels.length;
}

function allSeries(panel, data) {
  const several = data.runs.length > 1;
  const series = [];
  for (const [number, run] of data.runs.entries())
    for (const [kind, line] of panel.lines.entries()) {
      const { x, y, low, high, over = 1, mean = y } = line.runs[number];
      if (!x.length) continue;
      const look = several ? `of-run-${number % data.colours}` : `of-${line.role}`;
      const label = several ? run.name + (panel.lines.length > 1 ? ` · ${line.label}` : "") : line.label;
      series.push({ x, y, low, high, over, mean, look, label, dash: several ? DASHES[kind % DASHES.length] : "none", faint: over > 1 && !several });
    }
  return series;
}

// Drawing

function draw(plot) {
  const width = plot.box.clientWidth;
  if (!width) return;
  const steps = plot.series.flatMap((curve) => [curve.x[0], curve.x.at(-1)]);
  let [first, last] = plot.range ?? [Math.min(...steps), Math.max(...steps)];
  if (first === last) [first, last] = [first - 1, last + 1];
  const stacks = plot.panel.stacked ? stacked(plot.series) : null;
  const { low, high, peak } = heights(plot, first, last, stacks);
  const x = (step) => EDGE.left + ((step - first) / (last - first)) * (width - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom - ((value - low) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  plot.scale = { x, y, first, last, width };
  const picture = shape("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}` });
  for (const value of ticks(low, high, 5)) {
    picture.append(shape("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }));
    picture.append(shape("text", { class: "tick", x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  for (const step of ticks(first, last, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger))
    picture.append(shape("text", { class: "tick", x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, step.toLocaleString("en")));
  const inner = shape("svg", { x: EDGE.left, y: EDGE.top, width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom, viewBox: `${EDGE.left} ${EDGE.top} ${width - EDGE.left - EDGE.right} ${HEIGHT - EDGE.top - EDGE.bottom}` });
  if (plot.panel.limit !== null && plot.panel.limit <= high)
    inner.append(shape("line", { class: "limit", x1: EDGE.left, x2: width, y1: y(plot.panel.limit), y2: y(plot.panel.limit) }));
  for (const [i, curve] of plot.series.entries()) {
    if (stacks) inner.append(area(curve, curve.x, stacks[i], stacks[i + 1], x, y));
    else lines(inner, curve, x, y);
  }
  plot.cursor = shape("g", {});
  picture.append(inner, plot.cursor);
  plot.box.replaceChildren(picture, plot.tip);
  legend(plot, peak);
  if (plot.at !== null) point(plot, plot.at);
}

function lines(inner, curve, x, y) {
  if (curve.low) {
    const known = curve.x.map((_, i) => i).filter((i) => curve.low[i] !== null && curve.high[i] !== null);
    const at = (values) => known.map((i) => values[i]);
    if (known.length) inner.append(area({ ...curve, look: `${curve.look} band` }, at(curve.x), at(curve.low), at(curve.high), x, y));
  }
  const path = (values) => "M" + curve.x.map((step, i) => `${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`).join("L");
  if (curve.faint) inner.append(shape("path", { class: `line faint ${curve.look}`, d: path(curve.y) }));
  inner.append(shape("path", { class: `line ${curve.look}`, d: path(curve.mean), "stroke-dasharray": curve.dash }));
  if (curve.low || curve.x.length === 1)
    for (const [i, step] of curve.x.entries()) inner.append(shape("circle", { class: `dot-of ${curve.look}`, cx: x(step), cy: y(curve.mean[i]), r: 3 }));
}

function area(curve, steps, low, high, x, y) {
  const edges = steps.length === 1 ? [steps[0] - 0.25, steps[0] + 0.25] : steps;
  const value = (values, i) => values[Math.min(i, values.length - 1)];
  const up = edges.map((step, i) => `${x(step).toFixed(1)},${y(value(high, i)).toFixed(1)}`);
  const down = edges.map((step, i) => `${x(step).toFixed(1)},${y(value(low, i)).toFixed(1)}`).reverse();
  return shape("path", { class: `area ${curve.look}`, d: `M${[...up, ...down].join("L")}Z` });
}

// The heights below and above each part of a stack: curve row more than there are parts.
function stacked(series) {
  const rows = [series[0].mean.map(() => 0)];
  for (const curve of series) rows.push(rows.at(-1).map((below, i) => below + curve.mean[i]));
  return rows;
}

function heights(plot, first, last, stacks) {
  const seen = [];
  const add = (steps, values) => steps.forEach((step, i) => step >= first && step <= last && values[i] !== null && seen.push(values[i]));
  for (const [i, curve] of plot.series.entries())
    for (const values of stacks ? [stacks[i + 1]] : [curve.faint ? curve.y : curve.mean, curve.low ?? [], curve.high ?? []]) if (values.length) add(curve.x, values);
  seen.sort((a, b) => a - b);
  const [least, most] = [Math.min(0, seen[0] ?? 0), seen.at(-1) ?? 1];
  let high = most + 0.05 * (most - least);
  let peak = null;
  const usual = 1.6 * (seen[Math.floor(0.95 * (seen.length - 1))] ?? 0);
  if (plot.panel.percent) high = most > 0 ? Math.min(high, 102) : 100;
  else if (plot.panel.cut && usual > 0 && usual < most) [high, peak] = [usual, most];
  const limit = plot.panel.limit;
  if (limit !== null && limit > high && limit <= 1.5 * high) high = 1.05 * limit;
  if (high <= least) high = least + 1;
  return { low: least < 0 ? least - 0.05 * (high - least) : 0, high, peak };
}

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const size = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
  const result = [];
  for (let i = Math.ceil(low / size); i * size <= high; i++) result.push(Number((i * size).toPrecision(12)));
  return result;
}

function legend(plot, peak) {
  const entries = plot.series.map((curve) => node("span", { className: curve.look }, swatch(curve), curve.label));
  const notes = [];
  if (plot.panel.limit !== null) notes.push(`limit ${number(plot.panel.limit)}`);
  if (peak !== null) notes.push(`peak ${number(peak)}`);
  const over = [...new Set(plot.series.map((curve) => curve.over))].filter((values) => values > 1);
  if (over.length) notes.push(`lines are means of ${over.join(" and ")} values`);
  plot.back.hidden = plot.range === null;
  plot.legend.replaceChildren(...(entries.length > 1 ? entries : []), node("span", { className: "muted" }, notes.join(" · ")), plot.back);
}

function swatch(curve) {
  const picture = shape("svg", { width: 22, height: 8 });
  picture.append(shape("path", { class: `line ${curve.look}`, d: "M0,4L20,4", "stroke-dasharray": curve.dash }));
  return picture;
}

// Reading and zooming

function listen(plot) {
  let from = null;
  const step = (event) => {
    const { first, last, width } = plot.scale;
    const part = (event.clientX - plot.box.getBoundingClientRect().left - EDGE.left) / (width - EDGE.left - EDGE.right);
    return first + Math.min(Math.max(part, 0), 1) * (last - first);
  };
  plot.box.onpointerdown = (event) => {
    from = step(event);
    if (event.pointerType === "mouse") event.preventDefault();
  };
  plot.box.onpointermove = (event) => plot.scale && point(plot, step(event), from);
  plot.box.onpointerup = (event) => {
    const [low, high] = [from ?? step(event), step(event)].sort((a, b) => a - b);
    const { first, last } = plot.scale;
    from = null;
    if (high - low > 0.02 * (last - first)) zoom(plot, [low, high]);
    else point(plot, high);
  };
  plot.box.onpointerleave = plot.box.onblur = () => ((from = null), forget(plot));
  plot.box.onpointercancel = () => (from = null);
  plot.box.ondblclick = () => zoom(plot, null);
  plot.box.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") zoom(plot, null);
    if (!by) return;
    event.preventDefault();
    const steps = visible(plot);
    const place = plot.at === null ? (by > 0 ? -1 : steps.length) : steps.indexOf(nearest(steps, plot.at));
    point(plot, steps[Math.min(Math.max(place + by, 0), steps.length - 1)]);
  };
}

// Steps between which no line has a value are no range to look at.
function zoom(plot, range) {
  const steps = range && all(plot).filter((step) => step >= range[0] && step <= range[1]);
  plot.range = steps && steps.length > 1 ? [steps[0], steps.at(-1)] : range ? plot.range : null;
  forget(plot);
  draw(plot);
}

const all = (plot) => [...new Set(plot.series.flatMap((curve) => curve.x))].sort((a, b) => a - b);
const visible = (plot) => all(plot).filter((step) => step >= plot.scale.first && step <= plot.scale.last);
const nearest = (steps, wanted) => steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best));

function point(plot, wanted, from = null) {
  const steps = visible(plot);
  if (!steps.length) return;
  const step = nearest(steps, wanted);
  const { x, width } = plot.scale;
  plot.at = step;
  const cursor = [shape("line", { class: "cursor", x1: x(step), x2: x(step), y1: EDGE.top, y2: HEIGHT - EDGE.bottom })];
  if (from !== null && from !== wanted) {
    const [low, high] = [x(from), x(wanted)].sort((a, b) => a - b);
    cursor.push(shape("rect", { class: "chosen", x: low, y: EDGE.top, width: high - low, height: HEIGHT - EDGE.top - EDGE.bottom }));
  }
  plot.cursor.replaceChildren(...cursor);
  const rows = plot.series.map((curve) => [curve, curve.x.indexOf(step)]).filter(([, place]) => place >= 0).map(([curve, place]) => node("div", { className: curve.look }, swatch(curve), `${curve.label}: ${value(curve, place)}`));
  plot.tip.replaceChildren(node("b", {}, `step ${step.toLocaleString("en")}`), ...rows);
  plot.tip.hidden = false;
  const right = x(step) > width / 2;
  plot.tip.style.left = right ? "" : `${x(step) + 10}px`;
  plot.tip.style.right = right ? `${width - x(step) + 10}px` : "";
}

function value(curve, place) {
  const parts = [number(curve.y[place], 4)];
  if (curve.low && curve.low[place] !== null) parts.push(`(${number(curve.low[place], 4)} to ${number(curve.high[place], 4)})`);
  if (curve.over > 1) parts.push(`(mean ${number(curve.mean[place], 4)})`);
  return parts.join(" ");
}

function forget(plot) {
  plot.at = null;
  plot.tip.hidden = true;
  plot.cursor?.replaceChildren();
}

function number(value, digits = 3) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(digits - 2).replace("e+", "e");
  return Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size + 1))))).toLocaleString("en", { maximumFractionDigits: 9 });
}

function node(tag, properties, ...children) {
  const result = Object.assign(document.createElement(tag), properties);
  result.append(...children);
  return result;
}

function shape(tag, attributes, text = "") {
  const result = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) result.setAttribute(name, value);
  result.textContent = text;
  return result;
}
