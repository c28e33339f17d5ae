"""Four ranks on two nodes, by name, before a run: all well, or one of them with a fault."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.health.preflight import _speed_warnings
from megatron.trainer.health.rank_checks import RankFacts
from tests.distributed.launcher import HERE, REPO, Ended, flags, ranks
from tests.distributed.worker_preflight import TIMEOUT_S


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, float]:
    """Where the cases lie, how it ended, and how long the last took to be reported."""
    out = tmp_path_factory.mktemp("preflight")
    done = ranks(4, HERE / "worker_preflight.py", str(out), timeout=300)
    ended = time.time()
    began = [float(found) for found in re.findall(r"hang begins ([\d.]+)", done.stdout)]
    assert len(began) == 4, done.stderr[-5000:]
    return out, done, ended - max(began)


def said(out: Path, name: str) -> Any:
    """What each rank got; the same for all."""
    each = [json.loads((out / f"{name}.rank{rank}.json").read_text()) for rank in range(4)]
    assert each == [each[0]] * 4
    return each[0]


def test_healthy_ranks_are_listed_with_times_of_every_kind_of_group(launched: Any) -> None:
    out, _, _ = launched
    lines = said(out, "healthy")
    assert re.fullmatch(
        r"pre-flight: 4 rank\(s\) on 2 node\(s\) answer: python [\d.]+, torch [\d.+a-z]+,"
        r" megatron-core [\d.]+, numpy [\d.]+",
        lines[0],
    )
    assert re.search(r"products are right; [\d,]+ to [\d,]+ GFLOP/s", lines[1])
    kinds = re.findall(r"([a-z ]+) \((\d)\) [\d.]+ and [\d.]+ ms", lines[2].partition("MiB:")[2])
    # TP 2, EP 2, and by default ETP 2: one copy of the experts.
    assert [(kind.strip(), int(size)) for kind, size in kinds] == [
        ("world", 4),
        ("tp", 2),
        ("dp", 2),
        ("ep", 2),
        ("etp", 2),
    ]
    for host, line in zip(("n0", "n1"), lines[3:], strict=True):
        place = re.escape(str(out))
        assert re.fullmatch(
            rf"pre-flight: {host} writes [\d,]+ MB/s to {place}, [\d,.]+ GiB free", line
        )
    assert not list(out.glob(".preflight*"))
    assert not (out / "run").exists()


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("versions", r"ranks differ in torch: 2\.10\.0 on n0; 2\.13\.\S+ on n0, n1"),
        ("clock", r"the clock of n1 is (89|90)\.\d s ahead of the others'"),
    ],
)
def test_ranks_that_differ_are_named(name: str, warning: str, launched: Any) -> None:
    lines = said(launched[0], name)
    assert re.search(f"pre-flight: warning: {warning}", "\n".join(lines)), lines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("product", r"rank 2 on n1 \(cpu\) multiplies two matrices and gets a wrong product"),
        ("sum", r"rank 0 on n0 \(cpu\) gets wrong sums from the all-reduce of world, tp"),
        ("unwritable", r"cannot write to /proc for --save /proc/run on n0: "),
        ("other_disk", r"--save \S+disk1/run is another directory on n1 than on n0"),
    ],
)
def test_fault_is_reported_on_every_rank(name: str, message: str, launched: Any) -> None:
    error = said(launched[0], name)["error"]
    assert re.search(message, error), error


def test_slow_gpu_is_warned_of_and_a_slow_processor_is_not() -> None:
    def facts(device: str) -> list[RankFacts]:
        return [
            RankFacts(rank=rank, host=f"n{rank}", pid=1, device=device, versions={})
            for rank in range(3)
        ]

    found = _speed_warnings(facts("cuda:0 (H100)"), [40e12, 50e12, 30e12])
    assert found == [
        "rank 2 on n2 (cuda:0 (H100)) multiplies at 30,000 GFLOP/s, the others at 40,000; all will"
        " wait for it"
    ]
    assert _speed_warnings(facts("cpu"), [40e9, 50e9, 3e9]) == []


def test_disk_of_one_node_is_measured_once(launched: Any) -> None:
    lines = said(launched[0], "versions")
    assert sum("MB/s" in line for line in lines) == 2


def test_rank_that_hangs_is_named_in_time_with_its_host(launched: Any) -> None:
    _, done, seconds = launched
    stderr = done.stderr
    assert "watchdog: no rank has made progress for" in stderr, stderr[-5000:]
    assert "rank 3 on n1 hangs" in stderr
    assert "stage 'all-reduce, world'" in stderr
    assert "in sleep_in_data" in stderr
    assert stderr.count("ends the job") == stderr.count("watchdog: rank 0 ends") == 1
    assert done.codes[0] == 2
    assert seconds < TIMEOUT_S + 4.0


def test_doctor_of_a_job_prints_one_page_with_every_kind_of_group(tmp_path: Path) -> None:
    layout = flags(tensor_model_parallel_size=2, save=tmp_path / "run", expert_backend="te")
    done = ranks(2, REPO / "tools/doctor.py", "--device", "cpu", "--json", *layout, timeout=300)
    page = json.loads(done.stdout)  # one, or this would fail
    rows = {row["name"]: row for row in page["sections"]["ranks"]}
    assert rows["responding"]["value"] == "2 ranks on 1 node"
    assert {name for name in rows if name.startswith("all-reduce")} == {
        "all-reduce, world",
        "all-reduce, tp",
        "all-reduce, etp",
    }
    assert all(row["state"] == "ok" for row in rows.values())
    assert len(page["problems"]) == page["status"] == done.returncode == 1
    assert "expert_backend 'te' computes on a GPU" in page["problems"][0]
