"""A step is the mean over all counted tokens, whichever rank counts how many of them."""

import json
from pathlib import Path

import pytest

from tests.distributed.launcher import flags, ranks

WORKER = Path(__file__).with_name("masks_worker.py")
# Without auxiliary losses, which are means over every token, counted in the loss or not.
ALONE: dict[str, object] = {"moe-aux-loss-coeff": 0, "moe-z-loss-coeff": 0, "clip-grad": 0}
LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {},
    "cp2": {"context-parallel-size": 2},
    "pp2": {"pipeline-model-parallel-size": 2},
}
Steps = list[list[float]]
"""Loss and gradient norm of each step."""


def steps_of(num_ranks: int, cases: dict[str, list[str]], out: Path) -> dict[str, Steps]:
    out.mkdir()
    (out / "cases.json").write_text(json.dumps(cases))
    done = ranks(num_ranks, WORKER, str(out / "cases.json"), str(out / "found.json"))
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Steps] = json.loads((out / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Steps]:
    out = tmp_path_factory.mktemp("masks")
    two = {name: flags(**ALONE, **layout) for name, layout in LAYOUTS.items()}
    return {**steps_of(1, {"one": flags(**ALONE)}, out / "1"), **steps_of(2, two, out / "2")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_unequal_numbers_of_tokens_weigh_alike(name: str, found: dict[str, Steps]) -> None:
    # fp32 sums in another order: 1e-5 on losses, 1e-4 on the gradient norm, relative.
    for (loss, norm), (true_loss, true_norm) in zip(found[name], found["one"], strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
