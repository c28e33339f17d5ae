"""Tests each validation rule's exact message and its boundary."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron.trainer.config.schema import ParallelConfig, RunConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_ext.config import MoEModelConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Holds every group, like the config of an application."""

    model: MoEModelConfig = field(default_factory=MoEModelConfig)


def config(**changes: Any) -> PretrainConfig:
    """Return the defaults with fields changed by name, whatever their group."""
    cfg = PretrainConfig()
    groups = {}
    for group in dataclasses.fields(cfg):
        values = getattr(cfg, group.name)
        names = {each.name for each in dataclasses.fields(values)} & changes.keys()
        groups[group.name] = dataclasses.replace(values, **{n: changes.pop(n) for n in names})
    assert not changes
    return PretrainConfig(**groups)


def message_of(world_size: int, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config(**changes), world_size)
    return str(caught.value)


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
VP = "num_virtual_stages_per_pipeline_rank"
DENSE = {"num_experts": None, "ffn_hidden_size": 256}

LAYOUT_RULES: list[tuple[int, dict[str, Any], str]] = [
    (
        6,
        {TP: 2, PP: 2, "global_batch_size": 12},
        "the number of ranks (6) must be a multiple of tensor_model_parallel_size x"
        " pipeline_model_parallel_size (2 x 2 = 4); start 4 or 8 ranks, or change these sizes\n"
        "the number of ranks (6) must be a multiple of expert_tensor_parallel_size x"
        " expert_model_parallel_size x pipeline_model_parallel_size (2 x 1 x 2 = 4); start 4 or 8"
        " ranks, or change these sizes",
    ),
    (
        1,
        {TP: 2, ETP: 1},
        "the number of ranks (1) must be a multiple of tensor_model_parallel_size x"
        " pipeline_model_parallel_size (2 x 1 = 2); start 2 ranks, or change these sizes",
    ),
    (
        2,
        {EP: 4},
        "the number of ranks (2) must be a multiple of expert_tensor_parallel_size x"
        " expert_model_parallel_size x pipeline_model_parallel_size (1 x 4 x 1 = 4); start 4 ranks,"
        " or change these sizes",
    ),
    (
        2,
        {"sequence_parallel": True},
        "sequence_parallel (True) needs tensor_model_parallel_size (1) above 1, because it splits"
        " the sequence over the tensor parallel ranks; drop --sequence-parallel, or use a tensor"
        " parallel size of 2 or more",
    ),
    (
        2,
        {TP: 2, "sequence_parallel": False},
        "sequence_parallel (False) must be on when a model with num_experts (64) has"
        " tensor_model_parallel_size (2) above 1, or megatron-core refuses to train; drop"
        " --no-sequence-parallel, or use a tensor parallel size of 1",
    ),
    (
        1,
        {VP: 2},
        "num_virtual_stages_per_pipeline_rank (2) needs pipeline_model_parallel_size (1) above 1,"
        " because it interleaves pipeline stages; use 1 virtual stage, or a pipeline parallel size"
        " of 2 or more",
    ),
    (
        2,
        {"micro_batch_size": 2, "global_batch_size": 10},
        "global_batch_size (10) must be a multiple of micro_batch_size x data parallel size (2 x 2"
        " = 4); use a global batch size of 8 or 12",
    ),
    (
        4,
        {"micro_batch_size": 4, "global_batch_size": 8},
        "global_batch_size (8) must be a multiple of micro_batch_size x data parallel size (4 x 4"
        " = 16); use a global batch size of 16",
    ),
    (
        2,
        {PP: 2, VP: 2, "global_batch_size": 3},
        "global_batch_size (3) gives each data parallel rank 3 micro-batches, which"
        " num_virtual_stages_per_pipeline_rank (2) requires in multiples of"
        " pipeline_model_parallel_size (2); use a global batch size of 2 or 4",
    ),
    (
        4,
        {PP: 2, VP: 2, "global_batch_size": 5},
        "global_batch_size (5) must be a multiple of micro_batch_size x data parallel size (1 x 2"
        " = 2); use a global batch size of 4 or 8",
    ),
    (
        2,
        {TP: 2, "seq_length": 9},
        "seq_length (9) must be a multiple of tensor_model_parallel_size (2); use"
        " tensor_model_parallel_size 1, 3 or 9",
    ),
    (
        2,
        {TP: 2, "num_attention_heads": 3, "kv_channels": 4},
        "num_attention_heads (3) must be a multiple of tensor_model_parallel_size (2); use"
        " tensor_model_parallel_size 1 or 3",
    ),
    (
        2,
        {TP: 2, "num_query_groups": 1},
        "num_query_groups (1) must be a multiple of tensor_model_parallel_size (2); use"
        " tensor_model_parallel_size 1",
    ),
    (
        4,
        {EP: 4, "num_experts": 6, "moe_router_topk": 2},
        "num_experts (6) must be a multiple of expert_model_parallel_size (4); use"
        " expert_model_parallel_size 1, 2, 3 or 6",
    ),
    (
        2,
        {ETP: 2, "moe_ffn_hidden_size": 15},
        "moe_ffn_hidden_size (15) must be a multiple of expert_tensor_parallel_size (2); use"
        " expert_tensor_parallel_size 1, 3, 5 or 15",
    ),
    (
        2,
        {TP: 2, "moe_ffn_hidden_size": 15},  # by default the experts are cut like the rest
        "moe_ffn_hidden_size (15) must be a multiple of expert_tensor_parallel_size (2); use"
        " expert_tensor_parallel_size 1, 3, 5 or 15",
    ),
    (
        2,
        {TP: 2, **DENSE, "ffn_hidden_size": 25},
        "ffn_hidden_size (25) must be a multiple of tensor_model_parallel_size (2); use"
        " tensor_model_parallel_size 1, 5 or 25",
    ),
    (
        2,
        {TP: 2, "vocab_size": 31, "make_vocab_size_divisible_by": 3},
        "the padded vocabulary (33, vocab_size 31 rounded up) must be a multiple of"
        " tensor_model_parallel_size (2); set make_vocab_size_divisible_by (3) to a multiple of it",
    ),
    (
        2,
        {EP: 2, **DENSE},
        "expert_model_parallel_size (2) must be 1 for a dense model (num_experts None); set it to"
        " 1, or set num_experts",
    ),
    (
        2,
        {PP: 2, VP: 2, "num_layers": 6},
        "num_layers (6) must be a multiple of pipeline_model_parallel_size x"
        " num_virtual_stages_per_pipeline_rank (2 x 2 = 4); use 4 or 8 layers, or other sizes whose"
        " product is 1, 2, 3 or 6",
    ),
]

RECOMPUTE_RULES: list[tuple[int, dict[str, Any], str]] = [
    (
        2,
        {PP: 2, "recompute_granularity": "full", "recompute_num_layers": 3},
        "recompute_num_layers (3) must divide the layers of a pipeline stage (2) with"
        " recompute_method uniform; use one of 1, 2",
    ),
    (
        2,
        {
            PP: 2,
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 3,
        },
        "recompute_num_layers (3) must be at most the layers of a pipeline stage (2) with"
        " recompute_method block; use 1 to 2",
    ),
    (
        1,
        {"recompute_modules": ("moe", "core_atn")},
        "recompute_modules has an unknown name ('core_atn'); did you mean 'core_attn'? use any of"
        " core_attn, moe, moe_act",
    ),
    (
        1,
        {"recompute_modules": ("zzz",)},
        "recompute_modules has an unknown name ('zzz'); use any of core_attn, moe, moe_act",
    ),
    (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ()},
        "recompute_modules (none) must name a module when recompute_granularity is selective; use"
        " any of core_attn, moe, moe_act",
    ),
]

OPTIMIZER_RULES: list[tuple[int, dict[str, Any], str]] = [
    (
        1,
        {"lr": 0.0, "min_lr": 0.0},
        "lr (0.0) must be above 0; use a positive number",
    ),
    (1, {"adam_eps": 0.0}, "adam_eps (0.0) must be above 0; use a positive number"),
    *[
        (
            1,
            {name: value},
            f"{name} ({value}) must be at least 0 and below 1; use 0.9 or 0.95, for example",
        )
        for name in ("adam_beta1", "adam_beta2")
        for value in (1.0, -0.1)
    ],
    *[
        (
            1,
            {name: -1.0},
            f"{name} (-1.0) must not be negative; use 0 to switch it off",
        )
        for name in ("weight_decay", "clip_grad")
    ],
    (
        1,
        {"lr": 1e-4, "min_lr": 2e-4},
        "min_lr (0.0002) must be at least 0 and at most lr (0.0001); lower min_lr, or raise lr",
    ),
    (
        1,
        {"lr": 1e-4, "min_lr": 0.0, "lr_warmup_init": 2e-4},
        "lr_warmup_init (0.0002) must be at least 0 and at most lr (0.0001); lower lr_warmup_init,"
        " or raise lr",
    ),
    (
        1,
        {"lr_warmup_iters": 100},
        "lr_warmup_iters (100) must be below train_iters (100), the step at which the decay ends;"
        " use fewer warm-up steps, or raise train_iters",
    ),
    (
        1,
        {"lr_warmup_iters": 50, "lr_decay_iters": 40},
        "lr_warmup_iters (50) must be below lr_decay_iters (40), the step at which the decay ends;"
        " use fewer warm-up steps, or raise lr_decay_iters",
    ),
    (1, {"lr_warmup_iters": -1}, "lr_warmup_iters (-1) must be at least 0; use 0 or more"),
    (1, {"num_workers": -1}, "num_workers (-1) must be at least 0; use 0 or more"),
    (1, {"num_workers": 1025}, "num_workers (1025) must be at most 1024 global batches; use a few"),
    (
        1,
        {"lr": float("inf")},
        "lr (inf) must be finite; use an ordinary number",
    ),
    (
        1,
        {"clip_grad": float("nan")},
        "clip_grad (nan) must be finite; use an ordinary number",
    ),
]

CHECKPOINT_RULES: list[tuple[int, dict[str, Any], str]] = [
    (
        1,
        {"save_interval": 5},
        "save_interval (5) needs save (None), the directory to write to; set --save DIR, or drop"
        " --save-interval",
    ),
    (
        1,
        {"ckpt_step": 5},
        "ckpt_step (5) needs load (None), the directory to read from; set --load DIR, or drop"
        " --ckpt-step",
    ),
    (
        1,
        {"finetune": True},
        "finetune (True) needs load (None), the directory whose weights to take; set --load DIR, or"
        " drop --finetune",
    ),
    (
        1,
        {"wandb_project": "moe"},
        "wandb_project ('moe') needs save (None), because the run's id is kept in the run"
        " directory; set --save DIR, or drop --wandb-project",
    ),
]

LEAST = {
    **dict.fromkeys((TP, PP, VP, EP, ETP, "context_parallel_size"), 1),
    **dict.fromkeys(("distributed_timeout_minutes", "threads_per_rank"), 1),
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "seq_length", "train_iters"), 1),
    **dict.fromkeys(("recompute_num_layers", "eval_iters", "keep_last", "log_interval"), 1),
    **dict.fromkeys(("seed", "eval_interval", "ckpt_step", "save_interval"), 0),
}
MODEL_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "vocab_size"),
    *("make_vocab_size_divisible_by", "moa_num_experts", "moa_router_topk"),
)


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    LAYOUT_RULES + RECOMPUTE_RULES + OPTIMIZER_RULES + CHECKPOINT_RULES,
)
def test_each_rule_names_both_values_and_a_remedy(
    world_size: int, changes: dict[str, Any], expected: str
) -> None:
    problems = expected.split("\n")
    if len(problems) > 1:
        expected = f"{len(problems)} settings are wrong:\n- " + "\n- ".join(problems)
    assert message_of(world_size, changes) == expected


@pytest.mark.parametrize("name", LEAST)
def test_sizes_have_a_least_value(name: str) -> None:
    least = LEAST[name]
    given_too = {"load": "runs/a"} if name == "ckpt_step" else {}
    expected = f"{name} ({least - 1}) must be at least {least}; use {least} or more"
    # train_iters is also the end of the decay, which gets its own line.
    assert expected in message_of(1, {name: least - 1, **given_too}).replace("- ", "").split("\n")
    validate(config(**{name: least, **given_too}), 1)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (3, {"global_batch_size": 9}),
        (4, {TP: 2, PP: 2}),
        (4, {TP: 2, PP: 2, "sequence_parallel": True}),
        (4, {TP: 2, EP: 2, ETP: 1}),
        (4, {TP: 4, EP: 4, ETP: 1, "use_distributed_optimizer": True}),
        (2, {TP: 2, "sequence_parallel": False, "seq_length": 9, **DENSE}),
        (2, {PP: 2, VP: 2, "overlap_grad_reduce": True}),
        (2, {PP: 2, "global_batch_size": 1}),  # fewer micro-batches than stages: slow, not wrong
        (1, {"recompute_granularity": "full", "recompute_num_layers": 4}),
        (1, {"recompute_granularity": "full", "recompute_method": "block"}),
        (1, {"recompute_num_layers": 99}),  # nothing is recomputed
        (1, {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}),
        (1, {"lr": 1e-5, "lr_decay_style": "constant"}),  # min_lr is not reached
        (1, {"lr": 1e-3, "min_lr": 1e-3, "lr_warmup_init": 1e-3}),
        (1, {"min_lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "adam_beta1": 0.0}),
        (1, {"lr_warmup_iters": 99}),
        (1, {"lr_warmup_iters": 40, "lr_decay_iters": 200}),
        (1, {"save": "runs/a", "save_interval": 5, "wandb_project": "moe", "keep_last": 1}),
        (1, {"load": "runs/a", "ckpt_step": 0, "finetune": True}),
        (1, {"device": "cpu", "bf16": True}),
        (1, {"hidden_size": 100, "num_attention_heads": 3, "kv_channels": 2}),
        (1, {"num_experts": 8, "moe_router_topk": 8}),
        (1, {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0}),
        (1, {"moe_router_topk": 64, "num_query_groups": 2}),
        (1, DENSE),
    ],
)
def test_valid_settings_pass(world_size: int, changes: dict[str, Any]) -> None:
    validate(config(**changes), world_size)


def test_every_problem_is_listed_at_once_and_the_config_is_untouched() -> None:
    cfg = config(lr=-1.0, num_experts=4, save_interval=5, micro_batch_size=3)
    before = dataclasses.asdict(cfg)
    with pytest.raises(ConfigError) as caught:
        validate(cfg, 1)
    lines = str(caught.value).split("\n")
    assert lines[0] == "6 settings are wrong:"
    starts = ["moe_router_topk", "global_batch_size", "lr (", "lr_warmup_init", "min_lr", "save_i"]
    assert [line[2 : 2 + len(s)] for line, s in zip(lines[1:], starts, strict=True)] == starts
    assert dataclasses.asdict(cfg) == before


def test_sizes_of_zero_do_not_raise_division_errors() -> None:
    zeros = dict.fromkeys(LEAST, 0) | dict.fromkeys(MODEL_SIZES, 0)
    message = message_of(1, zeros)
    for name in (*MODEL_SIZES, *(name for name in LEAST if LEAST[name] == 1)):
        assert f"\n- {name} (0) must be at least 1" in message


@pytest.mark.parametrize("cfg", [RunConfig(), config()])
def test_a_config_without_a_model_group_is_an_internal_error(cfg: RunConfig) -> None:
    if isinstance(cfg, PretrainConfig):
        cfg = dataclasses.replace(cfg, model=ParallelConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=re.escape("which lacks num_layers, problems() or")):
        validate(cfg, 1)
