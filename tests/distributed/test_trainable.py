"""What is frozen keeps its bits, the rest trains as on one rank, in every layout."""

from pathlib import Path

import pytest
import torch

from megatron.trainer.checkpoint import CheckpointReader
from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import Outcome, flags, run_cases

SHORT: dict[str, object] = {
    **{"train-iters": 2, "lr-decay-iters": 4, "eval-iters": 1},
    **{"num-layers": 2, "global-batch-size": 4},
}
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
# Above the rounding of gradients that are next to nothing, as those of A are at first.
LORA: dict[str, object] = {
    **SHORT,
    "train-iters": 3,
    "adam-eps": 1e-5,
    "lora-rank": 4,
    "lora-targets": "attention,experts,router",
}
LORA_JETMOE: dict[str, object] = {**JETMOE, **LORA}
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
WHOLE: dict[str, object] = {
    "num-experts": "None",
    "ffn-hidden-size": 40,
    "moe-output-bias": False,
    "lora-targets": "attention",
}
"""Whole sequences on every tensor parallel rank, which experts do not allow."""
ONE_RANK |= {
    "lora": LORA,
    "lorajetmoe": LORA_JETMOE,
    "lorajetmoe_recompute": {**LORA_JETMOE, "recompute-granularity": "full"},
    "loradense": {**LORA, **WHOLE, "attention": "standard"},
    "loramoadense": {**LORA_JETMOE, **WHOLE},
}
TWO_RANKS |= {
    "lora_tp2": {**LORA, **TP2},
    "lora_tp2_etp1_distributed": {
        **LORA,
        **TP2,
        "expert-tensor-parallel-size": 1,
        "use-distributed-optimizer": True,
    },
    "lora_etp2_recompute": {
        **LORA,
        "expert-tensor-parallel-size": 2,
        "recompute-granularity": "full",
    },
    "lora_ep2_distributed": {
        **LORA,
        "expert-model-parallel-size": 2,
        "use-distributed-optimizer": True,
    },
    "lora_pp2": {**LORA, "pipeline-model-parallel-size": 2},
    "lora_cp2": {**LORA, "context-parallel-size": 2},
    "lorajetmoe_tp2": {**LORA_JETMOE, **TP2},
    "lorajetmoe_ep2": {**LORA_JETMOE, "expert-model-parallel-size": 2},
    "loradense_tp2": {
        **LORA,
        **WHOLE,
        "attention": "standard",
        **TP2,
        "no-sequence-parallel": True,
    },
    "loramoadense_tp2": {**LORA_JETMOE, **WHOLE, **TP2, "no-sequence-parallel": True},
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
    still: dict[str, object] = {"lr": 1e-30, "min-lr": 1e-30, "train-iters": 1}
    one["initial"] = flags(**{**SHORT, **still})
    for name in ("lora", "lorajetmoe", "loradense", "loramoadense"):
        one[f"{name}_initial"] = flags(**{**ONE_RANK[name], **still})
    two = {name: flags(**case) for name, case in TWO_RANKS.items()}
    saved = {**BF16, "save": root / "bf16"}
    two["bf16"] = flags(**{**BF16, "train-iters": 4})
    two["bf16_stopped"] = flags(**saved)
    two["bf16_resumed"] = flags(**{**BF16, "train-iters": 4, "load": root / "bf16"})
    lora = {**LORA, "bf16": True, "use-distributed-optimizer": True}
    two["lorabf16"] = flags(**{**lora, "train-iters": 4})
    two["lorabf16_stopped"] = flags(**{**lora, "train-iters": 2, "save": root / "lora"})
    two["lorabf16_resumed"] = flags(**{**lora, "train-iters": 4, "load": root / "lora"})
    two["lora_from_full"] = flags(**{**lora, "load": root / "bf16", "finetune": True})
    two["lora_from_lora"] = flags(**{**lora, "load": root / "lora", "finetune": True})
    two["lora_continues_full"] = flags(**{**lora, "load": root / "bf16"})
    two["full_from_lora"] = flags(**{**SHORT, "load": root / "lora", "finetune": True})
    rmsprop = {**SHORT, "optimizer": "rmsprop", "use-distributed-optimizer": True}
    two["rmsprop"] = flags(**{**rmsprop, "train-iters": 4})
    two["rmsprop_stopped"] = flags(**{**rmsprop, "save": root / "rmsprop"})
    two["rmsprop_resumed"] = flags(**{**rmsprop, "train-iters": 4, "load": root / "rmsprop"})
    two["bf16_other"] = flags(**{**BF16, "freeze": "router", "load": root / "bf16"})
    return {**run_cases(1, one, root / "1"), **run_cases(2, two, root / "2")}


def of(name: str, outcomes: dict[str, Outcome]) -> Outcome:
    assert outcomes[name].error is None, outcomes[name].error
    return outcomes[name]


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_frozen_weights_keep_their_bits_and_the_others_move(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    first = name.split("_")[0]
    frozen = FROZEN.get(first, ())
    initial = of("initial" if frozen else f"{first}_initial", outcomes).weights
    found = of(name, outcomes).weights
    assert found.keys() == initial.keys()
    for key, before in initial.items():
        is_frozen = any(part in key for part in frozen) if frozen else ".lora" not in key
        assert torch.equal(found[key], before) == is_frozen, key


@pytest.mark.parametrize("name", ["embedding_recompute", "lorajetmoe_recompute", *TWO_RANKS])
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


@pytest.mark.parametrize("name", ["bf16", "lorabf16"])
def test_a_run_with_frozen_weights_resumes_bitwise(name: str, outcomes: dict[str, Outcome]) -> None:
    whole, resumed = of(name, outcomes), of(f"{name}_resumed", outcomes)
    for key in ("lm_loss", "grad_norm", "learning_rate"):
        assert resumed.series(key) == whole.series(key)[-2:], key
    assert all(torch.equal(resumed.weights[key], whole.weights[key]) for key in whole.weights)


def test_a_run_cannot_go_on_with_other_groups_frozen(outcomes: dict[str, Outcome]) -> None:
    assert "--finetune" in (outcomes["bf16_other"].error or "")
    assert "froze embedding, router, norm, this one router" in (outcomes["bf16_other"].error or "")


def test_adapters_start_as_no_change(outcomes: dict[str, Outcome]) -> None:
    first = of("lora", outcomes).series("lm_loss")[0]
    assert first == of("initial", outcomes).series("lm_loss")[0]
    drawn = of("lora_initial", outcomes).weights
    for key, weight in drawn.items():
        if key.endswith(".b") and ".lora" in key:
            assert weight.abs().max() < 1e-29, key  # one step at next to no learning rate
        elif key.endswith(".a") and ".lora" in key:
            bound = weight.shape[-1] ** -0.5
            assert 0.8 * bound < weight.abs().max() <= bound, key
            assert weight.unique().numel() > 0.99 * weight.numel(), key


def test_adapters_start_from_weights_alone_and_from_adapters(outcomes: dict[str, Outcome]) -> None:
    stopped = of("bf16_stopped", outcomes).weights
    for key, weight in of("lora_from_full", outcomes).weights.items():
        assert ".lora" in key or torch.equal(weight, stopped[key]), key
    before = of("lorabf16_stopped", outcomes).series("lm_loss")
    again = of("lora_from_lora", outcomes).series("lm_loss")
    fresh = of("lorabf16", outcomes).series("lm_loss")
    assert before == fresh[:2]
    assert again[0] != fresh[0]  # the same samples, with the adapters of two steps


def test_checkpoints_of_other_adapters_are_refused(outcomes: dict[str, Outcome]) -> None:
    assert "of a run without adapters" in (outcomes["lora_continues_full"].error or "")
    error = outcomes["full_from_lora"].error or ""
    assert "adapters of rank 4 and alpha 8 on attention, experts, router" in error
    assert "merges them" in error


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
