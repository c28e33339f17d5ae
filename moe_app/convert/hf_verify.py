"""Verify that a native checkpoint and a Hugging Face directory are the same model, by their logits.

Both models see the same random tokens, one after the other, so that only one is in memory at a
time. Used by convert_checkpoint.py.
"""

import gc
import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from megatron.trainer.checkpoint import FoundCheckpoint
from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.hf_files.directory import read_json
from megatron.trainer.records.run_dir import CONFIG_NAME
from megatron.trainer.resume import load_weights
from megatron.trainer.runtime.launch import initialize, shut_down
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import PretrainConfig, read_saved_config
from moe_ext.convert import family_from_config
from moe_ext.counting import count_parameters

logger = logging.getLogger("verify")

FP32_TOLERANCE = 2.0e-5
"""Largest difference of two fp32 logits of standard deviation up to 1; scaled above that. Two
summation orders differ by a tenth of it."""

OLDEST_TRANSFORMERS = Version("5.3")
"""The first release in which a config.json cannot execute code."""

_ADAPTER_NAME = "adapter_config.json"

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measures how far apart the logits of two models are, over the same tokens."""

    max_abs: float
    """Largest absolute difference."""
    mean_abs: float
    """Mean absolute difference."""
    std: float
    """Standard deviation of the Hugging Face logits, the scale of the differences."""
    top1_agreement: float
    """Share of positions where both rank the same token first."""
    mean_kl: float
    """Mean of KL(Hugging Face || native) over positions, nats."""


def verify(
    found: FoundCheckpoint,
    hf: Path,
    *,
    precision: Precision | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int = 2,
    length: int = 64,
    seed: int = 1,
    same_weights: bool | None = None,
) -> dict[str, Any]:
    """Run both models on the same random tokens and compare their logits.

    In float32, which holds bfloat16 weights exactly, the largest difference must be at most
    `FP32_TOLERANCE`, times the logits' standard deviation where that is above 1. In bfloat16 the
    mean difference must be at most `bf16_tolerance`: rounding can flip a close choice of experts,
    after which single logits differ much more.

    Args:
        found: the native checkpoint.
        hf: directory with config.json and safetensors files.
        precision: of the computation; None means float32, or bfloat16 if one side's weights are
            rounded from the other's or memory is short.
        device: device to compute on.
        batch_size: number of sequences.
        length: tokens per sequence, limited to what both models allow.
        seed: of the random tokens.
        same_weights: whether both sides hold the same values, in whatever precision; None means
            yes if their precisions are equal.

    Returns:
        What was compared, how, and the outcome, ready for JSON; `passed` is the verdict.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: one of the models cannot be loaded.
    """
    transformers = import_transformers()
    saved = read_saved_config(found.path / CONFIG_NAME, prog="hf_verify")
    hf_config = _read_config(hf)
    precision, reason = (
        (precision, "requested")
        if precision
        else _choose_precision(saved, hf_config, device, same_weights)
    )
    limit = min(saved.training.seq_length, hf_config.get("max_position_embeddings") or length)
    length = min(length, limit)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(saved.model.vocab_size, (batch_size, length), generator=generator)
    logger.info(
        "comparing logits of %d x %d random tokens in %s (%s)", *tokens.shape, precision, reason
    )
    cfg = PretrainConfig(
        trainable=saved.trainable,
        model=replace(saved.model, moe_token_dispatcher_type="alltoall", expert_backend="auto"),
        parallel=ParallelConfig(device=device),
        training=TrainingConfig(
            seq_length=length, bf16=precision == "bfloat16", global_batch_size=1
        ),
    )
    ctx = initialize(cfg, is_training=False)
    try:
        native = _native_logits(cfg, ctx, found, tokens)
        reference = _reference_logits(transformers, hf, tokens, precision, ctx.device)
    finally:
        shut_down()
    comparison = compare(reference, native)
    tolerance, value, quantity = _criterion(comparison, precision, saved.model.num_layers)
    passed = value <= tolerance
    log = logger.info if passed else logger.error
    log(
        "logits %s: %s %.3g, tolerance %.3g; same first token at %.1f %% of positions, KL %.3g",
        "agree" if passed else "DIFFER",
        quantity,
        value,
        tolerance,
        100 * comparison.top1_agreement,
        comparison.mean_kl,
    )
    return {
        "passed": passed,
        "criterion": f"{quantity} <= tolerance",
        "tolerance": tolerance,
        **vars(comparison),
        "compute_dtype": precision,
        "compute_dtype_because": reason,
        "batch_size": batch_size,
        "length": length,
        "seed": seed,
        "device": ctx.device.type,
        "native": str(found.path),
        "hf": str(hf),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def import_transformers() -> Any:
    """Import transformers, refusing vulnerable versions.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"verifying needs transformers, which cannot be imported ({error}); install it with:"
            " pip install 'megatron-moe[hf]'"
        ) from error
    if Version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"verifying needs transformers {OLDEST_TRANSFORMERS} or newer, this is"
            f" {transformers.__version__}, in which a config.json can execute code"
            " (CVE-2026-4372); install a newer one with: pip install 'megatron-moe[hf]'"
        )
    return transformers


def compare(reference: Tensor, native: Tensor) -> Comparison:
    """Measure the distance between two models' logits.

    Args:
        reference: Hugging Face logits [b, s, v], fp32.
        native: of the same shape.

    Raises:
        CheckpointError: a logit is not finite; no distance means anything then.
    """
    for name, logits in (("Hugging Face", reference), ("native", native)):
        if not logits.isfinite().all():
            raise CheckpointError(
                f"the {name} model computes logits that are not finite; its weights hold NaN or"
                " infinity, or overflow; look at the model it was converted from"
            )
    difference = (native - reference).abs()
    log_p, log_q = (F.log_softmax(x, dim=-1, dtype=torch.float64) for x in (reference, native))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # [b, s]
    return Comparison(
        max_abs=difference.max().item(),
        mean_abs=difference.mean(dtype=torch.float64).item(),
        std=reference.std().item(),
        top1_agreement=(reference.argmax(-1) == native.argmax(-1)).double().mean().item(),
        mean_kl=divergence.mean().item(),
    )


def bf16_tolerance(num_layers: int, std: float) -> float:
    """Return the largest mean difference of logits of two correct models that compute in bfloat16.

    Each model rounds a value by up to 2^-9 of itself: 2^-8 together. About 16 roundings per layer
    (norms, projections, attention, gates, experts, sums), of independent sign, add up as the square
    root of their number.

    Args:
        num_layers: L.
        std: standard deviation of the logits.
    """
    return 2.0**-8 * math.sqrt(16 * num_layers) * std


def _criterion(
    found: Comparison, precision: Precision, num_layers: int
) -> tuple[float, float, str]:
    """Return tolerance, value and name of the quantity that decides."""
    if precision == "float32":
        return FP32_TOLERANCE * max(1.0, found.std), found.max_abs, "max_abs"
    return bf16_tolerance(num_layers, found.std), found.mean_abs, "mean_abs"


def _choose_precision(
    saved: PretrainConfig,
    hf_config: dict[str, Any],
    device: str,
    same_weights: bool | None,
) -> tuple[Precision, str]:
    """Return the precision to compute in, and why."""
    native_dtype = "bfloat16" if saved.training.bf16 else "float32"
    hf_dtype = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or native_dtype)
    if not (hf_dtype == native_dtype if same_weights is None else same_weights):
        return "bfloat16", f"native weights are {native_dtype}, Hugging Face's {hf_dtype}"
    needed = 5 * count_parameters(saved.model).total  # 4 bytes per weight, and workspace
    if device != "cpu" and torch.cuda.is_available():
        available, where = torch.cuda.mem_get_info()[0], "GPU"
    else:
        available, where = psutil.virtual_memory().available, "main"
    if needed > available:
        return "bfloat16", f"float32 needs {needed / 1e9:.1f} GB of {where} memory, and" + (
            f" {available / 1e9:.1f} GB are free"
        )
    return "float32", "the weights are exact in it"


def _read_config(hf: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face directory, every field of which is known to be harmless.

    transformers acts on fields and files that the converter does not use.

    Raises:
        CheckpointError: it is missing, no JSON object, or has other fields.
    """
    config = read_json(hf, "config.json")
    try:
        family_from_config(config).model_config(config)
    except ValueError as error:
        raise CheckpointError(f"{hf / 'config.json'}: {error}") from error
    if os.path.lexists(hf / _ADAPTER_NAME):
        raise CheckpointError(
            f"{hf} holds {_ADAPTER_NAME}, which lets transformers load other files than these;"
            " remove it"
        )
    return config


def _native_logits(cfg: PretrainConfig, ctx: Any, found: FoundCheckpoint, tokens: Tensor) -> Tensor:
    """Compute logits [b, s, v] of the native model, fp32 on the CPU, and free the model."""
    (model,) = build_chunks(cfg, ctx, seed=None).chunks
    if cfg.training.bf16:
        model.bfloat16()
    load_weights([model], found)
    model.eval()
    positions = torch.arange(tokens.shape[1], device=ctx.device)[None]  # [1, s]
    with torch.no_grad():
        logits = model(tokens.to(ctx.device), positions, None)
    result = logits[..., : cfg.model.vocab_size].float().cpu()
    del model, logits
    _free_memory()
    return result


def _reference_logits(
    transformers: Any, hf: Path, tokens: Tensor, precision: Precision, device: torch.device
) -> Tensor:
    """Compute logits [b, s, v] of the Hugging Face model, fp32 on the CPU, and free the model.

    Raises:
        CheckpointError: transformers cannot load it, or computes another number of logits.
    """
    model = _load_reference(transformers, hf, precision, device)
    with torch.no_grad():
        logits = model(tokens.to(device), use_cache=False).logits
    result = logits.float().cpu()
    del model, logits
    _free_memory()
    return result


def _load_reference(
    transformers: Any, hf: Path, precision: Precision, device: torch.device
) -> nn.Module:
    """Load the model with transformers from safetensors, running no code of the directory."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, precision),
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(
            hf, local_files_only=True, trust_remote_code=False
        )
        # Ignore the value in the file: it may name code on the Hub.
        config._attn_implementation = None
        # The plain loop over experts is the reference implementation and supports any width.
        config._experts_implementation = "eager"
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            hf, config=config, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {hf}: {error}; convert it again,"
            " or check the directory"
        ) from error
    problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if problems:
        raise CheckpointError(
            f"transformers {transformers.__version__} loads {hf} only in part: {problems}; convert"
            " it again, or check the directory"
        )
    loaded: nn.Module = model.to(device).eval()
    return loaded


def _free_memory() -> None:
    """Free memory before the other model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
