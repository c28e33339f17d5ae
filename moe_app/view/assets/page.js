// Controls and heat maps; `charts.js` comes before it.
"use strict";

const NEUTRAL = { light: [236, 238, 242], dark: [44, 50, 61] };
const BLUE = [44, 111, 219];
const RED = [224, 47, 47];

// From blue (no token) over neutral (an even share) to red (four times as many, or more); a count
// of dead experts from neutral to blue.
function heatColour(value, isCount, highest, neutral) {
  if (value === null) return [128, 128, 128, 90];
  let share;
  let end;
  if (isCount) [share, end] = [highest ? value / highest : 0, BLUE];
  else if (value < 1) [share, end] = [1 - value, BLUE];
  else [share, end] = [Math.min(1, Math.log2(value) / 2), RED];
  return [...neutral.map((channel, index) => Math.round(channel + (end[index] - channel) * share)), 255];
}

// A canvas of one pixel a cell, stretched by the style sheet.
function paint(canvas, rows, isCount, neutral) {
  canvas.width = rows[0].length;
  canvas.height = rows.length;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const highest = isCount ? Math.max(...rows.map((row) => Math.max(...row))) : 0;
  rows.flat().forEach((value, index) => {
    image.data.set(heatColour(value, isCount, highest, neutral), 4 * index);
  });
  context.putImageData(image, 0, 0);
}

const cellHeight = (rows) => `${Math.max(2, Math.min(24, Math.floor(320 / rows))) * rows}px`;
const transposed = (columns) => columns[0].map((_, row) => columns.map((column) => column[row]));

function makeMap(parent, title, tip) {
  const map = html("div", "map", parent);
  html("h3", "", map, title);
  const steer = html("div", "steer", map);
  const canvas = html("canvas", "", map);
  const note = html("p", "quiet", map);
  const view = { map, steer, canvas, note, rows: [[0]], name: () => "" };
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", title);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(view.rows.length - 1, Math.floor(((event.clientY - box.top) / box.height) * view.rows.length));
    const width = view.rows[0].length;
    const column = Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width));
    if (row < 0 || column < 0) return;
    tip.show(event, view.name(row, column), [["transparent", "", exact(view.rows[row][column])]]);
  });
  canvas.addEventListener("pointerleave", tip.hide);
  return view;
}

const when = (source, index) =>
  `iteration ${exact(source.iteration[index])}` +
  (source.tokens[index] === null ? "" : `, ${short(source.tokens[index])} tokens`);

const span = (source) =>
  `from iteration ${exact(source.iteration[0])} to ${exact(source.iteration[source.iteration.length - 1])}`;

// All experts in one record, which a slider picks.
function recordMap(parent, load, tip) {
  const view = makeMap(parent, `${load.title}, all layers`, tip);
  const slider = html("input", "", view.steer);
  const label = html("span", "", view.steer);
  const last = load.rows.length - 1;
  Object.assign(slider, { type: "range", min: 0, max: last, value: last });
  slider.setAttribute("aria-label", "which record");
  const layers = load.rows[0].length;
  view.note.textContent =
    `a row per layer, 1 at the top; a column per expert, 0 to ${load.rows[0][0].length - 1};` +
    ` ${load.rows.length} of ${exact(load.records)} records`;
  view.canvas.style.height = cellHeight(layers);
  view.draw = (neutral) => {
    view.rows = load.rows[slider.value];
    label.textContent = when(load, slider.value);
    paint(view.canvas, view.rows, false, neutral);
  };
  view.name = (row, column) => `layer ${row + 1}, expert ${column}`;
  slider.addEventListener("input", () => view.draw(neutralNow()));
  return view;
}

// One layer's experts over time; the layer is picked.
function layerMap(parent, load, tip) {
  const view = makeMap(parent, `${load.title}, one layer over time`, tip);
  const label = html("label", "", view.steer, "layer ");
  const choice = html("select", "", label);
  load.rows[0].forEach((_, layer) => {
    html("option", "", choice, String(layer + 1)).value = layer;
  });
  const experts = load.rows[0][0].length;
  view.note.textContent = `a row per expert, 0 at the top; a column per record, ${span(load)}`;
  view.canvas.style.height = cellHeight(experts);
  view.draw = (neutral) => {
    view.rows = transposed(load.rows.map((rows) => rows[choice.value]));
    paint(view.canvas, view.rows, false, neutral);
  };
  view.name = (row, column) => `layer ${Number(choice.value) + 1}, expert ${row}, ${when(load, column)}`;
  choice.addEventListener("change", () => view.draw(neutralNow()));
  return view;
}

function overTimeMap(parent, source, tip) {
  const view = makeMap(parent, source.title, tip);
  view.steer.remove();
  const rows = transposed(source.columns);
  view.note.textContent = `a row per layer, 1 at the top; ${span(source)}`;
  view.canvas.style.height = cellHeight(rows.length);
  view.rows = rows;
  view.draw = (neutral) => paint(view.canvas, rows, source.is_count, neutral);
  view.name = (row, column) => `layer ${row + 1}, up to ${when(source, column)}`;
  return view;
}

function makeScaleBar(parent) {
  const bar = html("p", "scale", parent);
  html("span", "", bar, "load: none");
  const canvas = html("canvas", "", bar);
  html("span", "", bar, "4 x an even share or more");
  const loads = Array.from({ length: 90 }, (_, index) => (index < 45 ? index / 45 : 2 ** ((index - 45) / 22)));
  return { draw: (neutral) => paint(canvas, [loads], false, neutral) };
}

function makeMaps(parent, data, tip) {
  if (!data.runs.some((run) => run.loads.length || run.layers.length)) {
    html("p", "quiet", parent, "No run has experts.");
    return { draw: () => {}, show: () => {} };
  }
  const views = [makeScaleBar(parent)];
  const cards = [];
  data.runs.forEach((run, number) => {
    if (!run.loads.length && !run.layers.length) return;
    const card = html("figure", "card", parent);
    cards.push([card, number]);
    const caption = html("figcaption", "", card);
    const swatch = html("span", "swatch", caption);
    swatch.style.background = runColour(number);
    html("span", "", caption, ` ${run.name}`);
    for (const load of run.loads) {
      const grid = html("div", "maps", card);
      views.push(recordMap(grid, load, tip), layerMap(grid, load, tip));
    }
    const grid = html("div", "maps", card);
    for (const source of run.layers) views.push(overTimeMap(grid, source, tip));
  });
  return {
    draw: (neutral) => views.forEach((view) => view.draw(neutral)),
    show: (hidden) => cards.forEach(([card, number]) => (card.hidden = hidden.has(number))),
  };
}

const darkness = matchMedia("(prefers-color-scheme: dark)");
let isPrinting = false;
const neutralNow = () => (darkness.matches && !isPrinting ? NEUTRAL.dark : NEUTRAL.light);

function makeControls(parent, data, state, redraw) {
  const bar = html("div", "group only-screen", parent);
  const option = (type, name, label, isOn, action, place = bar) => {
    const holder = html("label", "", place);
    const input = html("input", "", holder);
    Object.assign(input, { type, name, checked: isOn });
    input.addEventListener("change", () => {
      action(input.checked);
      redraw();
    });
    html("span", "", holder, label);
    return holder;
  };
  const over = (x) => () => Object.assign(state, { x, zoom: null });
  option("radio", "x", "over tokens", state.x === "tokens", over("tokens"));
  option("radio", "x", "over iterations", state.x === "iteration", over("iteration"));
  option("checkbox", "log-x", "log x", false, (isOn) => Object.assign(state, { isLogX: isOn, zoom: null }));
  option("checkbox", "log-y", "log y", false, (isOn) => Object.assign(state, { isLogY: isOn }));
  const reset = html("button", "only-screen", bar, "whole run");
  reset.addEventListener("click", () => {
    state.zoom = null;
    redraw();
  });
  const runs = html("div", "group", parent);
  data.runs.forEach((run, number) => {
    const toggle = (isOn) => (isOn ? state.hidden.delete(number) : state.hidden.add(number));
    const holder = option("checkbox", `run-${number}`, run.name, true, toggle, runs);
    const swatch = html("span", "swatch");
    swatch.style.background = runColour(number);
    holder.firstChild.after(swatch);
  });
  return () => (reset.hidden = state.zoom === null);
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const hasTokens = data.runs.every((run) => run.curves.every((curve) => curve.tokens.some((each) => each !== null)));
  const state = { x: hasTokens ? "tokens" : "iteration", isLogX: false, isLogY: false, hidden: new Set(), zoom: null };
  const tip = makeTip();
  const drawCharts = makeCharts(document.getElementById("charts"), data, state, tip);
  const maps = makeMaps(document.getElementById("maps"), data, tip);
  const redraw = () => {
    drawCharts(redraw);
    maps.show(state.hidden);
    updateControls();
  };
  const updateControls = makeControls(document.getElementById("controls"), data, state, redraw);
  const repaint = () => maps.draw(neutralNow());
  redraw();
  repaint();
  darkness.addEventListener("change", repaint);
  for (const [name, value] of [["beforeprint", true], ["afterprint", false]])
    addEventListener(name, () => {
      isPrinting = value;
      repaint();
    });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    redraw();
  });
}

start();
