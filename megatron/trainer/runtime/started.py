"""Judges how this process was started: alone, as one of torchrun's ranks, or wrongly.

Works on a copy of the environment, which `launch` alone reads. Needs no torch.
"""

import os
from collections.abc import Callable, Mapping

from megatron.trainer.errors import ConfigError

_MPI_COUNTS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}
"""How many processes an MPI launcher has started -> which of them this is."""
_STEP_TASKS = "SLURM_STEP_NUM_TASKS"
"""Tasks of the srun command around this process. SLURM_NTASKS is also what a job asked for, and set
in a batch script, which is one process."""
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LARGEST_PORT = 65535


class MissingTorchrunError(ConfigError):
    """Reports that several processes were started, none of which has a rank."""

    task = 0
    """Number of this process among them; 0 speaks for all."""


def rank_and_world_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return rank and number of ranks, as torchrun sets them; a world of one without them.

    Raises:
        ConfigError: they are no numbers, contradict each other, or one is missing.
    """
    size = whole_number(environment, "WORLD_SIZE", at_least=1)
    rank = whole_number(environment, "RANK")
    if rank is None:
        if size is not None and size > 1:
            raise _missing("RANK", f"WORLD_SIZE is {size}")
        return 0, 1
    if size is None:
        raise _missing("WORLD_SIZE", f"RANK is {rank}")
    if rank >= size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE {size}; ranks are counted from 0, so RANK must be below"
            " WORLD_SIZE; start with torchrun, which sets both, or correct one"
        )
    return rank, size


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Check that a process with a rank knows its GPU and where the others meet.

    Raises:
        ConfigError: a variable is missing, or is no number where it must be one.
    """
    if not environment.get("RANK"):
        return
    rank, world_size = rank_and_world_size(environment)
    whole_number(environment, "LOCAL_RANK")
    whole_number(environment, "LOCAL_WORLD_SIZE", at_least=1)
    port = whole_number(environment, "MASTER_PORT", at_least=1)
    for name in _RENDEZVOUS:
        if not environment.get(name):
            raise _missing(name, f"RANK is {rank} and WORLD_SIZE {world_size}")
    if port is not None and port > _LARGEST_PORT:
        raise ConfigError(
            f"MASTER_PORT is {port}; it must be a port from 1 to {_LARGEST_PORT} that is free on"
            f" {environment['MASTER_ADDR']}; set another"
        )


def check_tasks(
    environment: Mapping[str, str], *, pid: int, has_terminal: Callable[[], bool]
) -> None:
    """Refuse to be one of several tasks without a rank: each would be a run of its own.

    A shell in a terminal (`srun --ntasks 4 --pty bash`) is a task of such a step, but what the user
    types there is one process: it has the terminal, and is not the task itself.

    Args:
        environment: the variables of this process.
        pid: of this process.
        has_terminal: says whether a terminal controls it; only `--pty` gives a task one.

    Raises:
        MissingTorchrunError: this is such a task.
    """
    if environment.get("RANK"):
        return
    step_tasks = number_or_zero(environment, _STEP_TASKS)
    for size_name, rank_name in (*_MPI_COUNTS.items(), (_STEP_TASKS, "SLURM_PROCID")):
        size = number_or_zero(environment, size_name)
        if size <= 1:
            continue
        # srun may set PMI_SIZE too.
        is_of_srun = size_name == _STEP_TASKS or (size_name == "PMI_SIZE" and size == step_tasks)
        is_typed = environment.get("SLURM_TASK_PID") != str(pid) and has_terminal()
        if not (is_of_srun and is_typed):
            task = number_or_zero(environment, rank_name)
            raise _missing_torchrun(size, size_name, task, environment)


def has_terminal() -> bool:
    """Return whether a terminal controls this process, whatever its input and output are."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _missing_torchrun(
    size: int, name: str, task: int, environment: Mapping[str, str]
) -> MissingTorchrunError:
    nodes = max(1, number_or_zero(environment, "SLURM_STEP_NUM_NODES"))
    launcher = "srun" if size == number_or_zero(environment, _STEP_TASKS) else "mpirun"
    way = (
        f"srun --ntasks-per-node=1 torchrun --nnodes {nodes} --nproc-per-node GPUS --rdzv-backend"
        " c10d --rdzv-endpoint HOST:PORT PROGRAM"
        if launcher == "srun"
        else "torchrun --nproc-per-node GPUS PROGRAM"
    )
    error = MissingTorchrunError(
        f"{launcher} has started {size} tasks ({name} is {size}) without torchrun, so none has a"
        " RANK, and each would be a run of its own; start one torchrun on each node, which starts"
        f" the ranks: {way}; examples/slurm/pretrain.sbatch does so, and tools/submit.py submits"
        " it; if separate runs of one process are meant, put torchrun --standalone"
        " --nproc-per-node 1 before each"
    )
    error.task = task
    return error


def _missing(name: str, given: str) -> ConfigError:
    return ConfigError(
        f"{given}, but {name} is not set; ranks need all of {', '.join(_RENDEZVOUS)}; start with"
        f" torchrun, which sets them, or set {name} too; for a run of one process unset RANK and"
        " WORLD_SIZE"
    )


def whole_number(environment: Mapping[str, str], name: str, *, at_least: int = 0) -> int | None:
    """Return a variable that must be a number if it is set; None where it is not.

    Raises:
        ConfigError: it is something else.
    """
    text = environment.get(name)
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < at_least:
        raise ConfigError(
            f"{name} is {text!r}; it must be a whole number from {at_least} on; start with"
            " torchrun, which sets it, or correct it"
        )
    return int(text)


def number_or_zero(environment: Mapping[str, str], name: str) -> int:
    """Return a number that a launcher has set; 0 where it has set none, or something else."""
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else 0
