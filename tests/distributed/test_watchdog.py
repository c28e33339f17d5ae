"""A rank that hangs among real processes is named in time, and the job ends; steps are left alone.

Every launch begins with steps of which a report would fail the test, one launch with long ones.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.launcher import HERE, REPO, program, ranks
from tests.distributed.worker_watchdog import TIMEOUT_S

WORKER = HERE / "worker_watchdog.py"
SLACK_S = 4.0
"""For a crowded machine, beside the tenth of the time-out that the watchdog itself may take."""


@dataclass(frozen=True)
class Ended:
    """A job that has ended."""

    status: int
    stdout: str
    stderr: str
    report_s: float
    """From the fault to the first message of a watchdog."""
    survivors: list[int]
    """Processes of ranks that are still there."""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_job(fault: str, victim: int, out: Path, *, restarts: int = 0) -> Ended:
    """Start three ranks under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
        *("--max-restarts", str(restarts), "--monitor-interval", "0.1"),
        *(*program(WORKER), fault, str(victim), str(out)),
    ]
    with subprocess.Popen(
        command,
        env=environment(),
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as job:
        assert job.stderr is not None and job.stdout is not None
        said, spoke_at = [], 0.0
        for line in job.stderr:
            said.append(line)
            if line.startswith("watchdog:") and not spoke_at:
                spoke_at = time.time()
            if "ends the job" in line and fault == "stop":
                # Let the frozen rank hear torchrun's SIGTERM, or torchrun kills it in 30 s.
                os.kill(int((out / f"rank{victim}.pid").read_text()), signal.SIGCONT)
        stdout = job.stdout.read()
        status = job.wait(60)
    began = float((out / "fault").read_text())
    pids = [int(file.read_text()) for file in out.glob("rank*.pid")]
    survivors = [pid for pid in pids if psutil.pid_exists(pid)]
    return Ended(status, stdout, "".join(said), spoke_at - began, survivors)


@pytest.mark.timeout(300)
def test_frozen_rank_is_named_in_time_and_the_job_ends(tmp_path: Path) -> None:
    """Rank 0, so that another has to speak."""
    done = run_job("stop", 0, tmp_path)
    host, pid = socket.gethostname(), (tmp_path / "rank0.pid").read_text()
    assert f"{TIMEOUT_S:g} s: rank 0 on {host} hangs" in done.stderr, done.stderr[-4000:]
    heard = r"last heartbeat in stage '(data|train)' of iteration [56]"
    assert re.search(rf"rank 0 on {host}, pid {pid}, {heard}: silent", done.stderr), done.stderr
    assert "ranks 1-2, stage 'train' of iteration 6: waiting at" in done.stderr
    assert "worker_watchdog.py" in done.stderr
    assert done.stderr.count("ends the job") == done.stderr.count("watchdog: rank 1 ends") == 1
    assert TIMEOUT_S <= done.report_s < 1.1 * TIMEOUT_S + SLACK_S
    assert done.status == 1
    assert done.survivors == []


@pytest.mark.timeout(300)
def test_sleeping_rank_is_named_with_its_line_and_torchrun_starts_again(tmp_path: Path) -> None:
    done = run_job("sleep", 2, tmp_path, restarts=1)
    assert f"rank 2 on {socket.gethostname()} hangs" in done.stderr, done.stderr[-4000:]
    assert "'data' of iteration 6: is idle and waits for no other rank" in done.stderr
    line = next(
        number
        for number, text in enumerate(WORKER.read_text().splitlines(), start=1)
        if "time.sleep(600)" in text
    )
    assert f"at tests/distributed/worker_watchdog.py:{line} in read_data" in done.stderr
    assert done.stderr.count("ends the job") == 1
    assert TIMEOUT_S <= done.report_s < 1.1 * TIMEOUT_S + SLACK_S
    assert done.status == 0
    assert done.stdout.count("finished") == 3
    assert done.survivors == []


@pytest.mark.timeout(300)
def test_rank_that_serves_the_store_is_named_by_its_silence(tmp_path: Path) -> None:
    """Without torchrun rank 0 serves the store, so no heartbeat can be read when it is frozen."""
    done = ranks(2, WORKER, "stop", "0", str(tmp_path), timeout=200)
    assert "watchdog: rank 1 on" in done.stderr, done.stderr[-4000:]
    assert "the job's store has not answered" in done.stderr
    assert done.codes == [-signal.SIGTERM, 1]
