"""Tests what a run writes and where it listens: no secrets, the user's umask, loopback only."""

import contextlib
import io
import ipaddress
import logging
import os
import secrets
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron.trainer.config.cli import flatten
from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.data.writer import TokenFileWriter
from megatron.trainer.hf_files import new_directory
from megatron.trainer.hooks import plots
from megatron.trainer.inference.lines import OutputFile
from megatron.trainer.io.atomic_write import write_durably
from megatron.trainer.runtime import launch
from moe_app.doctor.facts import slurm_section
from moe_app.pretrain import command
from moe_app.pretrain.config import PretrainConfig
from tests.distributed.launcher import flags

SECRET_NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SLURM_JWT"),
    *("NGC_API_KEY", "http_proxy", "MY_OWN_PASSWORD"),
)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME")
KNOWN = "a-name-that-is-known"


@dataclass
class Run:
    """Holds a run and what was observed of it."""

    directory: Path
    umask: int
    secrets: dict[str, str]
    log: str = ""
    status: int | None = None
    wandb: list[Any] = field(default_factory=list)
    listening: list[str] = field(default_factory=list)


def listening() -> list[str]:
    """List the addresses on which this process accepts connections."""
    found = psutil.Process().net_connections(kind="inet")
    return sorted(each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN)


def wandb_for(run: Run) -> Any:
    """Make a fake wandb that records its arguments and the listening addresses during the run."""

    def note(*given: Any, **named: Any) -> Any:
        run.wandb.append((given, named))
        return writer

    def log(*given: Any, **named: Any) -> None:
        note(*given, **named)
        run.listening += listening()

    writer = SimpleNamespace(log=log, finish=note)
    return SimpleNamespace(init=note, errors=SimpleNamespace(Error=RuntimeError))


def unset(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Remove variables, and restore them afterwards even if they were set again."""
    for name in names:
        patch.setenv(name, "")
        patch.delenv(name)


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Restore what a run changes in its process."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        torch.set_num_threads(threads)
        if dist.is_initialized():
            launch.shut_down()


@pytest.fixture(scope="module", params=[0o077, 0o022], ids="umask {:03o}".format)
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_figure: Callable[[Any, Path], None],
) -> Iterator[Run]:
    """Train two steps with all writers: metrics, TensorBoard, wandb, plots, checkpoints."""
    run = Run(
        directory=tmp_path_factory.mktemp("secure") / "run",
        umask=request.param,
        secrets={name: secrets.token_hex(20) for name in SECRET_NAMES},
    )
    before = os.umask(run.umask)
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, restored_process():
        unset(patch, *VARIABLES)
        for name, value in run.secrets.items():
            patch.setenv(name, value)
        patch.setitem(sys.modules, "wandb", wandb_for(run))
        patch.setattr(plots, "write_figure", write_figure)
        plan: dict[str, Any] = {
            "train_iters": 2,
            "num_layers": 1,
            "eval_interval": 1,
            "device": "cpu",
        }
        plan |= {"save": run.directory, "wandb_project": KNOWN, "save_interval": 1}
        try:
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
                run.status = command.main(flags(**plan, threads_per_rank=1))
        finally:
            os.umask(before)
    run.log = log.getvalue()
    yield run


def files(run: Run) -> list[Path]:
    found = [path for path in run.directory.rglob("*") if path.is_file()]
    names = {path.name for path in found}
    assert {"metrics.jsonl", "events.jsonl", "ended.json", "config.yaml", "wandb_run_id"} <= names
    assert {"loss.png", "common.pt", "run.json", "manifest.json", "expert_load.jsonl"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    return found


def test_the_run_wrote_everything(run: Run) -> None:
    assert run.status == 0, run.log
    assert "iteration 2/2" in run.log
    assert len(run.wandb) > 3


def test_no_file_and_no_line_of_a_run_holds_a_secret(run: Run) -> None:
    contents = {str(path): path.read_bytes() for path in files(run)}
    contents["log"] = run.log.encode()
    contents["wandb"] = repr(run.wandb).encode()
    holders = [name for name, content in contents.items() if KNOWN.encode() in content]
    assert len(holders) >= 3  # what is known to be there is found: config.yaml twice, and by wandb
    for name, value in run.secrets.items():
        assert os.environ.get(name) != value
        assert not [path for path, content in contents.items() if value.encode() in content], name


def test_what_is_unpickled_names_no_function_of_megatron_core(run: Run) -> None:
    """megatron-core 0.19 replaces a function of torch by whose name tensors are pickled."""
    pickled = {
        path: path.read_bytes()
        for path in files(run)
        if path.suffix in {".distcp", ".pt"} or path.name == ".metadata"
    }
    assert len({path.name for path in pickled}) == 3
    shards = [content for path, content in pickled.items() if path.suffix == ".distcp"]
    assert all(b"_rebuild_tensor_v2" in content for content in shards)  # names are in clear
    for path, content in pickled.items():
        assert b"megatron" not in content, path
    for path in files(run):
        assert b"load_from_bytes" not in path.read_bytes(), path


def test_wandb_gets_settings_only(run: Run) -> None:
    (_, started) = run.wandb[0]
    assert started["config"].keys() == flatten(PretrainConfig()).keys()
    assert started["config"]["wandb_project"] == KNOWN


def test_the_doctors_page_shows_no_key_of_slurm() -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JWT": KNOWN}
    page = repr(slurm_section(variables, num_hosts=1))
    assert "7" in page
    assert KNOWN not in page


def test_files_are_made_with_the_users_umask(run: Run) -> None:
    for path in (run.directory, *run.directory.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~run.umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_run_on_one_machine_listens_on_loopback_alone(run: Run) -> None:
    assert run.listening  # gloo does listen, even for one process
    assert all(ipaddress.ip_address(each).is_loopback for each in run.listening), run.listening


def test_writers_of_the_tools_keep_to_the_umask_too(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with TokenFileWriter(str(tmp_path / "tokens"), vocab_size=10) as writer:
            writer.add_document([1, 2])
            writer.finish()
        with OutputFile(str(tmp_path / "scored.jsonl")) as lines:
            lines.write_record({"a": 1})
            lines.finish()
        with new_directory(tmp_path / "hf") as directory:
            write_durably(directory / "config.json", "{}")
    finally:
        os.umask(before)
    found = sorted(tmp_path.rglob("*"))
    assert [path.name for path in found] == [
        *("hf", "config.json", "scored.jsonl", "tokens.bin", "tokens.idx")
    ]
    for path in found:
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def other_interface() -> tuple[str, str] | None:
    """Find an interface with an address other than loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not ipaddress.ip_address(each.address).is_loopback:
                return name, each.address
    return None


def test_gloo_uses_the_interface_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = other_interface()
    if found is None:
        pytest.skip("this machine has the loopback interface alone")
    unset(monkeypatch, *VARIABLES)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", found[0])
    with restored_process():
        launch.connect(ParallelConfig(device="cpu", threads_per_rank=1))
        addresses = listening()
        dist.destroy_process_group()
    assert found[1] in addresses  # so the loopback test above can fail


@pytest.mark.parametrize(
    ("environment", "is_kept"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_loopback_is_for_runs_on_one_machine(
    environment: dict[str, str], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset(monkeypatch, *VARIABLES)
    of_a_rank = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**of_a_rank, **environment}.items() if environment else ():
        monkeypatch.setenv(name, value)
    launch._restrict_gloo_to_loopback()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if is_kept else None)
