"""A rank killed in the middle of a save, ten times: training always finds a valid checkpoint."""

import json
from pathlib import Path

from megatron.trainer.records.record_file import read_records
from tests.distributed.launcher import HERE, alone, flags, run_cases

KILLS = 10


def test_training_survives_ten_kills_during_saves(tmp_path: Path) -> None:
    # Two saves an attempt at least, and a few steps after the last kill.
    plan = {"train-iters": 4 * KILLS, "eval-iters": 1, "expert-model-parallel-size": 2}
    plan |= {"num-layers": 2, "global-batch-size": 4}
    whole = run_cases(2, {"whole": flags(**plan)}, tmp_path / "whole")["whole"]
    run = tmp_path / "run"
    settings = [*flags(**plan, save=run, load=run), "--save-interval", "1", "--keep-last", "3"]
    (tmp_path / "flags.json").write_text(json.dumps(settings))
    worker = HERE / "kill_training_worker.py"
    done = alone(worker, str(tmp_path), str(KILLS), str(tmp_path / "flags.json"), timeout=300)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr[-3000:] + log[-3000:]
    attempts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [attempt["rank"] for attempt in attempts[:-1]] == [0, 1] * (KILLS // 2)
    assert attempts[-1] == {"statuses": [0, 0]}, log[-3000:]
    assert log.count("resumed ") == KILLS, log[-3000:]

    # The patched-together run is the run that was never killed: every step's loss, bitwise.
    losses = {
        r["iteration"]: r["lm_loss"] for r in read_records(run / "metrics.jsonl") if "lm_loss" in r
    }
    assert losses == dict(zip(range(1, 4 * KILLS + 1), whole.series("lm_loss"), strict=True))
