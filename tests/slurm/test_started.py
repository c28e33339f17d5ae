"""Tests how a process judges its place in a real job, where no torchrun has given it a rank."""

import os
import shlex
import subprocess
import sys

from tests.slurm.cluster import REPO, Cluster

JUDGE = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from megatron.trainer.runtime.started import MissingTorchrunError, check_tasks, has_terminal

try:
    check_tasks(os.environ, pid=os.getpid(), has_terminal=has_terminal)
    print(sys.argv[1], "alone")
except MissingTorchrunError as error:
    print(sys.argv[1], "task", error.task)
"""


def test_tasks_are_told_from_batch_scripts_and_shells(cluster: Cluster) -> None:
    script = cluster.work / "judge.py"
    script.write_text(JUDGE)
    judge = f"{shlex.quote(sys.executable)} {script}"
    job = cluster.work / "judge.sbatch"
    job.write_text(
        f"""#!/bin/bash
{judge} batch
srun --ntasks 2 {judge} step
srun --ntasks 2 bash -c '{judge} script; true'
srun --ntasks 1 --nodes 1 {judge} single
srun --ntasks 2 env RANK=1 {judge} rank
"""
    )
    # srun's own notices, such as that a node is still busy with the step before, go elsewhere.
    number = cluster.submit("--nodes=2", "--ntasks=2", "--error=judge.err", job)
    assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)
    assert sorted(cluster.log(number).splitlines()) == [
        "batch alone",
        *("rank alone", "rank alone"),
        *("script task 0", "script task 1"),
        "single alone",
        *("step task 0", "step task 1"),
    ]

    def in_terminal(command: str) -> str:
        master, slave = os.openpty()
        whole = ["srun", "--nodes=2", "--ntasks=2", "--pty", *shlex.split(command)]
        with subprocess.Popen(
            whole,
            cwd=cluster.work,
            env=cluster.environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        ) as running:
            os.close(slave)
            assert running.wait(timeout=300) == 0
        with open(master, "rb", buffering=0) as shown:
            return shown.read(4096).decode()

    assert "typed alone" in in_terminal(f"bash -c '{judge} typed; true'")
    assert "itself task 0" in in_terminal(f"{judge} itself")
    # A step started from such a shell is none of its own.
    nested = f"bash -c 'srun --overlap --ntasks 2 bash -c \"{judge} nested; true\"'"
    assert "nested task 1" in in_terminal(nested)
