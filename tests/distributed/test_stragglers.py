"""A rank made slow by sleeping is named, by how much, whatever it is that the others wait in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launcher import HERE, flags, ranks
from tests.distributed.worker_stragglers import TOLERANCE

CASES = {
    "data": flags(global_batch_size=4),
    "tensor": flags(tensor_model_parallel_size=2, global_batch_size=2),
    "pipeline": flags(pipeline_model_parallel_size=2, global_batch_size=4),
    "expert": flags(expert_model_parallel_size=2, global_batch_size=4),
    "overlap": flags(use_distributed_optimizer=True, overlap_grad_reduce=True, global_batch_size=8),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("stragglers")
    listing = [{"name": name, "flags": case} for name, case in CASES.items()]
    (out / "cases.json").write_text(json.dumps(listing))
    worker = HERE / "worker_stragglers.py"
    done = ranks(2, worker, str(out / "cases.json"), str(out), timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: json.loads((Path(out) / f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_slow_rank_is_named_with_how_slow_it_is(name: str, found: dict[str, Any]) -> None:
    case = found[name]
    # What a rank is busy: the processor time of its training thread, and what it slept.
    truth = case["truth"][1] / case["truth"][0]
    assert truth > 2, "the ranks sleep too little to show anything"
    assert case["found"]["straggler_rank"] == 1
    assert case["found"]["straggler_ratio"] == pytest.approx(truth, rel=TOLERANCE), case


def test_no_steps_give_no_figures(found: dict[str, Any]) -> None:
    assert all(case["nothing"] == case["again"] == {} for case in found.values())
