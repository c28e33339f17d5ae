"""Runs every example script as a job of a real SLURM, on two virtual nodes of this machine.

Tests compare with what earlier ones trained, so they run in order, in one process.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.slurm.cluster import REPO, Cluster, wait_until

EXAMPLES = REPO / "examples" / "slurm"
PRETRAIN = EXAMPLES / "pretrain.sbatch"
ITERATIONS = 120
BRANCH = 60

COMMON = {
    "preset": "olmoe_1b_7b",
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_experts": 6,
    "moe_router_topk": 3,
    "moe_ffn_hidden_size": 20,
    "vocab_size": 128,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "expert_model_parallel_size": 2,
    "mock_data": "true",
    "split": "'90,10'",
    "lr": 0.003,
    "min_lr": 0.0003,
    "lr_wsd_decay_style": "linear",
    "lr_wsd_decay_iters": 10,
    "seed": 7,
    "log_interval": 1,
    "eval_iters": 1,
    "tensorboard": "false",
}
TRUNK = {
    **COMMON,
    "train_iters": ITERATIONS,
    "lr_decay_style": "WSD",
    "eval_interval": 50,
    "save_interval": BRANCH,
}


@dataclass(frozen=True, kw_only=True)
class Started:
    """Holds the jobs that run from the first test on."""

    chain: str
    """Job that submits a trunk and its anneal."""
    following: subprocess.Popen[str]
    """tools/submit.py --follow with the trunk's recipe."""


@pytest.fixture(scope="module")
def started(cluster: Cluster) -> Iterator[Started]:
    for name, settings in (("trunk", TRUNK), ("anneal", COMMON)):
        text = "".join(f"{key}: {value}\n" for key, value in settings.items())
        (cluster.work / f"{name}.yaml").write_text(text)
    command = [sys.executable, str(REPO / "tools" / "submit.py"), "trunk.yaml", "--nodes", "2"]
    command += ["--ranks-per-node", "1", "--save", "stopped", "--follow", "--poll", "0.5"]
    with subprocess.Popen(
        command,
        cwd=cluster.work,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as following:
        chain = cluster.submit(
            EXAMPLES / "anneal_chain.sbatch",
            *("trunk.yaml", "trunk", "anneal.yaml", str(BRANCH)),
            TRUNK_OPTIONS="--nodes=2",
        )
        try:
            yield Started(chain=chain, following=following)
        finally:
            following.kill()


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[tuple[int, str, Any]]:
    """Return the values that a run recorded, in order; JSON keeps every bit of a float."""
    keys = ("lm_loss", "grad_norm", "valid_loss", "learning_rate")
    return [(r["iteration"], key, r[key]) for r in records(run) for key in keys if key in r]


def last_step(run: Path) -> int:
    # The last line may be incomplete.
    found = re.findall(r'^\{"iteration": (\d+)', (run / "metrics.jsonl").read_text(), re.MULTILINE)
    return int(found[-1]) if found else 0


def has_stepped(run: Path, steps: int) -> bool:
    return (run / "metrics.jsonl").exists() and last_step(run) >= steps


def ended(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "ended.json").read_text())
    return found


def job_number(cluster: Cluster, run: str) -> str:
    path = cluster.work / run / "slurm" / "job_id"
    wait_until(lambda: path.exists() and path.read_text().strip() != "", 120, f"{path}")
    return path.read_text().strip()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_accepts_the_script(script: Path, cluster: Cluster) -> None:
    for options in ([], ["--nodes=2", "--gpus-per-node=8", "--exclusive", "--mem=0"]):
        done = cluster.call("sbatch", "--test-only", *options, str(script))
        assert done.returncode == 0, done.stderr


def test_stopped_job_is_requeued_and_ends_bitwise_like_an_undisturbed_one(
    cluster: Cluster, started: Started
) -> None:
    run = cluster.work / "stopped"
    number = job_number(cluster, "stopped")
    wait_until(lambda: has_stepped(run, 3), 120, "steps", lambda: cluster.log(number))
    # Signals the batch shell alone, like --signal=B:USR1@300.
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    wait_until(
        lambda: cluster.job(number)["Restarts"] == "1",
        60,
        "requeueing",
        lambda: cluster.log(number),
    )
    where = ended(run)
    assert (where["reason"], where["requeue"]) == ("signal", True)
    assert 3 <= where["iteration"] == where["saved_iteration"] < ITERATIONS
    # The next test resumes this checkpoint on another number of nodes.
    shutil.copytree(run, cluster.work / "moved")

    assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)
    assert ended(run)["reason"] == "finished"
    trunk = trunk_job(cluster, started)
    assert cluster.wait(trunk) == "COMPLETED 0:0", cluster.log(trunk)
    assert cluster.job(trunk)["Restarts"] == "0"
    expected = losses(cluster.work / "trunk")
    assert [each[0] for each in expected if each[1] == "lm_loss"] == list(range(1, ITERATIONS + 1))
    assert losses(run) == expected

    # --follow shows the whole job, including the restart.
    shown, _ = started.following.communicate(timeout=60)
    assert started.following.returncode == 0, shown
    for line in (
        f"submitted job {number}: ",
        f"job {number}: RUNNING",
        f"job {number}: RUNNING, restart 1",
        f" of {ITERATIONS} (",
        "the trainer ended: finished",
        f"job {number} ended: COMPLETED, exit status 0",
    ):
        assert line in shown, shown
    log = cluster.log(number)
    assert "SIGUSR1: asking every rank to save and stop" in log
    assert f"job {number} starts, restart 1; newest checkpoint: {where['iteration']}" in log
    for node in ("n0", "n1"):
        text = (run / "logs" / f"stopped-{number}-{node}.log").read_text()
        # The log has both starts; rank 0 is on the first node.
        assert text.count("run ended: ") == (2 if node == "n0" else 0), text


def trunk_job(cluster: Cluster, started: Started) -> str:
    assert cluster.wait(started.chain) == "COMPLETED 0:0", cluster.log(started.chain)
    return re.findall(r"trunk: job (\d+),", cluster.log(started.chain))[0]


def test_run_resumes_on_another_number_of_nodes(cluster: Cluster, started: Started) -> None:
    """Resumes on one node with two ranks a run of two nodes with one rank each."""
    first = ended(cluster.work / "moved")["iteration"]
    number = cluster.submit(
        *("--nodes=1", PRETRAIN, "trunk.yaml", "moved"), RANKS_PER_NODE="2", REQUEUE="no"
    )
    assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)
    assert f"1 nodes x 2 ranks, restart 0\njob {number} starts; newest checkpoint: {first}" in (
        cluster.log(number)
    )
    assert cluster.wait(trunk_job(cluster, started)) == "COMPLETED 0:0"
    assert losses(cluster.work / "moved") == losses(cluster.work / "trunk")


def test_anneal_waits_for_its_trunk_and_branches_off_it(cluster: Cluster, started: Started) -> None:
    trunk_job(cluster, started)
    log = cluster.log(started.chain)
    number = re.findall(rf"anneal from {BRANCH}: job (\d+), trunk_anneal_{BRANCH}", log)[0]
    assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)
    branch = records(cluster.work / f"trunk_anneal_{BRANCH}")
    steps = [record for record in branch if "lm_loss" in record]
    assert [record["iteration"] for record in steps] == list(range(BRANCH + 1, BRANCH + 11))
    # Linear from the trunk's rate to the end of the tail.
    rates = [record["learning_rate"] for record in steps]
    trunk = {r["iteration"]: r for r in records(cluster.work / "trunk") if "lm_loss" in r}
    assert rates[0] == trunk[BRANCH]["learning_rate"] == 0.003
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.001


def test_anneals_of_a_failed_trunk_are_cancelled(cluster: Cluster, started: Started) -> None:
    chain = cluster.submit(
        EXAMPLES / "anneal_chain.sbatch",
        *("trunk.yaml", "hopeless", "anneal.yaml", "60", "90"),
        PYTHON="/bin/false",
    )
    assert cluster.wait(chain) == "COMPLETED 0:0", cluster.log(chain)
    trunk, *anneals = re.findall(r": job (\d+),", cluster.log(chain))
    assert cluster.wait(trunk) == "FAILED 1:0"
    assert "training ended with status 1 and wrote no " in cluster.log(trunk)
    for anneal in anneals:
        cluster.wait(anneal, timeout=30)
        assert cluster.job(anneal)["JobState"] == "CANCELLED"
    assert len(anneals) == 2


def test_array_trains_each_recipe_and_the_bad_one_fails_alone(cluster: Cluster) -> None:
    (cluster.work / "list.txt").write_text(
        "# NAME RECIPE FLAGS\n\ngood trunk.yaml --train-iters 20\nbad trunk.yaml --lr 1e30\n"
    )
    array = cluster.submit(
        *("--array=0-2", EXAMPLES / "array_ablation.sbatch", "ablation", "@list.txt"),
        *("--expert-model-parallel-size", "1"),
    )
    states = [cluster.wait(f"{array}_{task}") for task in range(3)]
    logs = [(cluster.work / f"ablation-{array}_{task}.out").read_text() for task in range(3)]
    assert states == ["COMPLETED 0:0", "FAILED 1:0", "FAILED 2:0"], "\n".join(logs)
    good, bad = (cluster.work / "ablation" / name for name in ("good", "bad"))
    assert last_step(good) == 20
    # The reason is in the job's own log.
    assert ended(bad)["reason"] == "error" and ended(bad)["detail"]
    assert f"failed: {ended(bad)['detail']}" in logs[1]
    assert "task 2 of 2: submit it with sbatch --array=0-1" in logs[2]


def rank_process(run: Path, node: str) -> psutil.Process | None:
    """Find the training process of a run on a node."""
    for process in psutil.process_iter():
        try:
            command, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if str(run) in command and "RANK" in environment:
            if environment.get("SLURMD_NODENAME") == node:
                return process
    return None


def test_lost_rank_fails_the_job_which_is_not_requeued(cluster: Cluster, started: Started) -> None:
    run = cluster.work / "lost"
    number = cluster.submit("--nodes=2", PRETRAIN, "trunk.yaml", "lost", "--train-iters", "100000")
    wait_until(lambda: has_stepped(run, 3), 120, "steps", lambda: cluster.log(number))
    process = rank_process(run, "n1")
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    # 1, or 143 or 137 if SLURM had to kill the other node's torchrun.
    assert re.fullmatch(r"FAILED (1|137|143):0", cluster.wait(number)), cluster.log(number)
    assert cluster.job(number)["Restarts"] == "0"
    log = cluster.log(number)
    assert re.search(rf"pretrain-{number}-n1\.log: .*Signal 9 \(SIGKILL\)", log), log
    assert "failed; the training step ended with status" in log


def test_run_is_exported_and_scored(cluster: Cluster, started: Started) -> None:
    trunk = trunk_job(cluster, started)
    texts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    lines = [json.dumps({"tokens": tokens}) for tokens in texts]
    (cluster.work / "texts.jsonl").write_text("\n".join(lines) + "\n")
    number = cluster.submit(
        f"--dependency=afterok:{trunk}",
        *(EXAMPLES / "convert_and_evaluate.sbatch", "trunk", "evaluated", "texts.jsonl"),
    )
    assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)
    out = cluster.work / "evaluated"
    report = json.loads((out / "hf" / "conversion_report.json").read_text())
    assert report["iteration"] == ITERATIONS
    assert report["verification"]["passed"] is True
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [each["tokens"] for each in scored] == texts
    assert [len(each["token_logprobs"]) for each in scored] == [4, 2]
    assert all(each["sum_logprob"] < 0 for each in scored)
    # Existing results are not overwritten.
    again = cluster.submit(
        EXAMPLES / "convert_and_evaluate.sbatch", "trunk", "evaluated", "texts.jsonl"
    )
    assert cluster.wait(again) == "FAILED 2:0"
    assert "evaluated holds a result; give another directory" in cluster.log(again)
