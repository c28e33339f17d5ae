"""Set made results beside the papers' tables, and read page, CSV and figures."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_app.evaluate import report_eval
from moe_app.evaluate.costs import model_costs
from moe_app.evaluate.published import Evaluation, read_published
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig
from moe_ext.presets import PRESETS


def write_results(folder: Path, results: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True)
    text = json.dumps({"results": results, "config": config})
    (folder / "results.json").write_text(text)
    return folder


def test_published_tables_are_whole_and_agree_with_their_averages() -> None:
    tables = {table.name: table for table in read_published()}
    assert len(tables) == 6
    for table in tables.values():
        assert re.search(r"arXiv \d{4}\.\d{5}.*(Table|Figure) \d", table.source), table.name
        for name, values in table.rows.items():
            assert len(values) == len(table.columns), (table.name, name)
    # Averages of Table 5 are not those of its rows: JetMoE's is 50.4, and 50.8 by its row.
    for model, (*values, average) in tables["olmoe_table_4"].rows.items():
        numbers = [value for value in values if value is not None]
        assert sum(numbers) / len(numbers) == pytest.approx(average, abs=0.11), model
    assert tables["jetmoe_table_4"].rows["JetMoE-8B-chat"] == [6.681]


def test_costs_are_those_of_the_published_models() -> None:
    """JetMoE: 2,331,445,248 active parameters; OLMoE: 1,282,017,280, of 6,919,161,856."""
    olmoe = model_costs(PretrainConfig(model=MoEModelConfig(**PRESETS["olmoe_1b_7b"])), 0)
    jetmoe = model_costs(PretrainConfig(model=MoEModelConfig(**PRESETS["jetmoe_8b"])), 0)
    assert (olmoe["parameters"], olmoe["active_parameters"]) == (6_919_161_856, 1_282_017_280)
    assert jetmoe["forward_flops_per_token"] == 2 * 2_331_445_248
    assert olmoe["forward_flops_per_token"] == 2 * 1_178_994_688
    assert (olmoe["trained_tokens"], olmoe["training_flops"]) == (0, 0)


def test_a_row_has_percent_and_an_average_of_whole_rows_alone() -> None:
    table = next(each for each in read_published() if each.name == "olmoe_table_4")
    results = {
        where[0]: {"score,none": 0.01 * number}
        for number, (_, where) in enumerate(table.columns)
        if where
    }
    whole = table.row_of(Evaluation(name="a", results=results, config={}))
    assert whole == pytest.approx([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4.5])
    del results["olmes_mmlu"]
    part = table.row_of(Evaluation(name="a", results=results, config={}))
    assert part[5] is None and part[-1] is None and part[0] == 0
    nothing = Evaluation(name="b", results={"piqa": {"acc_norm,none": 0.5}}, config={})
    during = next(each for each in read_published() if each.name == "olmoe_figure_3")
    assert during.row_of(nothing) == [None] * 6


def test_the_report_has_page_csv_and_figures(tmp_path: Path) -> None:
    first = write_results(
        tmp_path / "<b>first",
        {"mmlu": {"acc,none": 0.251, "alias": "mmlu"}, "piqa": {"acc_norm,none": 0.5}},
        active_parameters=1.5e8,
    )
    second = write_results(
        tmp_path / "second",
        {
            "olmoe_during_arc_challenge": {"acc_norm,none": 0.25},
            "piqa": {"acc_norm,none": 0.75},
        },
        training_flops=2e21,
    )
    output = tmp_path / "report"
    given = [str(first), str(second / "results.json"), "--output", str(output)]
    assert report_eval.main(given) == 0
    with (output / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["table"], row["model"], row["column"]): row for row in rows}
    assert found["jetmoe_table_3", "<b>first", "MMLU"]["value"] == "25.1"
    assert found["olmoe_figure_3", "second", "PIQA"]["value"] == "75"
    assert ("olmoe_figure_3", "<b>first", "PIQA") not in found
    published = found["olmoe_table_4", "OLMoE-1B-7B", "MMLU"]
    assert (published["value"], published["unit"]) == ("54.1", "%")
    assert "Table 4" in published["source"]
    assert found["all", "second", "piqa acc_norm,none"]["value"] == "0.75"
    page = (output / "report.html").read_text()
    assert "<b>first" not in page
    assert "▸ &lt;b&gt;first" in page
    assert page.count("data:image/png;base64,") == 2
    assert "Not drawn, having no MMLU or no count of parameters: second." in page
    assert not re.search(r"(src|href)=\"https?:", page)
    for table in read_published():
        assert f"Source: {table.source}." in page.replace("&#x27;", "'")
    for name in ("mmlu_over_active_parameters", "tasks_over_training_flops"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory; name the --output of an evaluation"),
        ("[]", "has no results of an evaluation"),
        ('{"results": 3}', "has no results of an evaluation"),
    ],
)
def test_what_is_no_evaluation_is_named(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert report_eval.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
