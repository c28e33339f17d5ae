// Curves: SVG charts that share an x axis, a zoom and a tooltip. `page.js` calls `makeCharts`.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "10 4", "3 2 1 2"];
const RUN_COLOURS = 6;
const MARKS = { skip: "×", rewind: "◀", resume: "▶", branch: "▶", start: "▶", fallback: "!", end: "■" };
const LINES = new Set(["rewind", "resume", "skip", "fallback"]);

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function html(name, className, parent, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

const runColour = (run) => `var(--run${run % RUN_COLOURS})`;

// 950, 1.23k, 45.6M; below one as many digits as it takes.
function short(value) {
  if (value === null || value === undefined) return "not finite";
  let size = value;
  for (const unit of ["", "k", "M", "G"]) {
    if (Math.abs(size) < 999.5) return trimmed(size) + unit;
    size /= 1000;
  }
  return trimmed(size) + "T";
}

function trimmed(value) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(3)));
}

function exact(value) {
  if (value === null || value === undefined) return "not finite";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6
    ? value.toExponential(4)
    : String(Number(value.toPrecision(6)));
}

function makeScale([low, high], [from, to], isLog) {
  const at = isLog ? Math.log10 : (value) => value;
  const start = at(low);
  const size = at(high) - start || 1;
  const scale = (value) => from + ((at(value) - start) / size) * (to - from);
  scale.invert = (place) => {
    const value = start + ((place - from) / (to - from)) * size;
    return isLog ? 10 ** value : value;
  };
  return scale;
}

function ticks([low, high], count, isLog) {
  if (isLog && high / low >= 8) {
    const steps = Math.log10(high / low) > count ? [1] : [1, 2, 5];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) {
        const tick = step * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
      }
    const every = Math.ceil(found.length / (count * 1.6));
    return found.filter((_, index) => index % every === 0);
  }
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-6; index++)
    found.push(index * step);
  return found;
}

// Labels with the digits that tell neighbours apart.
function tickLabels(values) {
  const largest = Math.max(...values.map(Math.abs));
  const step = values.length > 1 ? Math.min(...values.slice(1).map((value, index) => value - values[index])) : largest;
  if (largest < 1e-3) return values.map(trimmed);
  let unit = 1;
  let name = "";
  for (const [size, letter] of [[1e3, "k"], [1e6, "M"], [1e9, "G"], [1e12, "T"]])
    if (largest >= size) [unit, name] = [size, letter];
  const digits = Math.min(6, Math.max(0, -Math.floor(Math.log10(step / unit) + 1e-9)));
  return values.map((value) => (value === 0 ? "0" : (value / unit).toFixed(digits) + name));
}

// The place in a rising list that is nearest to a value.
function nearest(xs, value) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < value) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - value) <= Math.abs(xs[high] - value) ? low : high;
}

function makeTip() {
  const box = html("div", "", document.body);
  box.id = "tip";
  box.hidden = true;
  return {
    show(event, title, rows) {
      box.replaceChildren();
      html("div", "quiet", box, title);
      for (const [colour, label, value] of rows) {
        const row = html("div", "", box);
        const swatch = html("span", "swatch", row);
        swatch.style.background = colour;
        html("span", "", row, label);
        html("b", "", row, value);
      }
      box.hidden = false;
      const wide = box.offsetWidth;
      const left = event.clientX + 14 + wide > innerWidth ? event.clientX - wide - 14 : event.clientX + 14;
      const top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 4);
      box.style.left = `${Math.max(4, left)}px`;
      box.style.top = `${Math.max(4, top)}px`;
    },
    hide() {
      box.hidden = true;
    },
  };
}

// What a chart's curves are called, in all runs; the place in this list says how one is dashed.
function labelsOf(chart, data) {
  const curves = data.runs.flatMap((run) => run.curves);
  return [...new Set(curves.filter((curve) => curve.chart === chart.key).map((curve) => curve.label))];
}

// The curves of a chart in the runs that are shown, without what the x axis cannot hold.
function curvesOf(chart, data, state) {
  const found = [];
  const labels = labelsOf(chart, data);
  data.runs.forEach((run, number) => {
    if (state.hidden.has(number)) return;
    for (const curve of run.curves) {
      if (curve.chart !== chart.key) continue;
      const kept = curve[state.x].map((x, index) => [x, curve.value[index], index]);
      found.push({
        run: number,
        dash: labels.indexOf(curve.label),
        label: curve.label,
        source: curve,
        points: kept.filter(([x]) => x !== null && (!state.isLogX || x > 0)),
      });
    }
  });
  return found;
}

function xDomain(curves, data, state) {
  if (state.zoom) return state.zoom;
  let low = Infinity;
  let high = -Infinity;
  for (const { points } of curves)
    for (const [x] of points) {
      low = Math.min(low, x);
      high = Math.max(high, x);
    }
  data.runs.forEach((run, number) => {
    if (state.hidden.has(number)) return;
    for (const event of run.events) high = Math.max(high, event[state.x] ?? high);
  });
  if (!state.isLogX) low = Math.min(low, 0);
  if (!(low < high)) high = low + 1;
  return [low, high];
}

// As high as all but the highest 5 % need it, where a chart cuts them and they are far above.
function yDomain(curves, [left, right], isLog, cuts) {
  const values = [];
  for (const { points } of curves)
    for (const [x, y] of points)
      if (y !== null && x >= left && x <= right && (!isLog || y > 0)) values.push(y);
  if (!values.length) return null;
  values.sort((a, b) => a - b);
  const low = values[0];
  const highest = values[values.length - 1];
  const most = values[Math.ceil(0.95 * (values.length - 1))];
  const isCut = cuts && !isLog && highest - most > 0.3 * (most - low) && most > low;
  const high = isCut ? most : highest;
  if (isLog) return { domain: low < high ? [low, high] : [low / 2, high * 2], cut: null };
  const margin = high > low ? 0.04 * (high - low) : Math.abs(high) * 0.1 || 1;
  const isNearZero = low >= 0 && (low < margin || low === high);
  const bottom = isNearZero ? 0 : low - margin;
  return { domain: [bottom, high + margin], cut: isCut ? highest : null };
}

function pathOf(points, x, y, isLog) {
  let path = "";
  let isOpen = false;
  for (const [at, value] of points) {
    if (value === null || (isLog && value <= 0)) {
      isOpen = false;
      continue;
    }
    const place = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    path += isOpen ? `L${place}` : `M${place}h0`;
    isOpen = true;
  }
  return path;
}

function drawChart(figure, chart, data, state, tools) {
  const curves = curvesOf(chart, data, state);
  const isFirst = chart === data.charts[0];
  const width = Math.max(280, figure.clientWidth - 24);
  const shown = data.runs.map((_, number) => number).filter((number) => !state.hidden.has(number));
  const rails = isFirst ? shown.filter((number) => data.runs[number].events.length) : [];
  const top = data.runs.some((run) => run.phases.length > 1) ? 18 : 8;
  const plot = { left: 52, right: width - 10, top, bottom: top + (isFirst ? 300 : 200) };
  const height = plot.bottom + 22 + rails.length * 14;
  const svg = element("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `${chart.title} over ${state.x}`,
  });
  figure.querySelector("svg.chart")?.remove();
  svg.classList.add("chart");
  figure.querySelector("figcaption").after(svg);
  const across = xDomain(curves, data, state);
  const down = yDomain(curves, across, state.isLogY, chart.cuts && !state.zoom);
  const note = figure.querySelector(".note");
  note.textContent = "";
  if (!down) {
    const told = curves.length ? "nothing to draw here" : "not shown";
    element("text", { x: width / 2, y: 100, "text-anchor": "middle" }, svg, told);
    return;
  }
  if (down.cut !== null) note.textContent = `values up to ${short(down.cut)} lie above this axis`;
  const x = makeScale(across, [plot.left, plot.right], state.isLogX);
  const y = makeScale(down.domain, [plot.bottom, plot.top], state.isLogY);
  drawPhases(svg, data, state, x, plot, shown);
  drawAxes(svg, x, y, across, down.domain, plot, state);
  const clip = `clip-${chart.key}`;
  const box = { x: plot.left, y: plot.top, width: plot.right - plot.left, height: plot.bottom - plot.top };
  element("rect", box, element("clipPath", { id: clip }, svg));
  drawEvents(svg, data, state, x, plot, shown, rails);
  const group = element("g", { "clip-path": `url(#${clip})` }, svg);
  for (const curve of curves) {
    const colour = runColour(curve.run);
    element(
      "path",
      {
        class: "curve",
        d: pathOf(curve.points, x, y, state.isLogY),
        stroke: colour,
        "stroke-dasharray": DASHES[curve.dash % DASHES.length],
        "data-run": curve.run,
        "data-label": curve.label,
      },
      group,
    );
    for (const [at, value] of curve.points)
      if (value === null)
        element("text", { class: "gap", x: x(at) - 3, y: plot.top + 10 }, group, "×").style.fill = colour;
  }
  watchPointer(svg, { chart, curves, data, state, tools, x, plot, rails, width });
}

function lastOf(run, state) {
  return Math.max(...run.curves.map((curve) => curve[state.x][curve[state.x].length - 1] ?? 0));
}

function drawPhases(svg, data, state, x, plot, shown) {
  const owner = shown.find((number) => data.runs[number].phases.length > 1);
  if (owner === undefined) return;
  const phases = data.runs[owner].phases;
  phases.forEach((phase, index) => {
    const from = Math.max(plot.left, phase[state.x] > 0 || !state.isLogX ? x(phase[state.x]) : plot.left);
    const next = phases[index + 1]?.[state.x] ?? lastOf(data.runs[owner], state);
    const to = Math.min(plot.right, x(next));
    if (!(to > from)) return;
    if (index % 2)
      element("rect", { class: "phase", x: from, y: plot.top, width: to - from, height: plot.bottom - plot.top }, svg);
    const letters = Math.floor((to - from) / 6.5);
    const name = phase.name.length > letters ? `${phase.name.slice(0, letters - 1)}…` : phase.name;
    element("text", { x: from, y: plot.top - 4 }, svg, letters > 2 ? name : "");
  });
}

function drawAxes(svg, x, y, across, down, plot, state) {
  const heights = ticks(down, 5, state.isLogY);
  const isLong = state.isLogY && down[1] / down[0] >= 8;
  const labels = isLong ? heights.map(short) : tickLabels(heights);
  heights.forEach((tick, index) => {
    const place = y(tick);
    element("line", { class: "grid", x1: plot.left, x2: plot.right, y1: place, y2: place }, svg);
    element("text", { x: plot.left - 6, y: place + 4, "text-anchor": "end" }, svg, labels[index]);
  });
  const room = Math.max(2, Math.floor((plot.right - plot.left) / 75));
  for (const tick of ticks(across, room, state.isLogX)) {
    const place = x(tick);
    if (place < plot.left - 1 || place > plot.right + 1) continue;
    element("line", { class: "axis", x1: place, x2: place, y1: plot.bottom, y2: plot.bottom + 4 }, svg);
    const anchor = place > plot.right - 14 ? "end" : "middle";
    element("text", { x: place, y: plot.bottom + 16, "text-anchor": anchor }, svg, short(tick));
  }
  element("line", { class: "axis", x1: plot.left, x2: plot.right, y1: plot.bottom, y2: plot.bottom }, svg);
}

const placeOf = (event, state, x, plot) => {
  const at = event[state.x];
  if (at === null || (state.isLogX && at <= 0)) return null;
  const place = x(at);
  return place < plot.left - 0.5 || place > plot.right + 0.5 ? null : place;
};

// Faint lines for what disturbs a curve, and under the first chart a rail of marks for each run.
function drawEvents(svg, data, state, x, plot, shown, rails) {
  for (const number of shown)
    for (const event of data.runs[number].events) {
      const place = placeOf(event, state, x, plot);
      if (place === null) continue;
      const colour = runColour(number);
      if (LINES.has(event.event))
        element(
          "line",
          { x1: place, x2: place, y1: plot.top, y2: plot.bottom, stroke: colour, "stroke-opacity": 0.45, "stroke-dasharray": "1 3" },
          svg,
        );
      const rail = rails.indexOf(number);
      if (rail < 0) continue;
      const bottom = plot.bottom + 32 + rail * 14;
      if (event.event in MARKS)
        element("text", { x: place, y: bottom, "text-anchor": "middle", class: "mark" }, svg, MARKS[event.event]).style.fill = colour;
      else element("line", { x1: place, x2: place, y1: bottom - 8, y2: bottom, stroke: colour, class: "mark" }, svg);
    }
}

function watchPointer(svg, view) {
  const { state, tools, x, plot } = view;
  const cursor = element("line", { class: "cursor", y1: plot.top, y2: plot.bottom, visibility: "hidden" }, svg);
  const zoom = element("rect", { class: "zoom", y: plot.top, height: plot.bottom - plot.top, width: 0 }, svg);
  let start = null;
  const placeIn = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = view.width / box.width;
    return { across: (event.clientX - box.left) * scale, down: (event.clientY - box.top) * scale };
  };
  const inside = (across) => Math.min(plot.right, Math.max(plot.left, across));
  svg.addEventListener("pointermove", (event) => {
    const { across, down } = placeIn(event);
    if (start !== null) {
      const [low, high] = [start, inside(across)].sort((a, b) => a - b);
      zoom.setAttribute("x", low);
      zoom.setAttribute("width", high - low);
    }
    if (across < plot.left - 8 || across > plot.right + 8) return leave();
    cursor.setAttribute("x1", across);
    cursor.setAttribute("x2", across);
    cursor.setAttribute("visibility", "visible");
    if (down > plot.bottom + 20) showEvent(event, across, down, view);
    else showValues(event, x.invert(inside(across)), view);
  });
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    tools.tip.hide();
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    start = inside(placeIn(event).across);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const ends = [start, inside(placeIn(event).across)].sort((a, b) => a - b);
    start = null;
    zoom.setAttribute("width", 0);
    if (ends[1] - ends[0] < 8) return;
    state.zoom = ends.map(x.invert);
    tools.redraw();
  });
  svg.addEventListener("dblclick", () => {
    state.zoom = null;
    tools.redraw();
  });
}

function showValues(event, at, { curves, data, state, tools }) {
  const rows = [];
  let where = null;
  for (const curve of curves) {
    const xs = curve.points.map(([each]) => each);
    // A curve that ended before the pointer has no value there.
    if (!xs.length || at > xs[xs.length - 1] + 0.01 * (xs[xs.length - 1] - xs[0])) continue;
    const [, value, index] = curve.points[nearest(xs, at)];
    where ??= `${exact(curve.source.iteration[index])} iterations, ${exact(curve.source.tokens[index])} tokens`;
    const rank = curve.source.rank?.[index] ?? null;
    const run = data.runs.length > 1 ? `${data.runs[curve.run].name}, ` : "";
    const label = `${run}${curve.label}${rank === null ? "" : ` (rank ${rank})`}`;
    rows.push([runColour(curve.run), label, exact(value)]);
  }
  if (!rows.length) return tools.tip.hide();
  tools.tip.show(event, where, rows.slice(0, 14));
}

function showEvent(event, across, down, { data, state, tools, x, plot, rails }) {
  const number = rails[Math.floor((down - plot.bottom - 20) / 14)];
  const near = (data.runs[number]?.events ?? [])
    .map((each) => [placeOf(each, state, x, plot), each])
    .filter(([place]) => place !== null && Math.abs(place - across) < 7)
    .sort((a, b) => Math.abs(a[0] - across) - Math.abs(b[0] - across));
  if (!near.length) return tools.tip.hide();
  const rows = near
    .slice(0, 6)
    .map(([, each]) => [runColour(number), `${each.event} at ${exact(each.iteration)}`, each.detail.slice(0, 200)]);
  tools.tip.show(event, data.runs[number].name, rows);
}

function makeLegend(figure, chart, data) {
  const labels = labelsOf(chart, data);
  if (labels.length < 2) return;
  const legend = html("div", "legend", figure);
  labels.forEach((label, dash) => {
    const entry = html("span", "", legend);
    const sample = element("svg", { viewBox: "0 0 26 10" }, entry);
    element(
      "path",
      { d: "M0 5h26", class: "curve", stroke: "currentColor", "stroke-dasharray": DASHES[dash % DASHES.length] },
      sample,
    );
    html("span", "", entry, label);
  });
}

function makeCharts(parent, data, state, tip) {
  const figures = data.charts.map((chart) => {
    const figure = html("figure", "", parent);
    const caption = html("figcaption", "", figure, `${chart.title} `);
    html("span", "unit", caption, chart.unit);
    makeLegend(figure, chart, data);
    html("p", "quiet note", figure);
    return figure;
  });
  const tools = { tip, redraw: () => {} };
  return (redraw) => {
    tools.redraw = redraw;
    data.charts.forEach((chart, index) => drawChart(figures[index], chart, data, state, tools));
  };
}
