"""Builds megatron-core's optimizer over AdamW or RMSprop of our own, and its parameter groups."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import megatron.core.optimizer as mcore_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import (
    OptimizerConfig as McoreOptimizerConfig,
)
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

from megatron.trainer.config.schema import OptimizerConfig
from megatron.trainer.optim.groups import GroupRates, decay_overrides

logger = logging.getLogger(__name__)

ParameterGroups = Iterable[dict[str, Any]]


class AdamW(torch.optim.Optimizer):
    """Implements AdamW with its step count in the parameter group, as Apex and TE have it.

    torch's own AdamW counts per parameter, which megatron-core's distributed optimizer does not
    store; a run that resumed with it would restart the bias correction. The arithmetic is torch's
    fused kernel. Loshchilov and Hutter, "Decoupled weight decay regularization", algorithm 2.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decays of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        adam_w_mode: megatron-core passes it; only decoupled decay is offered.
        capturable: megatron-core 0.19 passes it; the step cannot be captured in a CUDA graph.
    """

    takes_grad_scale: ClassVar[bool] = True
    """The step divides gradients by `grad_scale`, and leaves them so."""

    def __init__(
        self,
        params: ParameterGroups,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("adam_w_mode is False; only decoupled weight decay is offered")
        if capturable:
            raise ValueError("capturable is True; the step cannot be captured in a CUDA graph")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)
        self.grad_scale: torch.Tensor | None = None
        """[] float32 on the gradients' device, what the next step divides them by; None by 1."""

    def initialize_moments(self) -> None:
        """Create zero moments for every parameter, so that a checkpoint can be loaded into them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure was passed to AdamW.step; it is not supported")
        self.initialize_moments()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
            group["step"] += 1
        self.grad_scale = None

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        done = torch.full((len(parameters),), float(group["step"]), device=parameters[0].device)
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            list(done.unbind()),
            fused=True,
            grad_scale=self.grad_scale,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class RMSprop(AdamW):
    """Implements torch's RMSprop, without momentum, in the checkpoint form of AdamW.

    `exp_avg_sq` is the mean of squared gradients, whose decay is the second beta; `exp_avg` stays
    zero, for megatron-core's distributed optimizer stores both. Weight decay is added to the
    gradient. Tieleman and Hinton, "Lecture 6.5: RMSProp" (2012).
    """

    takes_grad_scale = False

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        rmsprop(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            [],
            [torch.tensor(float(group["step"])) for _ in parameters],
            lr=group["lr"],
            alpha=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=0.0,
            centered=False,
        )


@contextmanager
def _building(optimizer_class: type[AdamW]) -> Iterator[None]:
    """Let megatron-core build an optimizer of ours where it would build Adam."""
    kept = mcore_optimizer.Adam, distrib_optimizer.Adam
    mcore_optimizer.Adam = distrib_optimizer.Adam = optimizer_class
    try:
        yield
    finally:
        mcore_optimizer.Adam, distrib_optimizer.Adam = kept


def use_adamw() -> None:
    """Make megatron-core build our AdamW where neither TE nor Apex is installed.

    megatron-core picks the class at import and treats torch's as one with per-parameter
    steps; with ours it takes the branches written for fused Adam.
    """
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        mcore_optimizer.Adam = AdamW
        distrib_optimizer.Adam = AdamW
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True


def build_optimizer(
    cfg: OptimizerConfig,
    chunks: list[torch.nn.Module],
    *,
    bf16: bool,
    use_distributed_optimizer: bool,
    rates: Sequence[GroupRates] = (),
) -> ChainedOptimizer:
    """Build megatron-core's optimizer over what trains of DDP-wrapped model chunks."""
    use_adamw()
    is_rmsprop = cfg.optimizer == "rmsprop"
    settings = McoreOptimizerConfig(
        optimizer="adam",
        lr=cfg.lr,
        min_lr=cfg.min_lr,
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.rmsprop_alpha if is_rmsprop else cfg.adam_beta2,
        adam_eps=cfg.adam_eps,
        clip_grad=cfg.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    with _building(RMSprop) if is_rmsprop else nullcontext():
        optimizer = mcore_optimizer.get_megatron_optimizer(
            settings,
            chunks,
            config_overrides=decay_overrides(cfg.weight_decay_on, rates),
            use_gloo_process_groups=False,
        )
    assert isinstance(optimizer, ChainedOptimizer)
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, AdamW):
            inner.optimizer.initialize_moments()
    return optimizer


def apply_schedule(optimizer: ChainedOptimizer, *, lr: float, weight_decay: float) -> None:
    """Set the next step's learning rate and weight decay in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def describe_groups(optimizer: ChainedOptimizer, weight_decay: float) -> list[str]:
    """Describe each parameter group of this rank in one line, for the log."""
    lines = []
    for group in optimizer.param_groups:
        kind = "expert" if group["is_expert_parallel"] else "dense"
        numbers = sum(parameter.numel() for parameter in group["params"])
        rate = group.get("lr_mult", 1.0)
        lines.append(
            f"{kind}: {len(group['params'])} tensors, {numbers:,} values on this rank, weight"
            f" decay {weight_decay * group.get('wd_mult', 1.0):g}"
            + (f", {rate:g} x the learning rate" if rate != 1.0 else "")
        )
    return lines
