"""Adapters of both families: merged at export, and as peft loads them, with equal results."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megatron.trainer.checkpoint import find_checkpoint
from megatron.trainer.checkpoint.save import save_checkpoint
from megatron.trainer.config.cli import dump_config
from megatron.trainer.errors import UserError
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.launch import initialize, shut_down
from megatron.trainer.state import model_state
from moe_app.convert.arguments import parse_args
from moe_app.convert.convert_checkpoint import main, run
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.convert.peft_form import peft_tensors
from moe_ext.layers.lora import is_adapter
from tests.distributed.convert_models import make_hf

pytest.importorskip("peft")

LORA = ["--lora-rank", "3", "--lora-alpha", "5", "--lora-targets", "attention,experts,router"]
Results = dict[str, Any]


def with_adapters(root: Path, family: str) -> tuple[Path, Path, Results]:
    """Make a model, import it, and save it with random adapters and what they compute."""
    base, weights = make_hf(root / "base", family, "fused", dtype=torch.float32)
    # Of a usual size, so that rounding does not grow from layer to layer.
    smaller = {
        name: tensor * (0.15 if tensor.dim() > 1 else 1.0) for name, tensor in weights.items()
    }
    save_file(smaller, base / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", "--hf", str(base), "--save", str(root / "imported")]) == 0
    found = find_checkpoint(root / "imported")
    recipe = ["--config", str(found.path / CONFIG_NAME), *LORA, "--seed", "3", "--seq-length", "16"]
    cfg: PretrainConfig = parse_recipe(
        [*recipe, "--moe-aux-loss-coeff", "0", "--moe-z-loss-coeff", "0"],
        prog="test",
        description="",
    )
    ctx = initialize(cfg)
    (module,) = build_chunks(cfg, ctx, seed=3).chunks
    load_weights([module], found, lacking=(".lora",))
    cfg.trainable.apply([module], cfg.model)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    tokens = torch.randint(cfg.model.vocab_size, (2, 16), generator=generator)
    positions = torch.arange(16)[None]
    losses = module(tokens, positions, None, labels=tokens.roll(-1, 1))
    losses[:, :-1].mean().backward()
    results: Results = {"tokens": tokens, "gradients": _peft_gradients(module, cfg, family)}
    with torch.no_grad():
        results["logits"] = module(tokens, positions, None)[..., : cfg.model.vocab_size]
    files = {CONFIG_NAME: dump_config(cfg), "run.json": '{"weights_only": true, "iteration": 1}'}
    save_checkpoint(root / "run", 1, model_state([module]), files=files)
    shut_down()
    return base, root / "run", results


def _peft_gradients(module: nn.Module, cfg: PretrainConfig, family: str) -> Results:
    """Gradients of A and B under peft's names: the map of values is linear."""
    lora = cfg.trainable.lora
    assert lora is not None

    def stacked(name: str) -> torch.Tensor:
        own, part = name.removeprefix("decoder.layers."), []
        for layer in range(cfg.model.num_layers):
            gradient = module.get_parameter(f"decoder.layers.{layer}.{own}").grad
            assert gradient is not None
            part.append(gradient)
        return torch.stack(part)

    return dict(peft_tensors(family, cfg.model, lora, stacked))


@pytest.fixture(scope="module", params=["olmoe", "jetmoe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    return request.param, root, *with_adapters(root, request.param)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def test_an_export_merges_adapters(made: Any) -> None:
    _, root, base, run_directory, results = made
    out = root / "merged"
    assert main(["export", "--load", str(run_directory), "--hf", str(out), "--no-tokenizer"]) == 0
    with torch.no_grad():
        close(reference(out)(results["tokens"]).logits, results["logits"])
        other = reference(base)(results["tokens"]).logits
    assert (other - results["logits"]).abs().max() > 0.1 * results["logits"].abs().max()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_peft_loads_adapters_with_equal_logits_and_gradients(made: Any) -> None:
    from peft import PeftModel

    _, root, base, run_directory, results = made
    out = root / "adapter"
    call = ["export", "--load", str(run_directory), "--hf", str(out), "--adapter"]
    assert main([*call, "--base", str(base)]) == 0
    model = PeftModel.from_pretrained(reference(base), out, is_trainable=True)
    tokens = results["tokens"]
    logits = model(tokens).logits
    close(logits.detach(), results["logits"])
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    losses.backward()
    found = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == results["gradients"].keys()
    for name, gradient in results["gradients"].items():
        mine = found[name]
        assert mine is not None and gradient.any(), name
        close(mine, gradient)


def test_an_adapter_needs_a_run_with_adapters(made: Any, tmp_path: Path) -> None:
    _, root, _, run_directory, _ = made
    call = ["export", "--load", str(root / "imported"), "--hf", str(tmp_path / "a"), "--adapter"]
    with pytest.raises(UserError, match=re.escape("has no adapters (its run had no --lora-rank)")):
        run(parse_args(call))
    call = ["export", "--load", str(run_directory), "--hf", str(tmp_path / "b"), "--adapter"]
    with pytest.raises(UserError, match="--verify compares whole models"):
        run(parse_args([*call, "--verify"]))
