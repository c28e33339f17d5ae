"""What a run writes down: records, event files, wandb."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks.writers import MetricsFile, TensorBoard, WeightsAndBiases
from megatron.trainer.records.record_file import append_record, read_records
from tests.paths import REPO
from tests.unit.trainer.hooks.record_samples import evaluation, step_record


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [step_record(1, per_layer=[0.1, 1 / 3]), evaluation(1), step_record(2)]
    hook = MetricsFile(path)
    hook.on_start(0, 10)
    hook.on_log(records[0])
    hook.on_evaluation(records[1])
    hook.on_log(records[2])
    assert list(read_records(path)) == records
    assert [json.loads(line) for line in path.read_text().splitlines()] == records


def test_resumed_run_drops_the_records_that_it_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 7):
        append_record(path, step_record(iteration))
        append_record(path, evaluation(iteration))
    MetricsFile(path).on_start(4, 10)
    assert [record["iteration"] for record in read_records(path)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, step_record(1))
    MetricsFile(path).on_start(0, 10)
    assert path.read_text() == ""


def test_run_without_records_starts_without_a_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").on_start(3, 10)
    assert list(read_records(tmp_path / "metrics.jsonl")) == []


def test_tensorboard_can_read_every_number_back(tmp_path: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    hook = TensorBoard(tmp_path)
    hook.on_start(0, 2)
    for iteration in (1, 2):
        hook.on_log(step_record(iteration, layer_entropy=[1.0, 2.0]))
    hook.on_evaluation(evaluation(2))
    hook.on_end()

    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    numbers = set(step_record(1)) - {"iteration"}
    assert set(events.Tags()["scalars"]) == numbers | {"valid_loss/books", "valid_loss/code"}
    losses = [(event.step, event.value) for event in events.Scalars("lm_loss")]
    assert losses == [(1, pytest.approx(4.9)), (2, pytest.approx(4.8))]
    assert [(e.step, e.value) for e in events.Scalars("valid_loss/books")] == [(2, 4.5)]


WANDB_PROGRAM = """
import sys
from pathlib import Path
from megatron.trainer.config.schema import LoggingConfig
from megatron.trainer.hooks.writers import WeightsAndBiases
for iteration in (1, 2):
    hook = WeightsAndBiases(LoggingConfig(wandb_project="p"), Path(sys.argv[1]), {"lr": 1})
    hook.on_log({"iteration": iteration, "lm_loss": 4.0})
    hook.on_evaluation({"iteration": iteration, "valid_loss": {"books": 4.5}})
    hook.on_end()
"""


def wandb_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


def test_wandb_run_keeps_its_id_over_two_starts(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    done = subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)],
        cwd=REPO,
        env=wandb_environment(),
        check=False,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert re.fullmatch(r"[0-9a-f]{12}", run_id)
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) >= 1
    assert {name.rsplit("-", 1)[1] for name in runs} == {run_id}


def test_missing_wandb_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = (
        "wandb_project is 'p', but wandb is not installed; install the extra: pip install -e"
        " '.[wandb]', or leave --wandb-project away"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_wandb_without_a_login_is_a_message_and_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")

    def refuse(**_settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    message = (
        "wandb did not start: No API key configured. Use `wandb login` to log in.; log in, set"
        " WANDB_MODE=offline, or leave --wandb-project away"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        WeightsAndBiases(LoggingConfig(wandb_project="p"), tmp_path, {})
