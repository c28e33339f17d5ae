"""Create parameters where megatron-core creates its own."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def new_parameter(*shape: int, config: TransformerConfig) -> nn.Parameter:
    """An uninitialised parameter of `config.params_dtype`.

    It lies on the current CUDA device, as megatron-core's parameters do; on the host with
    `use_cpu_initialization`; and without storage under `torch.device("meta")`.
    """
    ambient = torch.empty(0).device
    device: torch.device | int = ambient
    if ambient.type != "meta" and not config.use_cpu_initialization:
        device = torch.cuda.current_device()
    return nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
