"""What is frozen keeps its bits, the rest trains as on one rank, in every layout."""

from pathlib import Path

import pytest
import torch

from megatron.trainer.checkpoint import CheckpointReader
from tests.distributed.launcher import Outcome, flags, run_cases

SHORT: dict[str, object] = {"train-iters": 2, "lr-decay-iters": 4, "eval-iters": 1}
SOME: dict[str, object] = {
    **SHORT,
    "freeze": "router,embedding,norm",
    "lr-multipliers": "experts=0.5",
    "weight-decay-multipliers": "head=0",
}
HEAD: dict[str, object] = {**SHORT, "freeze": "embedding,attention,router,experts,norm"}
"""Under PP 2 the first stage has nothing to train."""
NO_EMBEDDING: dict[str, object] = {**SHORT, "freeze": "embedding"}

ONE_RANK: dict[str, dict[str, object]] = {
    "some": SOME,
    "head": HEAD,
    "embedding": NO_EMBEDDING,
    "embedding_recompute": {**NO_EMBEDDING, "recompute-granularity": "full"},
}
TWO_RANKS: dict[str, dict[str, object]] = {
    "some_tp2": {**SOME, "tensor-model-parallel-size": 2},
    "some_pp2": {**SOME, "pipeline-model-parallel-size": 2},
    "some_ep2_distributed": {
        **SOME,
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "some_cp2_recompute": {
        **SOME,
        "context-parallel-size": 2,
        "recompute-granularity": "full",
    },
    "head_pp2": {**HEAD, "pipeline-model-parallel-size": 2, "use-distributed-optimizer": True},
}
BF16: dict[str, object] = {**SOME, "bf16": True, "use-distributed-optimizer": True}
FROZEN = {
    "some": ("router", "word_embeddings", "norm"),
    "head": ("decoder", "word_embeddings"),
    "embedding": ("word_embeddings",),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainable")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[str, Outcome]:
    one = {name: flags(**case) for name, case in ONE_RANK.items()}
    one["initial"] = flags(**{**SHORT, "lr": 1e-30, "min-lr": 1e-30})
    two = {name: flags(**case) for name, case in TWO_RANKS.items()}
    saved = {**BF16, "save": root / "bf16"}
    two["bf16"] = flags(**{**BF16, "train-iters": 4})
    two["bf16_stopped"] = flags(**saved)
    two["bf16_resumed"] = flags(**{**BF16, "train-iters": 4, "load": root / "bf16"})
    two["bf16_other"] = flags(**{**BF16, "freeze": "router", "load": root / "bf16"})
    return {**run_cases(1, one, root / "1"), **run_cases(2, two, root / "2")}


def of(name: str, outcomes: dict[str, Outcome]) -> Outcome:
    assert outcomes[name].error is None, outcomes[name].error
    return outcomes[name]


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_frozen_weights_keep_their_bits_and_the_others_move(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    frozen = FROZEN[name.split("_")[0]]
    initial = of("initial", outcomes).weights
    found = of(name, outcomes).weights
    assert found.keys() == initial.keys()
    for key, before in initial.items():
        is_frozen = any(part in key for part in frozen)
        assert torch.equal(found[key], before) == is_frozen, key


@pytest.mark.parametrize("name", ["embedding_recompute", *TWO_RANKS])
def test_every_layout_trains_what_is_not_frozen_alike(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    truth = of(name.split("_")[0], outcomes)
    found = of(name, outcomes)
    for key, tolerance in {"lm_loss": 1e-5, "grad_norm": 1e-4}.items():
        assert found.series(key) == pytest.approx(truth.series(key), rel=tolerance), key
    for key, weight in truth.weights.items():
        difference = torch.linalg.vector_norm((found.weights[key] - weight).double())
        assert difference <= 1e-4 * torch.linalg.vector_norm(weight.double()), key


def test_a_run_with_frozen_weights_resumes_bitwise(outcomes: dict[str, Outcome]) -> None:
    whole, resumed = of("bf16", outcomes), of("bf16_resumed", outcomes)
    for key in ("lm_loss", "grad_norm", "learning_rate"):
        assert resumed.series(key) == whole.series(key)[-2:], key
    assert all(torch.equal(resumed.weights[key], whole.weights[key]) for key in whole.weights)


def test_a_run_cannot_go_on_with_other_groups_frozen(outcomes: dict[str, Outcome]) -> None:
    assert "--finetune" in (outcomes["bf16_other"].error or "")
    assert "froze embedding, router, norm, this one router" in (outcomes["bf16_other"].error or "")


def test_a_checkpoint_keeps_optimizer_state_of_what_trains_alone(
    outcomes: dict[str, Outcome], root: Path
) -> None:
    of("bf16_stopped", outcomes)
    (path,) = Path(root, "bf16").glob("iter_*")
    with CheckpointReader(path) as reader:
        keys = set(reader.tensors)
    states = {key for key in keys if key.startswith("optimizer.state.exp_avg.")}
    assert any("experts" in key for key in states)
    for key in states:
        assert not any(part in key for part in FROZEN["some"]), key
