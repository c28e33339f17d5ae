"""Holds the benchmark that alternates commands to its turns, its shape and its tokens."""

import dataclasses
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pretrain_turns import NATIVE, Trainer, measure, write_commands, write_tokens
from benchmarks.shapes import SHAPES
from moe_app.pretrain.config import parse_recipe

COUNTING = """
import itertools, sys, time
for step in itertools.count(1):
    time.sleep(0.02)
    open(sys.argv[1], "w").write(str(step))
    print(f"iteration {step}/9", flush=True)
"""


def test_a_command_stands_still_between_its_turns(tmp_path: Path) -> None:
    seen = tmp_path / "step"
    trainer = Trainer("counter", [sys.executable, "-c", COUNTING, str(seen)], tmp_path)
    try:
        trainer.run(3)
        before = seen.read_text()
        time.sleep(1.0)
        assert seen.read_text() == before
        seconds, _ = trainer.run(4)
        assert int(seen.read_text()) >= 7
        assert 4 * seconds < 1.0  # the pause is not counted
    finally:
        trainer.close()


def test_a_command_that_ends_is_named_with_what_it_wrote(tmp_path: Path) -> None:
    commands = {"short": [sys.executable, "-c", "print('iteration 1/1'); print('out of data')"]}
    with pytest.raises(RuntimeError, match=r"short ended too early(.|\n)*out of data"):
        measure(commands, rounds=1, steps=1, warmup=2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_sides_train_the_shape(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoConfig

    shape = SHAPES["olmoe_toy"]
    commands = write_commands(tmp_path, shape, dtype, 2)
    cfg = parse_recipe(commands[NATIVE][2:], prog="turns", description="")
    expert_backend = cfg.model.expert_backend
    assert cfg.model == dataclasses.replace(shape.model, expert_backend=expert_backend)
    assert cfg.training.bf16 == (dtype == "bf16")
    assert cfg.training.micro_batch_size == cfg.training.global_batch_size == 2
    peer = AutoConfig.from_pretrained(tmp_path)
    assert (peer.num_experts, peer.hidden_size, peer.vocab_size) == (16, 32, 256)
    kinds = {part for command in commands.values() for part in command if "--kind" in part}
    in_bf16 = {"--kind=bf16", "--kind=autocast"} if cfg.training.bf16 else set()
    assert kinds == {"--kind=fp32", *in_bf16}


def test_the_peer_reads_every_token_once_and_predicts_the_next(tmp_path: Path) -> None:
    from benchmarks.transformers_loop import read_batches

    shape = SHAPES["olmoe_toy"]
    write_tokens(tmp_path / "zipf", shape, 2)
    ids = np.fromfile(tmp_path / "zipf.bin", dtype=np.uint16)
    assert np.bincount(ids)[0] > np.bincount(ids)[8:].max()
    batches = list(itertools.islice(read_batches(tmp_path / "zipf.bin", 2, 16), 4))
    tokens = np.concatenate([tokens.flatten().numpy() for tokens, _ in batches])
    labels = np.concatenate([labels.flatten().numpy() for _, labels in batches])
    assert np.array_equal(tokens, ids[:128])
    assert np.array_equal(labels, ids[1:129])
