"""Upcycled models compute what a dense one does, with its feed-forward layers times the gates.

The truth is transformers' dense LLaMA, with a loop over experts that are cut out of its matrices.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.trainer.checkpoint import CheckpointReader, find_checkpoint
from megatron.trainer.data.writer import write_index
from moe_app.upcycle import upcycle_command
from tests.distributed.launcher import alone, flags
from tests.paths import REPO

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ROWS = torch.randint(100, (3, 40), generator=torch.Generator().manual_seed(2))
RULES: dict[str, tuple[str, ...]] = {
    "olmoe": ("--num-experts", "8", "--moe-router-topk", "2"),
    "granular": ("--num-experts", "8", "--moe-router-topk", "4", "--granularity", "4"),
    "preserving": (
        *("--num-experts", "8", "--moe-router-topk", "4", "--granularity", "2"),
        "--preserve-function",
    ),
    "shared": ("--num-experts", "8", "--moe-router-topk", "2", "--shared"),
    "every second layer": (
        *("--num-experts", "8", "--moe-router-topk", "2", "--shared"),
        *("--moe-layer-freq", "2"),
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    where = tmp_path_factory.mktemp("dense") / "hf"
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    model.save_pretrained(where)
    return where, model


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokens") / "t"
    values = torch.randint(100, (1000,), generator=torch.Generator().manual_seed(4)).numpy()
    prefix.with_suffix(".bin").write_bytes(values.astype(np.uint16).tobytes())
    lengths = prefix.with_suffix(".lengths")
    lengths.write_bytes(np.array([1000], "<i4").tobytes())
    with lengths.open("rb") as file:
        write_index(prefix.with_suffix(".idx"), file, dtype=np.dtype(np.uint16))
    return str(prefix)


def stored(run: Path, key: str) -> Tensor:
    found = find_checkpoint(run)
    with CheckpointReader(found.path) as reader:
        shape = reader.tensors[key].shape
        return reader.read(key, (0,) * len(shape), shape)


def by_hand(
    mlp: torch.nn.Module, router: Tensor, topk: int, parts: int, *, renorm: bool, shared: bool
) -> Any:
    """A forward of a LLaMA's feed-forward layer as experts cut out of it."""

    def forward(hidden: Tensor) -> Tensor:
        gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        width = len(gate) // parts
        probabilities = (hidden @ router.T).softmax(-1)
        chosen = probabilities.topk(topk, dim=-1)
        output = torch.zeros_like(hidden)
        if shared:
            output = (silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
        for expert in range(len(router)):
            own = slice(expert % parts * width, (expert % parts + 1) * width)
            computed = (silu(hidden @ gate[own].T) * (hidden @ up[own].T)) @ down[:, own].T
            weights = chosen.values / chosen.values.sum(-1, keepdim=True) * parts
            weights = weights if renorm else chosen.values
            weight = (weights * (chosen.indices == expert)).sum(-1, keepdim=True)
            output = output + weight * computed
        return output

    return forward


@pytest.mark.parametrize("name", RULES)
def test_first_logits_are_those_of_experts_cut_out_by_hand(
    name: str,
    llama: tuple[Path, LlamaForCausalLM],
    tokens: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, model = llama
    run = tmp_path / "run"
    rule = RULES[name]
    done = alone(
        REPO / "tools/upcycle.py",
        *("--hf", str(source), "--save", str(run), *rule),
        *("--data-path", tokens, "--check-tokens", "600"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((run / "upcycling.json").read_text())["first_loss"]
    windows = np.memmap(f"{tokens}.bin", np.uint16)[: 9 * 64 + 1]
    assert losses["dense"] == pytest.approx(mean_loss(model, windows), rel=1e-5)

    topk, parts = int(rule[3]), int(rule[5]) if "--granularity" in rule else 1
    for layer, router in routers_of(model, run, is_interleaved="--moe-layer-freq" in rule):
        renorm, shared = ("--preserve-function" in rule, "--shared" in rule)
        forward = by_hand(layer.mlp, router, topk, parts, renorm=renorm, shared=shared)
        monkeypatch.setattr(layer.mlp, "forward", forward)
    expected = mean_loss(model, windows)
    assert losses["predicted"] == pytest.approx(expected, rel=1e-5)
    assert losses["measured"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "rows").write_text(
        "".join(json.dumps({"tokens": row}) + "\n" for row in ROWS.tolist())
    )
    done = alone(
        REPO / "tools/score.py",
        *("--load", str(run), "--input", str(tmp_path / "rows")),
        *("--output", str(tmp_path / "scores"), "--logits", str(tmp_path / "logits.npy")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        truth = model(ROWS).logits[:, :-1]
    found = torch.from_numpy(np.load(tmp_path / "logits.npy", allow_pickle=False))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def routers_of(
    model: LlamaForCausalLM, run: Path, *, is_interleaved: bool
) -> list[tuple[Any, Tensor]]:
    """Pair layers with their routers; interleaved, the second alone has one."""
    if is_interleaved:
        assert torch.equal(  # the first is as it was
            stored(run, "decoder.layers.0.mlp.linear_fc2.weight"),
            model.model.layers[0].mlp.down_proj.weight,
        )
        return [(model.model.layers[1], stored(run, "decoder.layers.1.mlp.router.weight"))]
    routers = stored(run, "decoder.layers.mlp.router.weight")
    return list(zip(model.model.layers, routers, strict=True))


def mean_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Of windows of 64 tokens."""
    rows = torch.tensor(tokens.astype(np.int64))
    total = 0.0
    for start in range(0, len(rows) - 1, 64):
        with torch.no_grad():
            logits = model(rows[start : start + 64][None]).logits[0]
        labels = rows[start + 1 : start + 65]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / (len(rows) - 1)


def test_run_becomes_experts_and_trains_on(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num-experts": "None", "ffn-hidden-size": 40, "train-iters": 2}
    dense, run = tmp_path / "dense", tmp_path / "run"
    assert alone(REPO / "tools/pretrain.py", *flags(**sizes, save=dense)).returncode == 0
    rule = ("--num-experts", "4", "--moe-router-topk", "2", "--dtype", "bf16")
    assert upcycle_command.main(["--load", str(dense), "--save", str(run), *rule]) == 0
    fc1 = stored(dense, "decoder.layers.mlp.linear_fc1.weight")  # [L, 2 f, h]
    experts = stored(run, "decoder.layers.mlp.experts.weight1")  # [L, e, 2, f, h]
    for expert in range(4):
        assert torch.equal(experts[:, expert], fc1.unflatten(1, (2, -1)).bfloat16())
    for key in ("embedding.word_embeddings.weight", "decoder.layers.self_attention.q_norm.weight"):
        assert torch.equal(stored(run, key), stored(dense, key).bfloat16())
    sizes = {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 40, "train-iters": 1}
    more = flags(**sizes, bf16=True, load=run, save=tmp_path / "more")
    done = alone(REPO / "tools/pretrain.py", *more)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda _: None, ("--granularity", "3"), "must be a positive multiple of the granularity"),
        (lambda _: None, ("--moe-layer-freq", "3"), "moe_layer_freq (3) must be at most num_la"),
        (lambda _: None, ("--noise", "nan"), "'nan' must be from 0 to 1"),
        (
            lambda hf: edit(hf, model_type="gpt2"),
            (),
            "model_type is 'gpt2'; a dense model must be one of llama, olmo; convert",
        ),
        (lambda hf: edit(hf, intermediate_size=44), (), "have another shape"),
        (lambda hf: edit(hf, attention_bias=True), (), "attention projections have no bias"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    change: Callable[[Path], None],
    arguments: tuple[str, ...],
    message: str,
    llama: tuple[Path, LlamaForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in llama[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    base = ["--hf", str(copy), "--save", str(tmp_path / "run"), *RULES["olmoe"]]
    try:
        status = upcycle_command.main([*base, *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def edit(hf: Path, **fields: object) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, **fields}))
