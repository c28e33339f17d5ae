"""Tests the page on this machine: its rows, how it is printed, and the exit status."""

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch.nn.attention import SDPBackend

from megatron.trainer.errors import ConfigError
from moe_app.doctor import diagnose, facts
from moe_app.doctor.page import Page, Row, Section, show
from moe_ext import compat
from moe_ext.experts import EXPERT_BACKENDS, ExpertBackend
from moe_ext.experts.loop import loop_experts
from tests.distributed.launcher import alone
from tests.paths import REPO


def fake_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Fake the versions of packages; None means not installed."""
    real = importlib.metadata.version
    others = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name: str) -> str:
        found = others.get(name, real(name) if name not in others else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def rows_of(section: Section) -> dict[str, Row]:
    return {row.name: row for row in section.rows}


def test_installed_versions_are_a_tested_combination() -> None:
    rows = rows_of(facts.versions_section())
    assert [name for name, row in rows.items() if row.state in ("warn", "bad")] == []
    assert rows["combination"].state == "ok"
    assert rows["torch"].value == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("versions", "name", "state", "detail"),
    [
        ({"numpy": "3.1.0"}, "numpy", "warn", "3.1.0 is installed, the tests run with 2.*"),
        ({"torch": "2.14.0+cu130"}, "torch", "warn", "2.14.0+cu130 is installed"),
        ({"megatron_core": "0.17.0"}, "megatron-core", "bad", "supported is >=0.16.1,<0.17 for"),
        ({"transformers": None}, "transformers", "note", "pip install 'megatron-moe[hf]'"),
        ({"numpy": None}, "numpy", "bad", "required: pip install numpy"),
    ],
)
def test_untested_version_is_reported(
    versions: dict[str, str | None],
    name: str,
    state: str,
    detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_versions(monkeypatch, **versions)
    rows = rows_of(facts.versions_section())
    assert rows[name].state == state
    assert detail in rows[name].detail
    if state == "warn":
        assert rows["combination"].detail == f"because of {name}"


def test_tested_combinations_satisfy_the_requirements_of_the_package() -> None:
    for combination, line in zip(compat.TESTED_COMBINATIONS, compat.LINES, strict=True):
        assert combination["megatron-core"] == line.tested
        assert SpecifierSet(line.python.replace(" ", "")).contains(combination["python"])
        assert combination.keys() >= {"python", "torch", "megatron-core", "numpy"}
    assert "torch==2.13.0" in (REPO / "Makefile").read_text()
    assert compat.is_version("2.13.0+cpu", compat.TESTED_COMBINATIONS[0]["torch"])


@pytest.mark.parametrize(
    ("version", "tested", "fits"),
    [
        ("2.13.1+cpu", "2.13", True),
        ("2.1.3", "2.13", False),
        ("2.130", "2.13", False),
        ("5.24.0", "5", True),
        ("0.16.1", "0.16.1", True),
        ("0.16.10", "0.16.1", False),
    ],
)
def test_tested_version_covers_its_patch_releases(version: str, tested: str, fits: bool) -> None:
    assert compat.is_version(version, tested) is fits


def test_nearest_combination_is_the_one_with_most_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = {"torch": "2.10", "numpy": "1"}, {"torch": "2.13", "numpy": "2"}
    monkeypatch.setattr(compat, "TESTED_COMBINATIONS", (old, new))
    assert compat.nearest_combination({"torch": "2.13.0", "numpy": "2.4"}) == new
    assert compat.nearest_combination({"torch": "2.10.1", "numpy": None}) == old


def config(*flags: str) -> diagnose.DoctorConfig:
    return diagnose.parse(["--mock-data", *flags])


def test_unusable_expert_backends_are_reported_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = ExpertBackend(experts=loop_experts, problem=lambda use: f"fails on {use.device_type}")
    monkeypatch.setitem(EXPERT_BACKENDS, "broken", broken)
    rows = rows_of(facts.experts_section(config(), "cpu"))
    assert rows.keys() == {*EXPERT_BACKENDS, "the run takes"}
    assert (rows["loop"].state, rows["loop"].value) == ("ok", "fp32, bf16")
    assert (rows["broken"].state, rows["broken"].detail) == ("note", "fails on cpu")
    assert "not on cpu" in rows["te"].detail
    assert rows["the run takes"].value == "grouped, in fp32"
    assert rows_of(facts.experts_section(config("--bf16"), "cpu"))["the run takes"].value == (
        "grouped, in bf16"
    )


def test_unusable_backend_of_the_run_is_a_problem() -> None:
    section = facts.experts_section(config("--expert-backend", "te"), "cpu")
    taken = rows_of(section)["the run takes"]
    assert taken.state == "bad"
    assert "expert_backend 'te' computes on a GPU" in taken.detail


def test_attention_kernels_are_tried_on_this_machine() -> None:
    rows = rows_of(facts.attention_section(config(), "cpu"))
    assert (rows["math"].state, rows["math"].value) == ("ok", "fp32, bf16")
    assert (rows["flash"].state, rows["flash"].value) == ("ok", "fp32, bf16")
    assert rows["the run takes"].value == "flash, in fp32"
    for name in ("efficient", "cudnn"):
        assert (rows[name].state, rows[name].value) == ("note", "no")
        assert rows[name].detail


def test_failing_kernel_is_reported_with_torchs_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_named: Any) -> torch.Tensor:
        raise RuntimeError("No kernel for this. Aborting (Triggered internally at x.cpp:1)")

    monkeypatch.setattr(facts.F, "scaled_dot_product_attention", fail)
    inputs = facts._attention_inputs("cpu", torch.float32, (2, 1), 8)
    problem = facts._attention_problem(SDPBackend.MATH, inputs)
    assert problem == "No kernel for this"


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n[0-3]",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_JWT": "secret",
}


@pytest.mark.parametrize(("num_hosts", "state"), [(4, None), (1, "warn"), (None, None)])
def test_unused_nodes_of_a_slurm_job_are_reported(num_hosts: int | None, state: str | None) -> None:
    section = facts.slurm_section(SLURM, num_hosts=num_hosts)
    rows = rows_of(section)
    assert (rows["job"].value, rows["nodes"].value) == ("77", "n[0-3]")
    found = rows.get("nodes used")
    assert (found and found.state) == state
    assert "secret" not in repr(section)


def test_absence_of_slurm_is_reported() -> None:
    rows = rows_of(facts.slurm_section({}, num_hosts=1))
    assert rows["job"].value == "none"


def page(*states: str) -> Page:
    rows = [Row(name=f"row {s}", value="v", state=s, detail="d") for s in states]  # type: ignore[arg-type]
    return Page(sections=(Section(key="things", title="Things", rows=tuple(rows)),))


@pytest.mark.parametrize(
    ("states", "status"), [(["ok", "note"], 0), (["warn"], 0), (["ok", "bad", "warn"], 1)]
)
def test_status_is_1_when_something_would_stop_a_run(states: list[str], status: int) -> None:
    document = json.loads(page(*states).to_json())
    assert page(*states).status == document["status"] == status
    assert document["problems"] == ["row bad: d"] * status
    assert document["warnings"] == (["row warn: d"] if "warn" in states else [])
    assert [row["state"] for row in document["sections"]["things"]] == states


def test_page_shows_every_row_and_ends_with_what_would_stop_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = Section(
        key="odd", title="[odd]", rows=(Row(name="[red]name", value="[/x]", detail="[b]why"),)
    )
    show(Page(sections=(*page("ok", "bad").sections, odd)))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown  # not a terminal
    for text in ("Things", "✓  row ok", "✗  row bad", "[odd]", "[red]name", "[/x]", "[b]why"):
        assert text in shown
    assert shown.endswith("1 thing would stop a run:\n  row bad: d\n")
    show(page("ok"))
    assert capsys.readouterr().out.endswith("Nothing here would stop a run.\n")


TOOL = REPO / "tools/doctor.py"


def run_doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in its own process, because it redirects torch.cuda."""
    return alone(TOOL, "--device", "cpu", *arguments, timeout=300)


def test_single_rank_prints_json(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--json", "--save", str(tmp_path / "run"))
    done = alone(TOOL, *flags, SLURM_JOB_ID="78")
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    assert (document["status"], document["problems"]) == (0, [])
    order = ["versions", "machine", "experts", "attention", "ranks", "slurm"]
    assert list(document["sections"]) == order
    ranks = {row["name"]: row for row in document["sections"]["ranks"]}
    assert re.fullmatch(r"[\d,]+ MB/s", ranks[f"--save on {os.uname().nodename}"]["value"])
    assert str(tmp_path) in ranks[f"--save on {os.uname().nodename}"]["detail"]
    assert document["sections"]["slurm"][0]["value"] == "78"
    assert not (tmp_path / "run").exists()


def test_invalid_layout_gives_a_page_and_status_1(tmp_path: Path) -> None:
    done = run_doctor("--tensor-model-parallel-size", "2")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "✗  start" in done.stdout
    assert "the number of ranks (1) must be a multiple of" in done.stdout
    assert "1 thing would stop a run" in done.stdout


@pytest.mark.parametrize("flag", ["tensor-model-parallel-size", "num-attention-heads"])
def test_size_of_zero_gets_a_page_and_not_a_division(flag: str) -> None:
    done = run_doctor(f"--{flag}", "0")
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"start: {flag.replace('-', '_')} (0) must be at least 1" in done.stdout


def test_file_in_the_way_of_save_would_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_doctor("--save", str(tmp_path / "file" / "run"))
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"cannot write to {tmp_path / 'file'} for --save" in " ".join(done.stdout.split())


def test_wrong_flag_is_a_matter_of_usage() -> None:
    with pytest.raises(SystemExit) as exit_:
        diagnose.main(["--tensor-model-parallel-sise", "2"])
    assert exit_.value.code == 2


def test_wrong_recipe_is_a_matter_of_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        config("--config", str(tmp_path / "none.yaml"))
    assert diagnose.main(["--config", str(tmp_path / "none.yaml")]) == 2
