"""Defines the state of a run, and the part of it that a checkpoint holds."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.trainer.config.batch_plan import BatchChange, Progress, RunPlan
from megatron.trainer.config.durations import run_plan
from megatron.trainer.config.schema import RunConfig
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.data.phase_records import num_drawn, read_records
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.data.validation import ValidationSet
from megatron.trainer.errors import CheckpointError
from megatron.trainer.health.step_guard import StepGuard
from megatron.trainer.optim.param_gather import finish_param_gather
from megatron.trainer.optim.scheduler import LRSchedule, check_schedule
from megatron.trainer.optim.sharded_state import load_optimizer_state, optimizer_state
from megatron.trainer.runtime.launch import RunContext

logger = logging.getLogger(__name__)

RNG_PREFIX = "rng."
"""What the names of the random states begin with in a checkpoint."""


class ModelMetrics(Protocol):
    """Measures a model while it trains: its routers, for example."""

    def reset(self) -> None:
        """Forget what was measured."""
        ...

    def reduce(self) -> Mapping[str, Any]:
        """Return figures over all ranks since the last reset; a collective call."""
        ...


class StepUpdates(Protocol):
    """Changes what of a model changes once a step and is no parameter."""

    def begin(self) -> None:
        """Begin a step, before its first micro-batch."""
        ...

    def finish(self) -> None:
        """Finish a step whose update was taken; a collective call."""
        ...


class TaskScores(Protocol):
    """Scores what an application asks of a model while it trains, beside validation sets."""

    def evaluate(
        self, state: "TrainState", *, is_over: Callable[[], bool]
    ) -> Mapping[str, Any] | None:
        """Return figures for the record of an evaluation; a collective call.

        None where `is_over`, called before each pass on every rank, stopped it.
        """
        ...


@dataclass(kw_only=True)
class TrainState:
    """Holds everything that changes while a run trains, and the parts it is made of."""

    cfg: RunConfig
    """The resolved config."""
    ctx: RunContext
    """This rank's place in the run."""
    chunks: list[DistributedDataParallel]
    """This rank's model chunks, wrapped."""
    transformer_config: TransformerConfig
    """megatron-core's config of those chunks."""
    optimizer: ChainedOptimizer
    """Over all chunks."""
    schedule: LRSchedule
    """The learning rate."""
    anneal: Callable[[float], LRSchedule] | None = None
    """For a branch: its schedule, given the learning rate it begins with."""
    train_data: SampleStream
    """Source of the next global batch."""
    validation: dict[str, ValidationSet] = field(default_factory=dict)
    """Named validation sets."""
    token_bytes: torch.Tensor | None = None
    """[vocabulary] UTF-8 bytes of each token's text; None where no tokenizer is known."""
    tasks: TaskScores | None = None
    """What else is scored at each evaluation."""
    documents: DocumentRule | None = None
    """How documents within a sequence are kept apart; None lets them run together."""
    metrics: ModelMetrics | None = None
    """The model's own measurements."""
    updates: StepUpdates | None = None
    """What of the model changes beside its parameters."""
    check_saved: Callable[[Mapping[str, Any], bool], tuple[str, ...]] | None = None
    """Refuses a checkpoint, given the flat config of its run and whether more than weights is
    taken; beyond the comparison of architectures. Returns parts of the names of weights that it
    lacks, which stay as they were drawn."""
    fixed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What must stay as it is as long as the run goes on, such as the reference of an alignment: by
    name its `path`, and the `sha256` that tells it from others; in run.json."""
    flops_per_token: float = 0.0
    """Model FLOPs of a token's forward and backward pass."""
    iteration: int = 0
    """Optimizer steps done, skipped ones included."""
    guard: StepGuard = field(init=False)
    """Which steps are taken."""
    plan: RunPlan = field(init=False)
    """The batch of each step, and which step is the last."""

    def __post_init__(self) -> None:
        """Start with an empty history."""
        self.guard = StepGuard(self.cfg.reliability)
        self.plan = run_plan(self.cfg)

    @property
    def progress(self) -> Progress:
        """Return how far the run is."""
        samples, own = self.train_data.trained_samples
        return Progress(
            iteration=self.iteration,
            samples=samples,
            own_samples=own,
            seq_length=self.train_data.seq_length,
        )

    @property
    def is_done(self) -> bool:
        """Return whether the run's last step is done."""
        return self.plan.is_done(self.progress)

    @property
    def last_iteration(self) -> int:
        """Return the number of the run's last step."""
        return self.plan.last_iteration(self.progress)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return self.schedule(self.schedule.position(self.progress))

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Return the model chunks without wrappers, with the weights of the last update.

        A collective call where these are gathered under forward passes.
        """
        finish_param_gather(self.chunks)
        return [unwrap(chunk) for chunk in self.chunks]


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the megatron-core model inside DDP and Float16Module."""
    while hasattr(module, "module"):
        module = module.module  # type: ignore[assignment]
    return module


def model_state(modules: list[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state of unwrapped chunks: `ShardedTensor`s under global names.

    megatron-core's linear layers add an empty `_extra_state` object each, for Transformer Engine's
    sake; these are left out, so that a checkpoint holds tensors only.
    """
    return {
        f"model{index}": {
            name: value
            for name, value in module.sharded_state_dict().items()  # type: ignore[operator]
            if not isinstance(value, ShardedObject)
        }
        for index, module in enumerate(modules)
    }


def sharded_state(state: TrainState, *, is_loading: bool = False) -> dict[str, Any]:
    """Return weights, optimizer and random states for megatron-core's `dist_checkpointing`."""
    model = model_state(state.modules)
    return {
        **model,
        "optimizer": optimizer_state(state.optimizer, model, is_loading=is_loading),
        "rng": _rng_state(state.ctx),
    }


def run_state(state: TrainState) -> dict[str, Any]:
    """Return what is the same on every rank, as JSON values: `run.json` of a checkpoint."""
    return {
        "iteration": state.iteration,
        "optimizer_steps": _optimizer_steps(state.optimizer),
        "layout": _layout(state.ctx),
        "data": state.train_data.state_dict(),
        "schedule": dict(state.schedule.state_dict()),
        "learning_rate": float(state.learning_rate),
        "global_batch_size": state.plan.batches.size_at(state.progress.samples),
        "guard": state.guard.state_dict(),
        **(
            {"fixed": {name: dict(each) for name, each in state.fixed.items()}}
            if state.fixed
            else {}
        ),
    }


def request_state(
    state: TrainState, run: Mapping[str, Any], *, is_branching: bool = False
) -> dict[str, Any]:
    """Return the sharded state to load from a checkpoint, given its `run_state`.

    Random states are loaded only where the checkpoint was written under the same layout; a
    branch starts them from its seed.

    Raises:
        CheckpointError: the checkpoint follows another schedule than the run that continues it.
    """
    if not is_branching:
        check_schedule(
            state.schedule.state_dict(),
            run["schedule"],
            iteration=int(run["iteration"]),
            override=state.cfg.checkpoint.override_schedule,
            batch=batch_change(state, run),
        )
    request = sharded_state(state, is_loading=True)
    if is_branching:
        del request["rng"]
    elif run["layout"] != _layout(state.ctx):
        del request["rng"]
        logger.info(
            "the checkpoint was written under another layout (%s; this run %s): random states"
            " start from the seed",
            run["layout"],
            _layout(state.ctx),
        )
    return request


def batch_change(state: TrainState, run: Mapping[str, Any]) -> BatchChange:
    """Return what a step was in the run of a `run_state`, and is in the one that goes on.

    Raises:
        DataError: its data state contradicts itself.
    """
    records = read_records(run["data"])
    progress = Progress(
        iteration=int(run["iteration"]),
        samples=sum(map(num_drawn, records)),
        own_samples=sum(num_drawn(record) for record in records if not record["inherited"]),
        seq_length=state.train_data.seq_length,
    )
    first = state.cfg.checkpoint.anneal_from or 0
    saved = run.get("global_batch_size")
    steps = progress.iteration - first
    if saved is None and steps > 0 and progress.own_samples % steps == 0:
        saved = progress.own_samples // steps  # of a version that did not note it
    return BatchChange(
        progress=progress,
        first=first,
        saved=saved if type(saved) is int and saved > 0 else None,
        now=state.plan.batches.size_at(progress.samples),
    )


def take_data(state: TrainState, run: Mapping[str, Any], *, is_branching: bool = False) -> None:
    """Restore the position in the data from a `run_state`; a branch starts its own after it.

    Raises:
        DataError: the run would not read the same samples; checked before anything is loaded.
    """
    take = state.train_data.inherit if is_branching else state.train_data.load_state_dict
    for line in take(run["data"]):
        logger.info("data: %s", line)


def apply_state(state: TrainState, loaded: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Restore the state that was loaded into a request of `request_state`.

    Raises:
        CheckpointError: its record of earlier steps is damaged.
    """
    if "guard" in run:
        try:
            state.guard.load_state_dict(run["guard"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's guard is {run['guard']!r:.200}; it must hold losses, grad_norms,"
                " skipped_in_row and rewinds; load another checkpoint"
            ) from error
    load_optimizer_state(state.optimizer, loaded["optimizer"], steps=int(run["optimizer_steps"]))
    load_model(state.modules, loaded)
    state.iteration = int(run["iteration"])
    if "rng" in loaded:
        _load_rng_state(loaded["rng"])


def load_model(
    modules: list[torch.nn.Module], loaded: Mapping[str, Any], *, lacking: tuple[str, ...] = ()
) -> None:
    """Load the weights of every chunk; those with a part of `lacking` in their names stay."""
    for index, module in enumerate(modules):
        kept = {
            name: value
            for name, value in module.state_dict().items()
            if any(part in name for part in lacking)
        }
        module.load_state_dict({**kept, **loaded[f"model{index}"]}, strict=True)


def _layout(ctx: RunContext) -> dict[str, int | str]:
    """Return the layout that random states belong to."""
    layout = ctx.layout
    return {
        "device": ctx.device.type,
        "world": ctx.world_size,
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
    }


def _optimizer_steps(optimizer: ChainedOptimizer) -> int:
    """Return the number of updates; the same in every group, 0 for an empty optimizer."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def _rng_state(ctx: RunContext) -> dict[str, ShardedTensor]:
    """Return this rank's generator states as rows of [ranks, bytes] tensors, without a pickle."""
    states = {"cpu": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if ctx.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"{RNG_PREFIX}{name}", value.cpu()[None], (0, ctx.rank, ctx.world_size)
        )
        for name, value in states.items()
    }


def _load_rng_state(loaded: Mapping[str, torch.Tensor]) -> None:
    states = {name: value[0].cpu() for name, value in loaded.items()}
    torch.set_rng_state(states.pop("cpu"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states(states)


MicroBatches = Iterator[Any]
ForwardStep = Callable[[MicroBatches, torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]
"""megatron-core's forward-step signature: (micro-batches, model) -> (output, loss function)."""
