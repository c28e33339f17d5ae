"""Starting and ending a run in a world of one; two ranks: test_host_collectives."""

import dataclasses
import gc
import os
import re
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron.trainer.config.schema import ParallelConfig, TrainingConfig
from megatron.trainer.errors import ConfigError, DataError, UserError
from megatron.trainer.runtime import launch
from megatron.trainer.runtime.launch import RunContext, initialize, run_main, shut_down
from moe_app.pretrain.config import PretrainConfig

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torchrun around the test, and no group or thread count left behind."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        shut_down()


def config(**parallel: object) -> PretrainConfig:
    values = {"device": "cpu", "threads_per_rank": 1, **parallel}
    return PretrainConfig(parallel=dataclasses.replace(ParallelConfig(), **values))  # type: ignore[arg-type]


def start(**parallel: object) -> RunContext:
    return initialize(config(**parallel))


def test_alone_a_process_is_a_world_of_one() -> None:
    ctx = start()
    assert (ctx.rank, ctx.world_size, ctx.data_parallel_rank) == (0, 1, 0)
    assert ctx.device == torch.device("cpu")
    assert dist.get_backend() == "gloo"
    assert {ctx.groups.tp.size(), ctx.groups.pp.size(), ctx.groups.ep.size()} == {1}
    assert ctx.layout.data == ctx.layout.tensor == 1


def test_seed_sets_torch_and_megatron_cores_streams() -> None:
    draws = []
    for seed in (3, 3, 4):
        training = dataclasses.replace(TrainingConfig(), seed=seed)
        initialize(dataclasses.replace(config(), training=training))
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(4)
        draws.append(torch.cat([tracked, torch.rand(4)]))
        shut_down()
    assert torch.equal(draws[0], draws[1])
    assert not (draws[0] == draws[2]).any()


def test_a_process_can_start_again_and_keep_its_world() -> None:
    start()
    world = dist.group.WORLD
    shut_down(keep_world=True)
    assert dist.group.WORLD is world
    start()
    shut_down()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("threads_per_rank", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "2"}, 3),
        (None, {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "4"}, 2),
        (None, {"LOCAL_WORLD_SIZE": "4"}, 2),
        (None, {"LOCAL_WORLD_SIZE": "16"}, 1),
        (None, {}, 8),
    ],
)
def test_threads_are_set_from_flag_environment_or_cores(
    threads_per_rank: int | None,
    environment: dict[str, str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start(threads_per_rank=threads_per_rank).num_threads == expected
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("user_sets", "expected"),
    [({}, 4), ({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "3"}, 3)],
)
def test_torchruns_own_single_thread_is_not_taken_for_the_users(
    user_sets: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | user_sets
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    # Like torchrun, of which only the start matters: it sets the variable where it is missing.
    of_rank = {"OMP_NUM_THREADS": "1", **user_sets, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**of_rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], env=environment, stdin=pipe, stdout=pipe) as torchrun:
        assert torchrun.stdin is not None
        assert torchrun.stdout is not None
        # Popen returns while the kernel still sets the program up, with an empty environment.
        torchrun.stdin.write(b"started\n")
        torchrun.stdin.flush()
        assert torchrun.stdout.readline() == b"started\n"
        monkeypatch.setattr(os, "getppid", lambda: torchrun.pid)
        assert launch._resolve_threads(ParallelConfig()) == expected


def test_cuda_without_a_gpu_is_refused_before_any_group_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = (
        "device is 'cuda', but torch sees no GPU; use --device cpu, or install a CUDA build of"
        " torch and check nvidia-smi"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        start(device="cuda")
    assert not dist.is_initialized()


def test_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "local rank 2 has no GPU of its own: this node has 2; use --nproc-per-node 2 or fewer"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        start(device="auto")
    assert not dist.is_initialized()


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start(device="auto").device.type == "cpu"


def test_impossible_layout_is_refused_before_any_group_starts() -> None:
    with pytest.raises(ConfigError, match=r"^the number of ranks \(1\) must be a multiple of"):
        start(expert_model_parallel_size=2)
    assert not dist.is_initialized()


def test_program_that_ends_well_has_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    done = []
    assert run_main(lambda: done.append(1)) == 0
    assert done == [1]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses a rank made, none of which is really made."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.mark.parametrize("error", [ConfigError, DataError, UserError])
def test_user_error_is_one_message_without_a_traceback_and_status_2(
    error: type[UserError], capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    def fail() -> None:
        raise error("lr (-1) must be above 0")

    assert run_main(fail) == 2
    assert capsys.readouterr() == ("", f"{error.__name__}: lr (-1) must be above 0\n")
    assert waits == []


def test_other_ranks_let_rank_0_speak_and_speak_themselves_only_if_nothing_ends_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    """torchrun would end rank 0 at once, message or not, if another rank failed first."""
    monkeypatch.setenv("RANK", "1")

    def fail() -> None:
        raise ConfigError("said by rank 0")

    assert run_main(fail) == 2
    assert capsys.readouterr() == ("", "ConfigError on rank 1: said by rank 0\n")
    assert waits == [launch.RANK0_MESSAGE_TIME_S]


def test_error_of_one_rank_alone_is_told_by_that_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    """Rank 0 may never learn of it: nobody else could say it."""
    monkeypatch.setenv("RANK", "3")

    def fail() -> None:
        error = DataError("token 5 has id 90")
        error.is_local = True
        raise error

    assert run_main(fail) == 2
    assert capsys.readouterr() == ("", "DataError on rank 3: token 5 has id 90\n")
    assert waits == []


@pytest.mark.parametrize(
    ("rank", "status", "pauses"), [(0, 2, 0), (1, 2, 1), (1, 0, 0), (1, None, 0)]
)
def test_wrong_flags_are_told_by_rank_0_before_another_rank_ends(
    rank: int,
    status: int | None,
    pauses: int,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
) -> None:
    monkeypatch.setenv("RANK", str(rank))

    def end() -> None:
        raise SystemExit(status)

    with pytest.raises(SystemExit) as caught:
        run_main(end)
    assert caught.value.code == status
    assert len(waits) == pauses


def test_bug_keeps_its_traceback() -> None:
    def fail() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        run_main(fail)


def test_rank_and_world_size_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.environment_rank(), launch.environment_world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (launch.environment_rank(), launch.environment_world_size()) == (3, 8)


def test_groups_that_are_left_take_their_threads_with_them() -> None:
    """gloo's wake a hundred times a second for as long as a group stands."""

    def threads_after_a_start() -> int:
        start()
        shut_down(keep_world=True)
        gc.collect()
        return len(os.listdir("/proc/self/task"))

    first = threads_after_a_start()
    assert [threads_after_a_start() for _ in range(3)] == [first] * 3
