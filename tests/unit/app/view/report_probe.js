// What test_report_browser.py asks of the page in a browser; the answers replace the page.
const told = { errors: window.told };
const charts = [...document.querySelectorAll("svg.chart")];
const input = (name) => document.querySelector(`input[name="${name}"]`);
const countPaths = () => document.querySelectorAll("path.curve[data-run]").length;

function point(name, target, across, down) {
  const box = target.getBoundingClientRect();
  const at = { clientX: box.left + across * box.width, clientY: box.top + down * box.height };
  const mouse = { pointerType: "mouse", button: 0, bubbles: true };
  target.dispatchEvent(new PointerEvent(name, { ...at, ...mouse }));
}

function pointAt(target, across, down) {
  point("pointermove", target, across, down);
  return [...document.querySelectorAll("#tip div")].map((row) => row.textContent);
}

function pixels() {
  const canvas = document.querySelector(".map canvas");
  const context = canvas.getContext("2d");
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}

// Labels of the y axis and where they are.
function axisOf(chart) {
  const labels = [...chart.querySelectorAll("text[text-anchor=end]")];
  return labels
    .filter((label) => Number(label.getAttribute("x")) < 50)
    .map((label) => [label.textContent, Number(label.getAttribute("y")) - 4]);
}

told.fits = document.documentElement.scrollWidth <= innerWidth;
told.end = pointAt(charts[0], 1 - 11 / charts[0].viewBox.baseVal.width, 0.5);
told.map = pointAt(document.querySelector(".map canvas"), 0.9, 0.1);
told.axis = charts.map(axisOf);
told.curves = [...document.querySelectorAll("path.curve[data-run]")].map((path) => [
  charts.indexOf(path.closest("svg")),
  Number(path.dataset.run),
  path.dataset.label,
  path.getAttribute("d"),
]);
told.marks = charts[0].querySelectorAll(".mark").length;
told.gaps = charts[0].querySelectorAll(".gap").length;
told.last_pixels = pixels();
const slider = document.querySelector("input[type=range]");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
told.first_pixels = pixels();
told.paths = [countPaths()];
input("run-1").click();
told.paths.push(countPaths());
document.querySelectorAll('input[name="x"]')[1].click();
input("log-x").click();
input("log-y").click();
told.paths.push(countPaths());
input("log-x").click();

// Drag over the right half, then point at its left end; no pointer is there to be captured.
Element.prototype.setPointerCapture = () => {};
const first = () => document.querySelector("svg.chart");
const middle = (52 + (first().viewBox.baseVal.width - 10)) / 2 / first().viewBox.baseVal.width;
point("pointerdown", first(), middle, 0.5);
point("pointerup", first(), 0.999, 0.5);
told.zoomed = pointAt(first(), 52 / first().viewBox.baseVal.width, 0.5);
document.querySelector("#controls button").click();
told.whole = pointAt(first(), 52 / first().viewBox.baseVal.width, 0.5);
told.errors_later = window.told;
document.body.replaceChildren(JSON.stringify(told));
