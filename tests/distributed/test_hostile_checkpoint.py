"""Hostile files given to the real command: a message, exit status 2, and nothing in them runs.

Every file holds a live payload that would leave a canary. The manifest is rewritten with it: who
can write the one can write the other, so checksums are no protection.
"""

import dataclasses
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron.trainer.checkpoint.manifest import write_manifest
from megatron.trainer.data.writer import TokenFileWriter
from tests.distributed.launcher import REPO, Ended, alone, flags

REMEDY = (
    "a checkpoint needs no such thing, so this one was made to run code on the machine that loads"
    " it, or is damaged; do not load checkpoints from people you do not trust\n"
)
TENSOR_KEY = "decoder.final_layernorm.weight"
OBJECT_KEY = "decoder.surprise/shard_0_1"


def pretrain(*arguments: str) -> Ended:
    """The command alone, without torchrun, whose exit status would hide ours."""
    return alone(REPO / "tools" / "pretrain.py", *arguments, timeout=300)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hostile_metadata(path: Path, canary: Path) -> str:
    (path / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    name = path / ".metadata"
    return f"CheckpointError: refused to load {name}: it asks for `posix.system`; {REMEDY}"


def hostile_common(path: Path, canary: Path) -> str:
    (path / "common.pt").write_bytes(torch_bytes({"args": Payload(canary)}))
    name = path / "common.pt"
    return f"CheckpointError: refused to load {name}: it asks for `posix.system`; {REMEDY}"


def hostile_object(path: Path, canary: Path) -> str:
    """An object in a shard; a run asks for tensors only."""
    append_to_shard(path, OBJECT_KEY, torch_bytes(Payload(canary)))
    return (
        f"CheckpointError: {path} does not fit this run: 1 in the checkpoint but not wanted by this"
        f" run: {OBJECT_KEY}; use the model configuration of the run that saved it\n"
    )


def hostile_tensor(path: Path, canary: Path) -> str:
    """In place of a weight, in a shard."""
    append_to_shard(path, TENSOR_KEY, torch_bytes(Payload(canary)))
    name = f"a tensor in {path / '__0_0.distcp'}"
    return f"CheckpointError: refused to load {name}: it asks for `posix.system`; {REMEDY}"


def append_to_shard(path: Path, key: str, content: bytes) -> None:
    """Let the metadata look for one entry in bytes at the end of a shard."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if key == OBJECT_KEY:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        shown = next(iter(metadata.storage_data.values()))
        metadata.storage_data[MetadataIndex(key)] = dataclasses.replace(shown)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    shard = path / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(content)
    with shard.open("ab") as file:
        file.write(content)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS: dict[str, Callable[[Path, Path], str]] = {
    "metadata": hostile_metadata,
    "common": hostile_common,
    "object in a shard": hostile_object,
    "tensor in a shard": hostile_tensor,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def trained(shared: Path) -> Ended:
    """A run that saved a checkpoint, on data beside a hostile index cache."""
    data = shared / "data"
    data.mkdir()
    with TokenFileWriter(str(data / "tokens"), vocab_size=120) as writer:
        for _ in range(20):
            writer.add_document(range(100))
        writer.finish()
    for directory in (data, data / "cache", data / "cache" / "GPTDataset_indices"):
        directory.mkdir(exist_ok=True)
        for name in ("tokens", "0123abcd-GPTDataset-train-document_index"):
            payload = np.array([Payload(shared / "canary_npy")], dtype=object)
            np.save(directory / f"{name}.npy", payload, allow_pickle=True)
    plan = {"num_layers": 1, "train_iters": 1, "data_path": data / "tokens", "split": "9,1"}
    return pretrain(*flags(save=shared / "run", no_tensorboard=True, **plan))


@pytest.fixture(scope="module")
def loads(shared: Path, trained: Ended) -> dict[str, tuple[Ended, str]]:
    """What came of loading each attacked copy, and what should have been said."""
    assert trained.returncode == 0, trained.stderr[-6000:]
    messages = {}
    for index, (name, attack) in enumerate(ATTACKS.items()):
        root = shared / f"attack{index}"
        shutil.copytree(shared / "run", root)
        path = root / "iter_0000001"
        messages[name] = attack(path, shared / f"canary{index}")
        write_manifest(path, 1)

    def load(index: int) -> Ended:
        plan = {"num_layers": 1, "train_iters": 2, "lr_decay_iters": 1, "split": "9,1"}
        data = shared / "data" / "tokens"
        return pretrain(*flags(load=shared / f"attack{index}", data_path=data, **plan))

    return {name: (load(index), messages[name]) for index, name in enumerate(ATTACKS)}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_checkpoint_is_refused_and_not_run(
    name: str, shared: Path, loads: dict[str, tuple[Ended, str]]
) -> None:
    done, message = loads[name]
    assert done.stderr.count(message) == 1, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert not (shared / f"canary{list(ATTACKS).index(name)}").exists()


def test_the_payloads_are_live(shared: Path, loads: dict[str, tuple[Ended, str]]) -> None:
    """Read without the guards, each leaves its canary: the tests above mean something."""
    del loads
    roots = [shared / f"attack{index}" / "iter_0000001" for index in range(len(ATTACKS))]
    pickle.loads((roots[0] / ".metadata").read_bytes())
    torch.load(roots[1] / "common.pt", weights_only=False)
    for root, key in ((roots[2], OBJECT_KEY), (roots[3], TENSOR_KEY)):
        metadata = pickle.loads((root / ".metadata").read_bytes())
        info = next(info for i, info in metadata.storage_data.items() if i.fqn == key)
        content = (root / info.relative_path).read_bytes()[info.offset :][: info.length]
        torch.load(io.BytesIO(content), weights_only=False)
    for index in range(len(ATTACKS)):
        assert (shared / f"canary{index}").exists(), list(ATTACKS)[index]


def test_hostile_index_cache_beside_the_data_is_never_read(shared: Path, trained: Ended) -> None:
    assert trained.returncode == 0, trained.stderr[-6000:]
    assert not (shared / "canary_npy").exists()
    np.load(shared / "data" / "cache" / "tokens.npy", allow_pickle=True)
    assert (shared / "canary_npy").exists()


def test_recipe_that_names_a_python_object_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"wandb_name: !!python/object/apply:os.system ['touch {canary}']\n")
    done = pretrain("--config", str(recipe), *flags())
    assert done.returncode == 2
    assert done.stderr == (
        f"ConfigError: key 'wandb_name' in {recipe}:1 has the tag"
        " 'tag:yaml.org,2002:python/object/apply:os.system'; recipes take no tags, remove it\n"
    )
    assert not canary.exists()
    yaml.unsafe_load(recipe.read_text())
    assert canary.exists()
