"""Resumes a run directory that an earlier version of the code has written.

`run_0.1.0.tar.gz` holds two token files (`data`), a run stopped after 4 of 8 steps (`run`), and the
records of the same run without a stop (`expected.jsonl`), all of before the packages got rooms.
"""

import json
import tarfile
from pathlib import Path

import pytest

from megatron.trainer.records.history import RunHistory
from tests.distributed.launcher import alone
from tests.paths import REPO

ARCHIVE = Path(__file__).with_name("run_0.1.0.tar.gz")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


def test_earlier_run_is_read(earlier: Path) -> None:
    history = RunHistory(earlier / "run")
    history.refresh()
    assert history.iteration == 4


def test_earlier_run_resumes_from_its_checkpoint_and_config(earlier: Path) -> None:
    flags = ["--config", "run/config.yaml", "--load", "run", "--exit-interval", "100"]
    done = alone(REPO / "tools/pretrain.py", *flags, cwd=earlier, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = (
        [json.loads(line) for line in (earlier / name).read_text().splitlines()]
        for name in ("run/metrics.jsonl", "expected.jsonl")
    )
    assert [each["iteration"] for each in found] == [each["iteration"] for each in expected]
    keys = {"lm_loss", "grad_norm", "load_balancing_loss", "z_loss", "learning_rate", "valid_loss"}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["consumed_tokens_per_source"] == theirs["consumed_tokens_per_source"]
        for key in keys & set(theirs):
            # Another processor may round otherwise.
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), key
