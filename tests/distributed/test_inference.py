"""Compare generation and scoring under every layout with full forward passes in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.trainer.runtime.launch import connect, shut_down
from moe_app.infer import open_model
from moe_app.pretrain import command
from tests.distributed.jetmoe_cases import FAMILIES
from tests.distributed.launcher import HERE, flags, ranks

# From torch when it reads a checkpoint, and from megatron-core about its embedding and loss.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

# Sums in another order, of fp32 logits of a few units.
TOLERANCE = 1e-5
VOCAB = 120
NEW = 5
TP, PP, EP = (f"--{kind}-model-parallel-size" for kind in ("tensor", "pipeline", "expert"))
ETP = "--expert-tensor-parallel-size"
TWO_RANKS = {
    "tp2": [TP, "2"],
    "tp2_etp1": [TP, "2", ETP, "1"],
    "tp2_ep2_etp1": [TP, "2", EP, "2", ETP, "1"],
    "pp2": [PP, "2"],
    "ep2": [EP, "2"],
    "dp2": [],
}
FOUR_RANKS = {
    "tp2_ep2": [TP, "2", EP, "2"],
    "tp2_ep2_etp1": [TP, "2", EP, "2", ETP, "1"],
    "tp2_pp2": [TP, "2", PP, "2"],
    "pp2_ep2": [PP, "2", EP, "2"],
}


def random_rows(*lengths: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


# Five prompts in batches of two: data parallel ranks hold unequal numbers of them, and in the
# last round one rank has none.
PROMPTS = random_rows(3, 9, 1, 14, 6, seed=1)
ROWS = random_rows(12, 5, 1, 33, 2, 20, 20, seed=2)
# Some differ in their last token alone and share a row; one continues greedily (see `truth`).
CONTINUATIONS = [
    *((row, count) for row, count in zip(ROWS, (4, 2, 0, 32, 1, 1, 19), strict=True) if count),
    *(([*ROWS[1][:-1], last], 2) for last in (7, 60, 119)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train one step of each family, with weights large enough to matter."""
    # torch.device("meta") caches its factories on first use: fill it before they are patched.
    torch.utils._device._device_constructors()
    runs = {}
    for family, settings in FAMILIES.items():
        runs[family] = tmp_path_factory.mktemp("inference") / family
        arguments = flags(
            **settings,
            save=runs[family],
            seq_length=33,
            train_iters=1,
            init_method_std=0.1,  # logits of order one: fp32 rounding stays well below 1e-5
            log_interval=1,
        )
        assert command.main(arguments) == 0
    return runs


@pytest.fixture(scope="module")
def truth(checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Compute results by full forward passes in this process, token by token."""
    return {family: reference_results(run) for family, run in checkpoints.items()}


def reference_results(run: Path) -> dict[str, Any]:
    args = parse(["--load", str(run)])
    connect(open_model.parallel_config(args))
    try:
        loaded = open_model.load_model(args, open_model.open_checkpoint(args, prog="test"))
        module = loaded.module
        texts = [generate_without_cache(module, ids) for ids in PROMPTS]
        scores = []
        for row in ROWS:
            log_probs = full_forward(module, row).log_softmax(dim=-1)[:-1]
            labels = torch.tensor(row[1:], dtype=torch.int64)[:, None]
            scores.append(log_probs.gather(1, labels)[:, 0].tolist())
        # What greedy decoding adds to a prompt is a continuation that is greedy.
        asked = [*CONTINUATIONS, (PROMPTS[1] + texts[1], NEW)]
        return {
            "asked": asked,
            "continuations": [score_continuation(module, *each) for each in asked],
            "greedy": texts,
            "scores": scores,
            "logits": full_forward(module, ROWS[-1])[:-1],
        }
    finally:
        shut_down()


def parse(arguments: list[str]) -> Any:
    from moe_app.infer import generate

    return generate.make_parser().parse_args([*arguments, "--prompt", ""])


@torch.no_grad()
def full_forward(module: nn.Module, ids: list[int]) -> Tensor:
    """Return logits [s, v] of the real vocabulary."""
    positions = torch.arange(len(ids))[None]
    logits: Tensor = module(torch.tensor([ids]), positions, None)[0, :, :VOCAB]
    return logits.float()


def score_continuation(module: nn.Module, ids: list[int], count: int) -> tuple[float, bool]:
    log_probs = full_forward(module, ids).log_softmax(dim=-1)[-1 - count : -1]  # [count, v]
    labels = torch.tensor(ids[-count:])
    total = float(log_probs[torch.arange(count), labels].sum())
    return total, bool((log_probs.argmax(dim=-1) == labels).all())


def generate_without_cache(module: nn.Module, ids: list[int]) -> list[int]:
    text = list(ids)
    for _ in range(NEW):
        text.append(int(full_forward(module, text)[-1].argmax()))
    return text[len(ids) :]


def run_layouts(
    num_ranks: int,
    layouts: dict[str, list[str]],
    checkpoints: dict[str, Path],
    out: Path,
    truth: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    cases = {
        f"{family}_{name}": ["--load", str(run), "--batch-size", "2", *layout]
        for family, run in checkpoints.items()
        for name, layout in layouts.items()
    }
    asked = {
        f"{family}_{name}": {
            "continuations": truth[family]["asked"],
            "stop_text": "".join(f"<{token}>" for token in truth[family]["greedy"][1][2:4]),
        }
        for family in checkpoints
        for name in layouts
    }
    task = {"prompts": PROMPTS, "rows": ROWS, "stop_id": -1, "new": NEW, "cases": cases} | {
        "asked": asked
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / "task.json"
    file.write_text(json.dumps(task))
    worker = HERE / "worker_inference.py"
    done = ranks(num_ranks, worker, str(file), str(out), timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def one(
    checkpoints: dict[str, Path], truth: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return run_layouts(1, {"one": []}, checkpoints, tmp_path_factory.mktemp("one"), truth)


@pytest.fixture(scope="module")
def two(
    checkpoints: dict[str, Path], truth: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return run_layouts(2, TWO_RANKS, checkpoints, tmp_path_factory.mktemp("two"), truth)


@pytest.fixture(scope="module")
def four(
    checkpoints: dict[str, Path], truth: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return run_layouts(4, FOUR_RANKS, checkpoints, tmp_path_factory.mktemp("four"), truth)


def up_to(text: list[int], stop: list[int]) -> list[int]:
    ends = [index for index in range(2, len(text) + 1) if text[index - 2 : index] == stop]
    return text[: ends[0]] if ends else text


def compare(found: dict[str, Any], truth: dict[str, Any]) -> None:
    assert not found["sequence_parallel"]
    assert found["greedy"] == truth["greedy"]
    for values, expected in zip(found["scores"], truth["scores"], strict=True):
        assert values == pytest.approx(expected, abs=TOLERANCE, rel=0)
    evaluation = found["evaluation"]
    for answer, expected in zip(evaluation["continuations"], truth["continuations"], strict=True):
        assert answer == [pytest.approx(expected[0], abs=4 * TOLERANCE, rel=0), expected[1]]
    expected = [each[0] for each in truth["continuations"]]
    assert evaluation["texts"] == pytest.approx(expected, abs=4 * TOLERANCE, rel=0)
    stop = truth["greedy"][1][2:4]
    assert evaluation["generations"] == [up_to(text, stop) for text in truth["greedy"]]
    # When one rank's logits are not finite, all ranks raise and none hangs.
    assert found["non_finite_error"].startswith(
        f"{VOCAB} of {VOCAB} logits are not finite; a valid model"
    )
    logits = torch.tensor(found["logits"])
    torch.testing.assert_close(logits, truth["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_matches_full_forward_passes(
    family: str, one: dict[str, Any], truth: dict[str, Any]
) -> None:
    compare(one[f"{family}_one"], truth[family])
    assert len({token for text in truth[family]["greedy"] for token in text}) > 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", TWO_RANKS)
def test_two_ranks_match_full_forward_passes(
    family: str, layout: str, one: dict[str, Any], two: dict[str, Any], truth: dict[str, Any]
) -> None:
    compare(two[f"{family}_{layout}"], truth[family])
    assert two[f"{family}_{layout}"]["sampled"] == one[f"{family}_one"]["sampled"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", FOUR_RANKS)
def test_four_ranks_match_full_forward_passes(
    family: str, layout: str, one: dict[str, Any], four: dict[str, Any], truth: dict[str, Any]
) -> None:
    compare(four[f"{family}_{layout}"], truth[family])
    assert four[f"{family}_{layout}"]["sampled"] == one[f"{family}_one"]["sampled"]
