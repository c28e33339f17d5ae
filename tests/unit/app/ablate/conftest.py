"""A recipe and files of studies for tests of sweeps."""

from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
preset: olmoe_tiny
num_layers: 2
hidden_size: 32
num_attention_heads: 4
num_query_groups: 4
num_experts: 8
moe_router_topk: 2
moe_ffn_hidden_size: 16
vocab_size: 96
micro_batch_size: 2
global_batch_size: 4
seq_length: 16
train_iters: 40
lr: 3.0e-3
min_lr: 3.0e-4
lr_warmup_fraction: 0.1
mock_data: true
save: elsewhere
save_interval: 10
"""
RUNS = """\
  base: {}
  no_balancing: {moe_aux_loss_coeff: 0.0}
"""
STUDIES = """\
  - name: balancing
    runs: {base: with, no_balancing: without}
    better: base
"""

WriteStudies = Callable[..., Path]


@pytest.fixture
def write_studies(tmp_path: Path) -> WriteStudies:
    """Write a file of studies and the recipe that it changes."""

    def write(runs: str = RUNS, studies: str = STUDIES, seeds: str = "[1, 2, 3]") -> Path:
        recipe, path = tmp_path / "recipe.yaml", tmp_path / "studies.yaml"
        recipe.write_text(RECIPE)
        path.write_text(
            f"recipe: {recipe}\nseeds: {seeds}\nruns:\n{runs}studies:\n{studies}", "utf-8"
        )
        return path

    return write
