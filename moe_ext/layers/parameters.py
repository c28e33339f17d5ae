"""Creates parameters where megatron-core creates its own."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def new_parameter(*shape: int, config: TransformerConfig) -> nn.Parameter:
    """Creates an uninitialised parameter of `config.params_dtype`.

    It lies on the current CUDA device, as megatron-core's parameters do; on the host with
    `use_cpu_initialization`; and without storage under `torch.device("meta")`.
    """
    ambient = torch.empty(0).device
    device: torch.device | int = ambient
    if ambient.type != "meta" and not config.use_cpu_initialization:
        device = torch.cuda.current_device()
    return nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))


def parameter_device_type(config: TransformerConfig) -> str:
    """Returns "cuda" or "cpu": where `new_parameter` puts what is not on the meta device."""
    if config.use_cpu_initialization or not torch.cuda.is_available():
        return "cpu"
    current = torch.cuda.current_device()
    return current.type if isinstance(current, torch.device) else "cuda"
