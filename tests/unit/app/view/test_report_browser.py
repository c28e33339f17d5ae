"""The HTML page in a real browser: what is drawn, and what is not run."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.trainer.hooks.base import read_records
from tests.unit.app.view.report_samples import make_page, make_run, step

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = Path(__file__).with_name("report_probe.js")


def browse(page: Path, *flags: str) -> str:
    """The document as a browser leaves it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: none of {', '.join(BROWSERS)} is installed; the page is not run")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={page.parent / 'profile'}",
            "--virtual-time-budget=5000",
            *flags,
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def body_text(document: str) -> str:
    return html.unescape(re.findall(r"<body>(.*)</body>", document, re.DOTALL)[0])


def pixel_at(axis: list[tuple[float, float]], value: float) -> float:
    """Where the axis has a value, from the labels of its ends."""
    (low, low_y), (high, high_y) = axis[0], axis[-1]
    return low_y + (value - low) / (high - low) * (high_y - low_y)


@pytest.mark.parametrize("width", [1200, 500])
def test_browser_draws_what_the_records_say(tmp_path: Path, width: int) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    text = make_page(*folders).text
    probed = tmp_path / "probed.html"
    errors = "<script>window.told = []; onerror = (text) => window.told.push(text);</script>"
    text = re.sub(r"<meta http-equiv[^>]*>", errors, text)
    probed.write_text(text.replace("</body>", f"<script>{PROBE.read_text()}</script></body>"))
    told = json.loads(body_text(browse(probed, f"--window-size={width},900")))
    assert told["errors"] == told["errors_later"] == []
    assert told["fits"]
    assert told["paths"][1] < told["paths"][0] and told["paths"][2] == told["paths"][1]

    assert told["zoomed"][0] == "100 iterations, 6,400 tokens"
    assert told["whole"][0] == "10 iterations, 640 tokens"

    # The last record of both runs, where the pointer is.
    assert told["end"][0] == "200 iterations, 12,800 tokens"
    for seed, name in enumerate("ab"):
        loss = f"{step(200, seed)['lm_loss']:.6g}"
        assert f"{name}, training{float(loss):g}" in "\n".join(told["end"]), told["end"]
    for chart, run, label, path in told["curves"]:
        if label not in ("training", "gradient norm"):
            continue
        key = {"training": "lm_loss", "gradient norm": "grad_norm"}[label]
        records = [step(iteration, run) for iteration in range(10, 201, 10)]
        values = [record[key] for record in records if record[key] is not None]
        axis = [(float(text), y) for text, y in told["axis"][chart]]
        assert axis[0][0] < axis[-1][0] and axis[0][1] > axis[-1][1]  # upwards is more
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.-]+)", path)]
        expected = [pixel_at(axis, value) for value in values]
        assert heights == pytest.approx(expected, abs=1.5)
        assert path.count("M") == (2 if label == "training" else 1)  # the gap at a lost step
    assert told["gaps"] >= 2
    assert told["marks"] == 10

    # The heat map is blue below an even share and red above.
    written = read_records(folders[0] / "expert_load.jsonl")
    for record, pixels in ((written[-1], "last_pixels"), (written[0], "first_pixels")):
        loads = [load for row in record["load"] for load in row]
        colours = [told[pixels][4 * index : 4 * index + 3] for index in range(len(loads))]
        for load, (red, _, blue) in zip(loads, colours, strict=True):
            assert load == pytest.approx(1.0, abs=0.08) or (red > blue) == (load > 1), load
    loads = written[-1]["load"]
    assert told["map"] == ["layer 1, expert 3", f"{loads[0][3]:g}"]


def test_browser_runs_no_other_script_in_the_page(tmp_path: Path) -> None:
    make_page(make_run(tmp_path / "a"))
    page = tmp_path / "report.html"
    hostile = '<script>document.title = "owned"</script><img src="x" onerror="document.title=2">'
    page.write_text(page.read_text().replace("</body>", f"{hostile}</body>"))
    dumped = browse(page)
    assert "<title>a</title>" in dumped
    assert 'path class="curve"' in dumped
