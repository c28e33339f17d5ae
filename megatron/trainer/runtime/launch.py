"""Process groups, device, threads, seeds; the only reader of the environment and mcore's globals.

Everything else receives a `RunContext`.
"""

import datetime
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron.trainer.config.parallel_layout import Layout, resolve_layout
from megatron.trainer.config.recipe import flatten
from megatron.trainer.config.schema import ParallelConfig, RunConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError, UserError, printable
from megatron.trainer.runtime import signals
from megatron.trainer.runtime.collective import require_same
from megatron.trainer.runtime.gloo import share_connections
from megatron.trainer.runtime.malloc import keep_freed_memory
from megatron.trainer.runtime.rendezvous import rendezvous
from megatron.trainer.runtime.started import (
    MissingTorchrunError,
    check_rendezvous,
    check_tasks,
    has_terminal,
    number_or_zero,
    rank_and_world_size,
    whole_number,
)

logger = logging.getLogger(__name__)

RANK0_MESSAGE_TIME_S = 30.0
"""How long the other ranks wait for rank 0 to print its error, seconds. torchrun ends all ranks as
soon as one has failed, so a rank that failed before rank 0 had printed it would suppress it."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Describes the place of this process in the run."""

    rank: int
    """Global rank."""
    world_size: int
    """Ranks in the run."""
    device: torch.device
    """Where this rank's tensors live."""
    layout: Layout
    """Sizes of the parallel groups."""
    groups: ProcessGroupCollection
    """This rank's process groups, named as megatron-core names them."""
    data_parallel_rank: int
    """Which share of the global batch this rank reads."""
    num_threads: int
    """CPU threads of this rank; sums on a CPU depend on it."""


def environment_rank() -> int:
    """Return this process's rank from torchrun's environment, 0 alone.

    Raises:
        ConfigError: torchrun is missing, or its variables contradict each other.
    """
    check_tasks(os.environ, pid=os.getpid(), has_terminal=has_terminal)
    return rank_and_world_size(os.environ)[0]


def environment_world_size() -> int:
    """Return the number of processes that torchrun started, 1 outside torchrun.

    Raises:
        ConfigError: torchrun's variables contradict each other.
    """
    return rank_and_world_size(os.environ)[1]


def slurm_environment() -> dict[str, str]:
    """Return SLURM's environment variables; none outside a job."""
    return {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}


def child_environment(*, threads: int) -> dict[str, str]:
    """Return this process's environment for one that it starts.

    Args:
        threads: its CPU threads a rank, unless the user has set OMP_NUM_THREADS.
    """
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def environment_secret(name: str) -> str | None:
    """Return the environment variable that the user names for a secret; None where it is not set.

    It must not be logged, nor written anywhere.
    """
    return os.environ.get(name)


def connect(parallel: ParallelConfig) -> tuple[torch.device, int]:
    """Start device, threads and the group of all ranks, before a complete config is known.

    `initialize` does so too, and may follow.

    Returns:
        This rank's device and its number of CPU threads.

    Raises:
        ConfigError: the device is not there, or torchrun's variables are incomplete.
    """
    check_rendezvous(os.environ)
    device = _resolve_device(parallel)
    num_threads = _resolve_threads(parallel)
    torch.set_num_threads(num_threads)
    if device.type == "cpu":
        from megatron.trainer.runtime.cpu_backend import redirect_cuda

        keep_freed_memory()
        redirect_cuda()
        share_connections()
    else:
        torch.cuda.set_device(device)
    _start_process_group(device, parallel.distributed_timeout_minutes)
    return device, num_threads


def initialize(cfg: RunConfig, *, is_training: bool = True) -> RunContext:
    """Check the config against the world, then start process groups, device, threads and seeds.

    Args:
        cfg: a run config with a model group.
        is_training: False for runs without a backward pass, which some layouts need not fear.

    Raises:
        ConfigError: the layout is impossible, or the device is not there. Raised alike on every
            rank, before any rank waits for another.
    """
    if is_training:
        environment_rank()
    world_size = environment_world_size()
    validate(cfg, world_size, is_training=is_training)
    device, num_threads = connect(cfg.parallel)
    require_same(
        "settings",
        flatten(cfg),
        error_class=ConfigError,
        remedy="start all ranks with the same flags, and let all nodes see the same recipe",
    )
    layout = resolve_layout(cfg.parallel, world_size)
    return _start_model_parallel(layout, device, seed=cfg.training.seed, num_threads=num_threads)


def shut_down(*, keep_world: bool = False) -> None:
    """Leave the process groups; the counterpart of `initialize` for a run that ended well.

    Args:
        keep_world: leave torch's default group standing, for another `initialize` in this process.
    """
    from megatron.core import parallel_state

    if keep_world:
        # megatron-core only forgets its groups, each of which has threads.
        for group in dict.fromkeys(parallel_state._global_process_group_list or ()):
            if group is not None:
                dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if not keep_world:
        dist.destroy_process_group()


def run_main(main: Callable[[], int | None]) -> int:
    """Run a program; a UserError becomes one message on rank 0 and exit status 2 on every rank.

    A UserError is raised on all ranks alike (config errors before the process groups exist, file
    errors through `collective`), so rank 0 prints it, and the others wait until torchrun ends them.
    A rank that is not ended was the only one to fail, and prints it then; an error marked as local
    is printed at once. Wrong flags end in a SystemExit, whose message was printed by the parser.

    Args:
        main: returns the exit status of a program that ended as it should; None is 0.

    Returns:
        The exit status. torchrun turns every status but 0 into 1.
    """
    try:
        return main() or 0
    except MissingTorchrunError as error:
        if error.task == 0:  # nobody ends the other tasks, and all have the same to say
            _print_error(error)
        return 2
    except UserError as error:
        signals.stop_listening()  # torchrun ends the ranks that wait below with SIGTERM
        rank = number_or_zero(os.environ, "RANK")
        is_alone = error.is_local
        if rank != 0 and not is_alone:
            time.sleep(RANK0_MESSAGE_TIME_S)
            is_alone = True  # or torchrun would have ended this rank by now
        _print_error(error, where=f" on rank {rank}" if is_alone else "")
        return 2
    except SystemExit as end:
        signals.stop_listening()
        if end.code not in (None, 0) and number_or_zero(os.environ, "RANK") != 0:
            time.sleep(RANK0_MESSAGE_TIME_S)
        raise


def _print_error(error: UserError, *, where: str = "") -> None:
    sys.stderr.write(printable(f"{type(error).__name__}{where}: {error}\n"))
    sys.stderr.flush()


def _resolve_device(parallel: ParallelConfig) -> torch.device:
    available = torch.cuda.is_available()
    if parallel.device == "cuda" and not available:
        raise ConfigError(
            "device is 'cuda', but torch sees no GPU; use --device cpu, or install a CUDA build of"
            " torch and check nvidia-smi"
        )
    if parallel.device == "cpu" or not available:
        return torch.device("cpu")
    local_rank = whole_number(os.environ, "LOCAL_RANK") or 0
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this node has {count}; use"
            f" --nproc-per-node {count} or fewer"
        )
    return torch.device("cuda", local_rank)


def _resolve_threads(parallel: ParallelConfig) -> int:
    if parallel.threads_per_rank is not None:
        return parallel.threads_per_rank
    if "OMP_NUM_THREADS" in os.environ and not _is_omp_of_torchrun():
        return _omp_threads(os.environ["OMP_NUM_THREADS"])
    return max(1, num_cores() // _local_world_size())


def _local_world_size() -> int:
    return whole_number(os.environ, "LOCAL_WORLD_SIZE", at_least=1) or 1


def num_cores() -> int:
    """Return the number of cores this process may use, which a job may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_omp_of_torchrun() -> bool:
    """Return whether torchrun, not the user, set OMP_NUM_THREADS to 1.

    It does so for several ranks on a node where nobody has set it, which would leave all cores but
    one a rank idle. The environment that torchrun itself was started with tells.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["OMP_NUM_THREADS"] != "1":
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in started_with.split(b"\0"))


def _omp_threads(value: str) -> int:
    """Return the outermost level of OMP_NUM_THREADS, which may list a number per nesting level."""
    outermost = value.split(",")[0].strip()
    if not outermost.isdigit() or int(outermost) < 1:
        raise ConfigError(
            f"OMP_NUM_THREADS is {value!r}; it must be a number from 1 on; set it, unset it, or"
            " give --threads-per-rank"
        )
    return int(outermost)


def _start_process_group(device: torch.device, timeout_minutes: int) -> None:
    if dist.is_initialized():
        return
    _restrict_gloo_to_loopback()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if os.environ.get("RANK"):
        store, rank, world_size = rendezvous(timeout)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


def _restrict_gloo_to_loopback() -> None:
    """Make gloo listen on the loopback interface if all ranks are on this machine.

    It would listen on the address of the host's name, and accept any connection.
    GLOO_SOCKET_IFNAME names another interface.
    """
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    if names and _local_world_size() == environment_world_size():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names.pop())


def _start_model_parallel(
    layout: Layout, device: torch.device, *, seed: int, num_threads: int
) -> RunContext:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_stages if layout.virtual_stages > 1 else None
        ),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    torch.manual_seed(seed)
    # CPU: some of mcore's initialisers fork this tracker even though `init` draws the weights.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return RunContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        layout=layout,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        num_threads=num_threads,
    )
