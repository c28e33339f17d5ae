"""Check layouts that are valid for inference but not for training."""

import dataclasses

import pytest

from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_app.pretrain.config import PretrainConfig
from moe_ext.config import MoEModelConfig

CONFIG = PretrainConfig(
    model=MoEModelConfig(num_experts=4, moe_router_topk=2),
    parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=False),
    training=TrainingConfig(seq_length=33, global_batch_size=2),
)


def test_moe_under_tp_needs_sequence_parallelism_only_to_train() -> None:
    validate(CONFIG, 2, is_training=False)
    with pytest.raises(ConfigError, match=r"sequence_parallel \(False\) must be on"):
        validate(CONFIG, 2)


def test_invalid_layout_is_refused_for_inference_too() -> None:
    parallel = dataclasses.replace(CONFIG.parallel, expert_model_parallel_size=3)
    cfg = dataclasses.replace(CONFIG, parallel=parallel)
    with pytest.raises(ConfigError, match=r"num_experts \(4\) must be a multiple of"):
        validate(cfg, 6, is_training=False)
