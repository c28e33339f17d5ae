// What test_report_browser.py asks of the page in a browser; the answers replace the page.
const told = { errors: window.told };
const charts = [...document.querySelectorAll("svg.chart")];
const input = (name) => document.querySelector(`input[name="${name}"]`);
const countPaths = () => document.querySelectorAll("path.curve[data-run]").length;

function pointAt(target, across, down) {
  const box = target.getBoundingClientRect();
  const at = { clientX: box.left + across * box.width, clientY: box.top + down * box.height };
  target.dispatchEvent(new PointerEvent("pointermove", { ...at, bubbles: true }));
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
told.errors_later = window.told;
document.body.replaceChildren(JSON.stringify(told));
