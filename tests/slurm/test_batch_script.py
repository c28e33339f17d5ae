"""Tests what pretrain.sbatch passes to torchrun, and when it requeues the job.

SLURM is real; stand_in.py replaces torchrun and the trainer.
"""

import json
from pathlib import Path
from typing import Any

from tests.slurm.cluster import HERE, REPO, Cluster, wait_until

PRETRAIN = REPO / "examples" / "slurm" / "pretrain.sbatch"


def start(cluster: Cluster, name: str, *flags: str, mode: str, **variables: str) -> str:
    """Submit a run on two nodes, with recipe and run directory called `name`."""
    recipe = cluster.work / f"{name}.yaml"
    if not recipe.exists():
        recipe.write_text("lr: 0.1\n")
    return cluster.submit(
        "--nodes=2",
        PRETRAIN,
        recipe.name,
        name,
        *flags,
        STAND_IN=mode,
        **{"PYTHON": str(HERE / "stand_in.py"), **variables},
    )


def finish(cluster: Cluster, *numbers: str) -> None:
    for number in numbers:
        assert cluster.wait(number) == "COMPLETED 0:0", cluster.log(number)


def called(run: Path, *, restart: int = 0, node: str = "n0") -> list[str]:
    """Return the arguments that torchrun got."""
    arguments: list[str] = call(run, restart=restart, node=node)["arguments"]
    return arguments


def call(run: Path, *, restart: int, node: str = "n0") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"called-{restart}-{node}.json").read_text())
    return found


def trainer_flags(run: Path, *, restart: int = 0, tool: str = "pretrain") -> list[str]:
    arguments = called(run, restart=restart)
    return arguments[arguments.index(str(REPO / "tools" / f"{tool}.py")) + 1 :]


def test_torchrun_gets_the_same_arguments_on_every_node(cluster: Cluster) -> None:
    run = cluster.work / "alike"
    number = start(
        *(cluster, "alike", "--lr", "0.1"),
        mode="finish",
        RANKS_PER_NODE="3",
        TORCHRUN_FLAGS="--max-restarts 2",
    )
    finish(cluster, number)
    own = ["--config", "alike.yaml", "--save", str(run), "--lr", "0.1", "--load", str(run)]
    expected = [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"n0:{20000 + int(number)}"),
        *("--rdzv-id", f"{number}-0", "--max-restarts", "2"),
        *(str(REPO / "tools" / "pretrain.py"), *own),
    ]
    assert called(run, node="n0") == called(run, node="n1") == expected


def test_rendezvous_variables_and_gpus_per_node_are_used(cluster: Cluster) -> None:
    (cluster.work / "preset.yaml").write_text("lr: 0.1\n")
    number = cluster.submit(
        *("--nodes=2", "--gpus-per-node=8", PRETRAIN, "preset.yaml", "preset"),
        STAND_IN="finish",
        PYTHON=str(HERE / "stand_in.py"),
        MASTER_ADDR="10.0.0.7",
        MASTER_PORT="1234",
    )
    finish(cluster, number)
    arguments = called(cluster.work / "preset")
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "10.0.0.7:1234"
    assert arguments[arguments.index("--nproc-per-node") + 1] == "8"


BEGINNINGS: dict[str, tuple[str, list[str], list[str]]] = {
    # Recipe or flags name another run's checkpoint: no flags are added.
    "finetune": ("load: other\nsave: mine\nfinetune: true\n", [], []),
    "quoted": ("load: 'other' # so\n", [], []),
    "anneal": ("lr: 0.1\n", ["--load", "x", "--anneal-from", "5"], []),
    "earlier": ("lr: 0.1\n", ["--ckpt-step", "3"], ["--load", "RUN"]),
    # RUN replaces the recipe's own directory; null means none.
    "own": ("load: mine\nsave: mine\n", [], ["--load", "RUN"]),
    "null": ("load: null\n", [], ["--load", "RUN"]),
    "tuned": ("load: other\ntrain_data: [a]\n", [], []),
}
"""Recipe, flags, and the flags that are added if the run directory is empty."""
STAGES = {"tuned": "finetune"}
"""Of those that are not pretraining."""


def test_run_starts_as_configured_and_resumes_its_own_checkpoint(cluster: Cluster) -> None:
    for name, (recipe, _, _) in BEGINNINGS.items():
        (cluster.work / f"{name}.yaml").write_text(recipe)
    for is_first in (True, False):
        jobs = [
            start(cluster, name, *flags, mode="finish", STAGE=STAGES.get(name, ""))
            for name, (_, flags, _) in BEGINNINGS.items()
        ]
        finish(cluster, *jobs)
        for name, (_, flags, added) in BEGINNINGS.items():
            run = cluster.work / name
            end = added if is_first else ["--load", "RUN", "--no-finetune"]
            own = ["--config", f"{name}.yaml", "--save", str(run), *flags]
            expected = own + [str(run) if each == "RUN" else each for each in end]
            tool = STAGES.get(name, "pretrain")
            assert trainer_flags(run, tool=tool) == expected, (name, is_first)


def test_stopped_job_is_requeued_and_resumes_its_newest_checkpoint(cluster: Cluster) -> None:
    """Restarts through SLURM, up to the limit."""
    run, cap = cluster.work / "back", "--max-restarts 1"
    number = start(cluster, "back", "--ckpt-step", "3", mode="wait", REQUEUE_FLAGS=cap)
    unsaved = start(cluster, "unsaved", "--load", "x", mode="stop", REQUEUE_FLAGS=cap)
    for restart in (0, 1):
        wait_until((run / f"called-{restart}-n0.json").exists, 60, "a start")
        # The signals of preemption and of the time limit.
        cluster.call("scancel", "--batch", f"--signal={('TERM', 'USR1')[restart]}", number)
    assert cluster.wait(number, timeout=60) == "FAILED 1:0"
    log = cluster.log(number)
    assert cluster.job(number)["Restarts"] == "1"
    assert log.count("asking every rank to save and stop") == 2
    assert f"job {number} was restarted 1 times, which is the limit" in log
    # The ranks got SIGUSR1 for both; torchrun survived, so the step ended with status 0.
    assert "signals [10" in log and "signals [15" not in log
    arguments = called(run, restart=1)
    assert f"{number}-1" in arguments
    own = ["--load", str(run), "--no-finetune", "--ckpt-step", "None"]
    assert arguments[-len(own) :] == own
    assert [call(run, restart=restart)["has_metrics"] for restart in (0, 1)] == [False, True]

    # A run from another run's checkpoint that was stopped before it saved its own starts afresh:
    # the trainer refuses a directory with records.
    assert cluster.wait(unsaved, timeout=60) == "FAILED 1:0"
    run = cluster.work / "unsaved"
    assert [call(run, restart=restart)["has_metrics"] for restart in (0, 1)] == [False, False]
    assert trainer_flags(run, restart=1) == trainer_flags(run, restart=0)


def test_job_without_requeueing_ends_with_status_75(cluster: Cluster) -> None:
    number = start(cluster, "no", mode="stop", REQUEUE="no")
    assert cluster.wait(number) == "FAILED 75:0"
    assert "stopped at iteration 0 of 9 (signal: signals []); to be requeued" in (
        cluster.log(number)
    )


def test_cancelled_job_stays_cancelled(cluster: Cluster) -> None:
    """Cancels a job whose training has saved and asks to be requeued."""
    run = cluster.work / "cancelled"
    number = start(cluster, "cancelled", mode="wait")
    wait_until((run / "called-0-n0.json").exists, 60, "a start")
    cluster.call("scancel", number)
    cluster.wait(number, timeout=60)
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "not requeued: SLURM is ending the job" in cluster.log(number)


def test_wrong_arguments_fail_with_the_reason_in_the_log(cluster: Cluster) -> None:
    (cluster.work / "some.yaml").write_text("lr: 0.1\n")
    wrong = {
        "usage: sbatch examples/slurm/pretrain.sbatch RECIPE RUN": [],
        "there is no recipe gone.yaml in ": ["gone.yaml", "run"],
        "--save=x: the recipe is the first argument": ["some.yaml", "run", "--save=x"],
    }
    jobs = {message: cluster.submit(PRETRAIN, *given) for message, given in wrong.items()}
    outside = cluster.submit(PRETRAIN, "some.yaml", "run", REPO="/nowhere")
    jobs["/nowhere is not the repository: submit the job there, or set REPO"] = outside
    for message, number in jobs.items():
        assert cluster.wait(number) == "FAILED 2:0"
        assert message in cluster.log(number)
