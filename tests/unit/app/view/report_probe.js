// What test_report_browser.py asks of the page in a browser; the answers replace the page.
const plot = document.getElementById("figure-0");
const maps = document.getElementById("figure-1");
const all = (root, selector) => [...root.querySelectorAll(selector)];
const axes = (letter) =>
  Object.keys(plot._fullLayout).filter((name) => new RegExp(`^${letter}axis\\d*$`).test(name));
const ranges = () => axes("x").map((name) => plot._fullLayout[name].range.map(Math.round));
const types = (names) => names.map((name) => plot._fullLayout[name].type);
const press = (menu, button) => {
  const { method, args } = plot.layout.updatemenus[menu].buttons[button];
  return Plotly[method](plot, ...args);
};
const countCurves = () => all(plot, ".js-line").length;

// Labels of a chart's y axis and where they are, in the chart's own pixels.
function axisOf(name) {
  const offset = plot._fullLayout[name.replace("y", "yaxis")]._offset;
  const labels = all(plot, `.${name}tick text`);
  return labels.map((text) => {
    const [, y] = text.getAttribute("transform")?.match(/translate\(0,([\d.-]+)\)/) ?? [];
    return [text.textContent.replace("\u2212", "-"), Number(y) - offset];
  });
}

// The colours of a heat map's cells, row by row.
async function cells() {
  const image = all(maps, ".heatmaplayer image")[0];
  const picture = new Image();
  picture.src = image.getAttribute("href") ?? image.getAttribute("xlink:href");
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const rows = maps.data[0].z.length;
  const columns = maps.data[0].z[0].length;
  const found = [];
  for (let row = 0; row < rows; row++)
    for (let column = 0; column < columns; column++) {
      const across = ((column + 0.5) / columns) * picture.width;
      const down = ((row + 0.5) / rows) * picture.height;
      const pixel = context.getImageData(Math.floor(across), Math.floor(down), 1, 1);
      found.push([...pixel.data].slice(0, 3));
    }
  return found;
}

async function probe() {
  const told = { errors: window.told };
  told.fits = document.documentElement.scrollWidth <= innerWidth;
  told.resources = performance.getEntriesByType("resource").map((each) => each.name);
  const labels = ["training", "gradient norm"];
  const named = (chart, run) =>
    plot._fullData.find(
      ({ meta, legendgroup }) =>
        meta?.chart === chart && labels.includes(meta.label) && legendgroup === `run ${run}`,
    );
  const pathOf = (trace) =>
    all(plot, `.trace${trace.uid} .js-line`).map((line) => line.getAttribute("d")).join("");
  told.paths = ["loss", "norm"].map((chart) => [0, 1].map((run) => pathOf(named(chart, run))));
  told.axis = ["loss", "norm"].map((chart) => axisOf(named(chart, 0).yaxis));
  told.curves = countCurves();
  await Plotly.relayout(plot, { "xaxis3.range": [3200, 6400] });
  told.zoomed = ranges();
  await press(0, 1);
  told.over_iterations = ranges();
  await press(1, 0);
  told.log_x = types(axes("x"));
  await press(2, 0);
  const charts = plot._fullData.filter((each) => each.meta?.chart);
  told.log_y = types(charts.map((each) => each.yaxis.replace("y", "yaxis")));
  const second = plot.data.flatMap((each, number) => (each.legendgroup === "run 1" ? [number] : []));
  await Plotly.restyle(plot, { visible: "legendonly" }, second);
  told.curves_hidden = countCurves();
  told.last_pixels = await cells();
  const [slider] = maps.layout.sliders;
  await Plotly.restyle(maps, ...slider.steps[0].args);
  told.first_pixels = await cells();
  return told;
}

probe()
  .catch((error) => ({ errors: [String(error), error.stack] }))
  .then((told) => document.body.replaceChildren(JSON.stringify(told)));
