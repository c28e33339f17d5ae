"""Which known names a wrong one is taken for, and which wrong ones are just other names."""

import pytest

from megatron.trainer.config.near_names import did_you_mean, near_names

KNOWN = (
    *("adam_beta1", "adam_beta2", "bf16", "data_path", "eval_interval", "eval_iters"),
    *("exit_duration_in_mins", "expert_tensor_parallel_size", "global_batch_size", "hidden_size"),
    *("load", "lr", "lr_decay_iters", "lr_decay_style", "lr_warmup_init", "lr_warmup_iters"),
    *("lr_warmup_tokens", "micro_batch_size", "min_lr", "moe_router_topk", "norm_epsilon"),
    *("num_experts", "num_layers", "preset", "router", "save", "save_interval", "seq_length"),
    *("tensor_model_parallel_size", "tokenizer_model", "tokenizer_type", "train_iters"),
    *("train_tokens", "vocab_size"),
)

NEAR = {
    # A slip of the fingers.
    "trian_iters": ["train_iters"],
    "trian_itres": ["train_iters"],
    "save_intervall": ["save_interval"],
    "laod": ["load"],
    "bf61": ["bf16"],
    "exit_duration_in_min": ["exit_duration_in_mins"],
    # An ending, an abbreviation.
    "num_layer": ["num_layers"],
    "presets": ["preset"],
    "train_token": ["train_tokens"],
    "seq_len": ["seq_length"],
    "sequence_length": ["seq_length"],
    # Other bounds of the words.
    "microbatchsize": ["micro_batch_size"],
    "micro-batchsize": ["micro_batch_size"],
    "Data-Path": ["data_path"],
    # One word left out.
    "layers": ["num_layers"],
    "warmup_iters": ["lr_warmup_iters"],
    "moe_topk": ["moe_router_topk"],
    "tensor_parallel_size": ["tensor_model_parallel_size"],
    # Two that are equally near.
    "batch_size": ["micro_batch_size", "global_batch_size"],
    "tokenizer": ["tokenizer_model", "tokenizer_type"],
}
FAR = (
    *("rampup_batch_size", "local_batch_size", "lr_warmup_fraction", "lr_warmup_samples"),
    *("train_samples", "lr_decay_steps", "lr_decay_samples", "learning_rate", "max_lr"),
    *("min_lr_ratio", "fp16", "hidden_dim", "iters", "size", "data", "normalization"),
    *("use_flash_attn", "no_load_optim", "rope_theta", "swiglu", "lr_warmup", "moe_", "", "x"),
)


@pytest.mark.parametrize("name", NEAR)
def test_misspelt_name_is_recognised(name: str) -> None:
    assert sorted(near_names(name, KNOWN)) == sorted(NEAR[name])


@pytest.mark.parametrize("name", FAR)
def test_other_name_is_not_taken_for_a_known_one(name: str) -> None:
    assert near_names(name, KNOWN) == []


def test_every_name_is_nearest_to_itself() -> None:
    for name in KNOWN:
        assert near_names(name, KNOWN) == [name]


def test_hint_ends_a_message() -> None:
    assert did_you_mean("num_layer", KNOWN) == "; did you mean 'num_layers'?"
    known = ["train-tokenizer", "micro", "macro"]
    assert did_you_mean("train_tokenizer", known) == "; did you mean 'train-tokenizer'?"
    assert did_you_mean("mecro", known) == "; did you mean 'micro' or 'macro'?"
    assert did_you_mean("sigmoid", known) == ""
