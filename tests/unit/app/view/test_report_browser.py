"""The HTML page in a real browser: what is drawn, and what is not run."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.trainer.records.record_file import append_record, read_records
from tests.unit.app.view.report_samples import make_page, make_run, step

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = Path(__file__).with_name("report_probe.js")


def browse(page: Path, *flags: str) -> str:
    """The document as a browser leaves it."""
    return browse_with_log(page, *flags)[0]


def browse_with_log(page: Path, *flags: str) -> tuple[str, str]:
    """The document as a browser leaves it, and what the browser says."""
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
        timeout=300,
    )
    return done.stdout, done.stderr


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
    assert told["errors"] == []
    assert told["fits"]
    assert told["resources"] == []

    # Heights of the training loss and of the gradient norm by the labels of their axes.
    for chart, key in ((0, "lm_loss"), (1, "grad_norm")):
        axis = [(float(label), y) for label, y in told["axis"][chart]]
        assert axis[0][0] < axis[-1][0] and axis[0][1] > axis[-1][1]  # upwards is more
        for run in (0, 1):
            records = [step(iteration, run) for iteration in range(10, 201, 10)]
            values = [record[key] for record in records if record[key] is not None]
            path = told["paths"][chart][run]
            heights = [float(y) for y in re.findall(r"[ML][\d.-]+,([\d.-]+)", path)]
            expected = [pixel_at(axis, value) for value in values]
            assert heights == pytest.approx(expected, abs=1.5)
            assert path.count("M") == (2 if key == "lm_loss" else 1)  # the gap at a lost step

    # All charts follow the zoom of one, the buttons change all axes, a run can be hidden.
    assert len(told["zoomed"]) > 5 and told["zoomed"] == [[3200, 6400]] * len(told["zoomed"])
    assert {end for _, end in told["over_iterations"]} == {told["over_iterations"][0][1]}
    assert 200 <= told["over_iterations"][0][1] < 230
    assert set(told["log_x"]) == {"log"} and set(told["log_y"]) == {"log"}
    assert told["curves_hidden"] < told["curves"]

    # The heat map is blue below an even share and red above; the slider picks the record.
    written = list(read_records(folders[0] / "expert_load.jsonl"))
    for record, pixels in ((written[-1], "last_pixels"), (written[0], "first_pixels")):
        loads = [load for row in record["load"] for load in row]
        for load, (red, _, blue) in zip(loads, told[pixels], strict=True):
            assert load == pytest.approx(1.0, abs=0.08) or (red > blue) == (load > 1), load


def test_browser_follows_no_link_of_a_run_and_runs_no_other_script(tmp_path: Path) -> None:
    link = "<a href='https://x.example'>x</a><b>y</b>"
    run = make_run(tmp_path / "a")
    sources = {link: 1, "code": 2}
    append_record(run / "metrics.jsonl", {**step(210), "consumed_tokens_per_source": sources})
    make_page(run)
    page = tmp_path / "report.html"
    hostile = '<script>document.title = "owned"</script><img src="x" onerror="document.title=2">'
    hostile += '<img src="https://x.example/y.png">'
    page.write_text(page.read_text().replace("</body>", f"{hostile}</body>"))
    dumped, said = browse_with_log(page, "--enable-logging=stderr")
    assert "<title>a</title>" in dumped
    assert 'class="js-line"' in dumped
    drawn = "".join(re.findall(r"<svg.*?</svg>", dumped, re.DOTALL))
    assert html.escape(link, quote=False) in drawn
    assert "x.example" not in re.sub(r"<text.*?</text>", "", drawn, flags=re.DOTALL)
    assert 'xlink:href="http' not in drawn
    # The page itself asks for nothing that its policy refuses.
    refused = [line for line in said.splitlines() if "Content Security Policy" in line]
    assert refused and all("script-src" in line or "img-src" in line for line in refused), refused
    assert len(refused) == 4, refused
