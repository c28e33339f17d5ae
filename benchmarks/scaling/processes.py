"""Times training steps of 1, 2 and 4 processes under each kind of parallelism."""

import dataclasses
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.scaling.points import BLOCK, spread
from benchmarks.session import DifferentMathsError
from benchmarks.shapes import Shape
from benchmarks.timing import interleave, paired_ratio, summarize
from moe_ext.config import MoEModelConfig

REPO = Path(__file__).resolve().parents[2]
_RANK = "benchmarks.scaling.rank"
_LOSS_LIMIT = 1e-4
_POLL_S = 1.0

PROCESS_BLOCK = dataclasses.replace(
    BLOCK,
    # Sizes that four pipeline stages and four expert parallel ranks divide.
    model=dataclasses.replace(
        BLOCK.model,
        num_layers=4,
        hidden_size=256,
        num_attention_heads=4,
        num_experts=16,
        moe_router_topk=4,
        moe_ffn_hidden_size=128,
    ),
)
"""Shape of the processes sweep; its sequences are the global batch, one per micro-batch."""

KINDS: Mapping[str, Sequence[str]] = {
    "DP": (),
    "EP": ("expert-model-parallel-size",),
    "TP": ("tensor-model-parallel-size",),
    "PP": ("pipeline-model-parallel-size",),
}
"""Flags that are set to the number of processes. EP ranks are also data parallel; TP does not shard
experts (ETP 1)."""


class World:
    """Controls ranks that torchrun starts and that wait for requests.

    Args:
        num_ranks: number of ranks.
        directory: directory for the socket and the ranks' output.
    """

    def __init__(self, num_ranks: int, directory: Path) -> None:
        address, self._output = directory / f"{num_ranks}.socket", directory / f"{num_ranks}.err"
        self._num_ranks = num_ranks
        self._connections: list[Connection] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(address))
        self._listener.listen(num_ranks)
        self._listener.settimeout(_POLL_S)
        with self._output.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [
                    *("env", "OMP_NUM_THREADS=1"),
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *("--nproc-per-node", str(num_ranks), "-m", _RANK, str(address)),
                ],
                cwd=REPO,
                stdout=output,
                stderr=output,
            )

    def connect(self) -> None:
        """Wait until every rank has connected.

        Raises:
            RuntimeError: the ranks ended instead.
        """
        with self._listener:
            accepted = [self._accept() for _ in range(self._num_ranks)]
        by_rank = {self._receive(connection): connection for connection in accepted}
        self._connections = [by_rank[rank] for rank in range(self._num_ranks)]

    def call(self, flags: Sequence[str], steps: int) -> list[dict[str, Any]]:
        """Have every rank run `rank.visit`.

        Raises:
            RuntimeError: a rank failed; the message is its traceback.
        """
        for connection in self._connections:
            connection.send((list(flags), steps))
        answers = [self._receive(connection) for connection in self._connections]
        for outcome, value in answers:
            if outcome == "failed":
                raise RuntimeError(f"a rank failed:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        """Close the connections, which ends the ranks."""
        self._listener.close()
        for connection in self._connections:
            connection.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun ends its ranks
            self._process.wait()

    def _accept(self) -> Connection:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                self._check()
                continue
            accepted.setblocking(True)
            return Connection(accepted.detach())

    def _receive(self, connection: Connection) -> Any:
        try:
            while not connection.poll(_POLL_S):
                self._check()
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"a rank ended:\n{self._last_output()}") from error

    def _check(self) -> None:
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"torchrun ended with status {status}:\n{self._last_output()}")

    def _last_output(self) -> str:
        return self._output.read_text(encoding="utf-8")[-4000:]


@contextmanager
def worlds(numbers: Sequence[int]) -> Iterator[dict[int, World]]:
    """Start one world for each number of processes."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scaling-")))
        found: dict[int, World] = {}
        for number in numbers:
            found[number] = World(number, directory)
            stack.callback(found[number].close)
        for world in found.values():
            world.connect()
        yield found


def measure(
    shape: Shape, numbers: Sequence[int], kinds: Sequence[str], *, rounds: int, steps: int
) -> dict[str, Any]:
    """Time each kind of parallelism over each number of processes, all in every round.

    Args:
        shape: model and batch; its sequences are the global batch.
        numbers: numbers of processes; 1 is added.
        kinds: keys of KINDS.
        rounds: visits of each layout.
        steps: timed steps per visit, of which the median is used.

    Raises:
        DifferentMathsError: a layout's first loss differs from the single process's.
    """
    numbers = sorted({1, *numbers})
    layouts = {"1": (1, "")} | {
        f"{kind}{number}": (number, kind) for number in numbers if number > 1 for kind in kinds
    }
    visits: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in layouts}
    with worlds(numbers) as ranks:
        for _, name in interleave(list(layouts), rounds):
            number, kind = layouts[name]
            visits[name].append(ranks[number].call(layout_flags(shape, number, kind), steps))
    _compare_losses(visits)
    seconds = {
        name: [statistics.median(each[0]["seconds"]) for each in rounds_]
        for name, rounds_ in visits.items()
    }
    model = shape.model
    return {
        "machine": describe_machine(),
        "title": (
            f"{shape.num_tokens:,} tokens a step in all, {model.num_layers} layers, h"
            f" {model.hidden_size}, {model.num_experts} experts of {model.moe_ffn_hidden_size},"
            f" top-{model.moe_router_topk}; fp32, gloo; bars from the lowest to the highest round"
        ),
        "processes": numbers,
        "layouts": {
            name: {
                "processes": layouts[name][0],
                "kind": layouts[name][1],
                "seconds": series,
                "tokens_per_second": dataclasses.asdict(
                    summarize([shape.num_tokens / each for each in series])
                ),
                "speedup": dataclasses.asdict(paired_ratio(seconds["1"], series)),
                **_totals(visits[name][0]),
            }
            for name, series in seconds.items()
        },
    }


def _totals(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum over all ranks the recorded and the modelled communication of a step."""
    keys = ("calls", "modelled_calls", "bytes", "modelled_bytes", "wire_bytes")
    return {key: sum(rank[key] for rank in ranks) for key in keys}


def _compare_losses(visits: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    expected = visits["1"][0][0]["loss"]
    for name, rounds in visits.items():
        for ranks in rounds:
            if not abs(ranks[0]["loss"] - expected) <= _LOSS_LIMIT:
                raise DifferentMathsError(
                    f"the first loss under {name} is {ranks[0]['loss']:.6g}, that of a single"
                    f" process {expected:.6g}; the limit is {_LOSS_LIMIT:g}. They do not train"
                    " the same model"
                )


def layout_flags(shape: Shape, number: int, kind: str) -> list[str]:
    """Format the flags for the shape under a layout."""
    flags = [
        *model_flags(shape.model),
        *("--mock-data", "--device", "cpu", "--threads-per-rank", "1"),
        *("--seq-length", str(shape.seq_length), "--micro-batch-size", "1"),
        *("--global-batch-size", str(shape.micro_batch_size), "--train-iters", "1000"),
        *("--expert-tensor-parallel-size", "1"),
    ]
    for name in KINDS.get(kind, ()):
        flags += [f"--{name}", str(number)]
    return flags


def model_flags(model: MoEModelConfig) -> list[str]:
    """Format flags for every model field that is not at its default."""
    flags = []
    for field in dataclasses.fields(model):
        value, name = getattr(model, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def table(found: Mapping[str, Any]) -> str:
    """Format a Markdown table, a row per layout."""
    lines = [
        "| layout | tokens/s | speedup | collectives: recorded / modelled |"
        " payload, MB: recorded / modelled | sent by all, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["layouts"].items():
        lines.append(
            f"| {name if row['kind'] else 'one process'} |"
            f" {spread(row['tokens_per_second'], '.0f')} | {spread(row['speedup'], '.2f')} |"
            f" {row['calls']:,} / {row['modelled_calls']:,} | {row['bytes'] / 1e6:.3f} /"
            f" {row['modelled_bytes'] / 1e6:.3f} | {row['wire_bytes'] / 1e6:.3f} |"
        )
    machine = found["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['date']}, {machine['processor']}, {machine['cpu_count']} cores, torch"
            f" {machine['torch']}; one thread per process. Collectives and bytes: one step,"
            " summed over all processes.",
        ]
    )
