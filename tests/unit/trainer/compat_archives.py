"""Write the archive of a run's checkpoint by the installed line of megatron-core.

    python -m tests.unit.trainer.compat_archives

`mcore_VERSION.tar.gz` gets a run directory whose checkpoint was saved after two of three steps, and
`truth.json`: a digest of every tensor of the state that was in memory then, and the loss and the
gradient norm of the third step.
"""

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.resume import checkpoint_writer
from megatron.trainer.runtime.launch import initialize, shut_down
from megatron.trainer.state import TrainState, sharded_state
from megatron.trainer.step import train_step
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import parse_recipe
from tests.distributed.launcher import flags

SETTINGS: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 8,
    "vocab_size": 32,
    "seq_length": 8,
    "global_batch_size": 2,
    "train_iters": 3,
    "threads_per_rank": 1,
}


def archive(line: str) -> Path:
    """Return the archive of a version of megatron-core."""
    return Path(__file__).with_name(f"mcore_{line}.tar.gz")


def digests(state: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place and the digest of each tensor in nested containers, sharded or loaded."""
    if isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in pairs:
            yield from digests(value, f"{path}/{key}")
    elif isinstance(state, ShardedTensor | ShardedTensorFactory):
        yield from digests(state.data, path)
    elif isinstance(state, torch.Tensor):
        data = state.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield path, f"{state.dtype} {tuple(state.shape)} {hashlib.sha256(data).hexdigest()}"


def third_step(state: TrainState) -> dict[str, float]:
    """Train one step and return its loss and gradient norm."""
    result = train_step(state, NEXT_TOKEN)
    return {"lm_loss": float(result.loss), "grad_norm": float(result.grad_norm)}


def main() -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as where:
        root = Path(where) / "run"
        cfg = parse_recipe(flags(device="cpu", **SETTINGS, save=root), prog="lines", description="")
        state = build_state(cfg, initialize(cfg))
        for _ in range(2):
            train_step(state, NEXT_TOKEN)
        truth: dict[str, Any] = {"state": dict(digests(sharded_state(state)))}
        write = checkpoint_writer(state)
        assert write is not None
        write(state)
        truth["step"] = third_step(state)
        (root / "truth.json").write_text(json.dumps(truth, indent=1))
        shut_down()
        with tarfile.open(archive(version("megatron-core")), "w:gz") as packed:
            packed.add(root, "run")


if __name__ == "__main__":
    main()
