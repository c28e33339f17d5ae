"""Checks that all ranks of a run compute with the same kernels."""

from typing import Literal

from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.collective import require_same
from moe_ext.kernels import fused


def agree_on_kernels(
    *, backend: str | None, fused_kernels: Literal["auto", "off"], device_type: str
) -> None:
    """Refuse ranks that compute the same with other kernels; a collective call.

    All are right, but round differently, and tensor parallel ranks hold copies of one weight.

    Args:
        backend: of this rank's experts; None without.
        fused_kernels: the setting.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: ranks have chosen other expert backends, or some cannot use fused kernels; on
            every rank.
    """
    require_same(
        "expert backends",
        {"expert_backend": backend},
        error_class=ConfigError,
        remedy="run on GPUs of one kind, or name one that all can use with --expert-backend",
    )
    if fused_kernels != "off":
        require_same(
            "fused kernels",
            {"problem": fused.problem_on(device_type)},
            error_class=ConfigError,
            remedy="mend that, or give --fused-kernels off",
        )
