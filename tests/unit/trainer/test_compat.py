"""Load under this line of megatron-core what each supported line has saved, bit for bit.

The archives were written by compat_archives.py, on one machine, with torch 2.13.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.trainer.checkpoint import find_checkpoint, load_checkpoint
from megatron.trainer.checkpoint.saved_run import read_run
from megatron.trainer.state import TrainState, apply_state, request_state, take_data
from moe_ext.compat import LINES
from tests.unit.trainer.compat_archives import SETTINGS, archive, digests, third_step

VERSIONS = [line.tested for line in LINES]


def unpack(version: str, where: Path) -> Path:
    with tarfile.open(archive(version)) as packed:
        packed.extractall(where, filter="data")
    return where / "run"


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_of_each_line_is_loaded_bitwise_and_trains_on(
    version: str, make_state: Callable[..., TrainState], tmp_path: Path
) -> None:
    run = unpack(version, tmp_path)
    truth = json.loads((run / "truth.json").read_text())
    state = make_state(**SETTINGS)
    found = find_checkpoint(run)
    saved = read_run(found)
    request = request_state(state, saved)
    take_data(state, saved)
    before = dict(digests(request))
    loaded = load_checkpoint(found.path, request)
    after = dict(digests(loaded))
    assert after == truth["state"]
    assert sum(before[place] != digest for place, digest in after.items()) > len(after) // 2
    apply_state(state, loaded, saved)
    # Another processor may round otherwise.
    assert third_step(state) == pytest.approx(truth["step"], rel=1e-5)


def test_the_lines_train_and_save_the_same_bits(tmp_path: Path) -> None:
    older, newer = (
        json.loads((unpack(version, tmp_path / version) / "truth.json").read_text())
        for version in VERSIONS
    )
    assert older == newer
    assert len(older["state"]) > 20
