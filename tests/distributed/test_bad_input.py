"""Bad input to the real command on two ranks: one clear message, no hang, nothing half-written."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.checkpoint import find_checkpoint
from megatron.trainer.checkpoint.manifest import verify_manifest
from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import REPO, flags, ranks

PRETRAIN = REPO / "tools" / "pretrain.py"
JOURNAL = {".lock", "ended.json", "events.jsonl"}
Done = subprocess.CompletedProcess[str]

# A collective that waited for a lost rank would take ten minutes.
TIMEOUT_S = 300


def pretrain(*arguments: str) -> Done:
    return ranks(2, PRETRAIN, *arguments, timeout=TIMEOUT_S)


def assert_refused(done: Done, message: str) -> None:
    """The message once, no traceback of ours, and a status that a job script notices."""
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count(message) == 1, said[-6000:]
    assert "Traceback (most recent call last)" not in said, said[-6000:]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def tokens(shared: Path) -> Path:
    """A whole token file; ids are 0 to 99."""
    prefix = shared / "tokens"
    with TokenFileWriter(str(prefix), vocab_size=100) as writer:
        for _ in range(20):
            writer.add_document(range(100))
        writer.finish()
    return prefix


@pytest.fixture(scope="module")
def run(shared: Path) -> Path:
    """A run with checkpoints of iterations 1 and 2."""
    root = shared / "run"
    done = pretrain(*flags(save=root, save_interval=1, train_iters=2, no_tensorboard=True))
    assert done.returncode == 0, done.stderr[-6000:]
    assert (root / "iter_0000002").is_dir()
    return root


def copy_tokens(tokens: Path, target: Path, *suffixes: str) -> Path:
    for suffix in suffixes:
        shutil.copyfile(f"{tokens}{suffix}", f"{target}{suffix}")
    return target


def test_unknown_flag_names_the_nearest(tmp_path: Path) -> None:
    done = pretrain(*flags(save=tmp_path / "run"), "--train-iter", "3")
    assert_refused(done, "Unrecognized options: --train-iter")
    assert (done.stdout + done.stderr).count("--train-iters INT") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_key_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\ntrian_iters: 5\n")
    done = pretrain("--config", str(recipe), *flags(save=tmp_path / "run"))
    expected = "ConfigError: unknown key 'trian_iters' in {}:2; did you mean 'train_iters'?\n"
    assert_refused(done, expected.format(recipe))
    assert list(tmp_path.iterdir()) == [recipe]


def test_experts_that_do_not_divide_are_refused_with_the_choices(tmp_path: Path) -> None:
    done = pretrain(
        *flags(save=tmp_path / "run", num_experts=5, expert_model_parallel_size=2),
    )
    assert_refused(
        done,
        "ConfigError: num_experts (5) must be a multiple of expert_model_parallel_size (2); use"
        " expert_model_parallel_size 1 or 5\n",
    )
    assert list(tmp_path.iterdir()) == []


def without_index(tokens: Path, directory: Path) -> tuple[Path, str]:
    prefix = copy_tokens(tokens, directory / "data", ".bin")
    return prefix, (
        f"DataError: {prefix}.idx does not exist or is not a file; the prefix '{prefix}' must name"
        " two files, PREFIX.bin and PREFIX.idx; check the path, and give it without .bin or .idx\n"
    )


def truncated(tokens: Path, directory: Path) -> tuple[Path, str]:
    prefix = copy_tokens(tokens, directory / "data", ".bin", ".idx")
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(1001)
    return prefix, (
        f"DataError: {prefix}.bin has 1001 bytes, but {prefix}.idx describes 2000 tokens of 2 bytes"
        " = 4000 bytes; both must agree; write it again with tools/preprocess_data.py or copy it"
        " again\n"
    )


def beyond_the_vocabulary(tokens: Path, directory: Path) -> tuple[Path, str]:
    """The model of this test has 90 ids."""
    prefix = copy_tokens(tokens, directory / "data", ".bin", ".idx")
    return prefix, (
        f"DataError: {prefix}.bin: token 90 has id 90, but the vocabulary has 90 ids; ids must be 0"
        " to 89; preprocess the data with this model's tokenizer or raise --vocab-size\n"
    )


@pytest.mark.parametrize("damage", [without_index, truncated, beyond_the_vocabulary])
def test_damaged_data_is_refused_before_training(
    damage: Callable[[Path, Path], tuple[Path, str]], tokens: Path, tmp_path: Path
) -> None:
    prefix, message = damage(tokens, tmp_path)
    there, run = sorted(tmp_path.iterdir()), tmp_path / "run"
    done = pretrain(*flags(save=run, data_path=prefix, vocab_size=90))
    assert_refused(done, message)
    # Only the word of how it ended is left.
    assert sorted(tmp_path.iterdir()) == [*there, run]
    assert {path.name for path in run.iterdir()} == JOURNAL
    ended = json.loads((run / "ended.json").read_text())
    assert (ended["reason"], f"DataError: {ended['detail']}\n") == ("error", message)


def load(root: Path, **overrides: Any) -> Done:
    return pretrain(*flags(load=root, save=root, train_iters=4, lr_decay_iters=2, **overrides))


def test_named_checkpoint_without_a_shard_is_refused(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    (root / "iter_0000001" / "__1_0.distcp").unlink()
    before = listing(root)
    assert_refused(
        load(root, ckpt_step=1),
        f"CheckpointError: the checkpoint of iteration 1 in {root} is damaged (iter_0000001:"
        " __1_0.distcp is missing); ask for another with --ckpt-step, or leave --ckpt-step out to"
        " take the newest valid one\n",
    )
    assert listing(root) == before


def test_checkpoint_of_another_architecture_lists_the_differences(
    run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(run, root)
    before = listing(root)
    path = root / "iter_0000002"
    assert_refused(
        load(root, num_layers=2, num_experts=8, attention="standard"),
        f"CheckpointError: {path} was saved by a run with another configuration:\n"
        "  attention: checkpoint full_width_qk_norm, this run standard\n"
        "  num_experts: checkpoint 6, this run 8\n"
        "  num_layers: checkpoint 4, this run 2\n"
        "set these to the checkpoint's values (its own are in"
        f" {path / 'config.yaml'}), or start without --load\n",
    )
    assert listing(root) == before


def test_run_that_is_not_continued_keeps_its_end(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("ended.json", "events.jsonl")}
    done = pretrain(*flags(save=run, train_iters=4))
    assert_refused(done, f"CheckpointError: {run} holds an earlier run; continue it with --load")
    assert {name: (run / name).read_bytes() for name in before} == before


def listing(root: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a run but its journal, with its time of change and contents."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name not in JOURNAL]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_loss_that_is_not_a_number_ends_the_run_and_spares_the_checkpoints(tmp_path: Path) -> None:
    """The learning rate rises from 0 to absurd: the third step finds the damage of the second."""
    root = tmp_path / "run"
    steps = {"lr_warmup_iters": 2, "lr_decay_iters": 9, "save_interval": 1, "lr": 1e18}
    done = pretrain(*flags(save=root, no_tensorboard=True, train_iters=4, **steps))
    assert_refused(
        done,
        "StepRefusedError: loss is nan at iteration 3, in global samples 16 to 17, 18 to 19,"
        " 20 to 21, 22 to 23; the weights were not updated and no checkpoint was written. Resume"
        " from the last checkpoint with a lower --lr, or look at those samples\n",
    )
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    for path in root.glob("iter_*"):
        assert verify_manifest(path, checksums=True) == []
    assert find_checkpoint(root).iteration == 2

    # The checkpoint before the damage goes on under a plan that ends in time.
    again = pretrain(*flags(load=root, ckpt_step=1, train_iters=2, **steps, save=tmp_path / "b"))
    assert again.returncode == 0, again.stderr[-6000:]
    assert f"resumed {root / 'iter_0000001'} at iteration 1, 8 samples consumed" in again.stderr
