"""Compute logits of converted transformers models under many layouts; one rank of test_hf_parity.

Usage: torchrun ... hf_parity_worker.py CASES.json OUT

CASES.json: [{"name": ..., "model": NAME, "flags": [...]}]. OUT/NAME.hf.pt holds, per model,
{"config", "weights" (transformers' names, fused), "tokens": {length: [b, s]}}. For each case
OUT/CASE.pt gets {"trained LENGTH" or "inferred LENGTH": logits [b, s, v]}: by the schedule and with
the sequence parallelism of training, and by the passes of inference.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron.trainer.inference.parallel_model import ParallelModel
from megatron.trainer.runtime.launch import RunContext, environment_rank, initialize, shut_down
from megatron.trainer.runtime.log import configure_logging
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.convert import family_from_config
from tests.distributed.hf_models import fill, to_native


def build(given: dict[str, Any], ctx: RunContext, cfg: PretrainConfig) -> list[nn.Module]:
    """Build this rank's chunks with the given weights, in evaluation mode."""
    chunks = list(build_chunks(cfg, ctx, seed=None).chunks)
    family = given["config"]["model_type"]
    fill(chunks, to_native(family, cfg.model, "fused", given["weights"]))
    return [chunk.eval() for chunk in chunks]


def configure(case: dict[str, Any], given: dict[str, Any], length: int) -> PretrainConfig:
    """Return the case's config with the model that transformers' config describes."""
    model = family_from_config(given["config"]).model_config(given["config"])
    flags = []
    for name, value in vars(model).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    return parse_recipe(
        [*flags, "--mock-data", "--seq-length", str(length), *case["flags"]],
        prog="worker",
        description="",
    )


def step(
    batches: Iterator[Tensor], model: nn.Module, *, vocab_size: int, group: Any
) -> tuple[Tensor, Any]:
    """Run megatron-core's forward step, returning full-vocabulary logits instead of a loss."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1])[None]
    output = model(tokens, positions, None)

    def collect(logits: Tensor, non_loss_data: bool = False) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits, group=group)[..., :vocab_size]

    return output, collect


def trained_logits(case: dict[str, Any], given: dict[str, Any]) -> dict[int, Tensor]:
    """Return logits [b, s, v] of the longest batch by the training schedule; only at its end."""
    length, tokens = max(given["tokens"].items())
    batch = len(tokens)
    extra = ["--micro-batch-size", str(batch), "--global-batch-size", str(4 * batch)]
    cfg = configure({**case, "flags": [*case["flags"], *extra]}, given, length)
    ctx = initialize(cfg)
    chunks = build(given, ctx, cfg)
    iterators = [iter([tokens]) for _ in chunks]
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=partial(step, vocab_size=cfg.model.vocab_size, group=ctx.groups.tp),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    shut_down(keep_world=True)
    return {length: results[0]} if results else {}


def inferred_logits(case: dict[str, Any], given: dict[str, Any]) -> dict[int, Tensor]:
    """Return logits [b, s, v] of every length by inference passes; empty before the last stage."""
    flags = [*case["flags"], "--no-sequence-parallel", "--global-batch-size", "4"]
    cfg = configure({**case, "flags": flags}, given, max(given["tokens"]))
    ctx = initialize(cfg, is_training=False)
    (chunk,) = build(given, ctx, cfg)
    model = ParallelModel(chunk, ctx, vocab_size=cfg.model.vocab_size)
    found = {}
    for length, tokens in given["tokens"].items():
        logits = model.logits(tokens, torch.arange(length)[None])
        if logits is not None:
            found[length] = logits
    shut_down(keep_world=True)
    return found


def run_case(case: dict[str, Any], out: Path) -> None:
    given = torch.load(out / f"{case['model']}.hf.pt", weights_only=True)
    results = {
        f"{name} {length}": logits.contiguous()
        for name, way in (("inferred", inferred_logits), ("trained", trained_logits))
        for length, logits in way(case, given).items()
    }
    # Ranks of the last stage hold the same; the last rank is one of them.
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        torch.save(results, out / f"{case['name']}.pt")
    torch.distributed.barrier()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    configure_logging(environment_rank())
    for case in cases:
        run_case(case, out)


if __name__ == "__main__":
    main()
