"""Tests built images: their content, how they start commands, and that they train.

`make container-test` runs these; they take minutes and are no part of `make test`.
"""

import json
from pathlib import Path

import pytest

from moe_app.cli import COMMANDS
from tests.container.bases import NVIDIA_TORCH, SYSTEM_PACKAGES, VENV_PACKAGES
from tests.container.buildah import Container, Finished, Store, command

pytestmark = [pytest.mark.container, pytest.mark.timeout(1500)]

PROJECT = "/opt/megatron-moe"
ENTRY = f"{PROJECT}/docker/entrypoint.sh"
# Trains for seconds and records every step.
TINY = (
    *("--preset", "olmoe_tiny", "--mock-data", "--seq-length", "32", "--micro-batch-size", "2"),
    *("--global-batch-size", "4", "--lr", "1e-3", "--min-lr", "1e-4", "--seed", "7"),
    *("--log-interval", "1", "--eval-iters", "1"),
)
TWO_RANKS = (
    *("torchrun", "--standalone", "--nproc-per-node", "2", "tools/pretrain.py"),
    *("--expert-model-parallel-size", "2"),
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    """Read every file of `parts` except bytecode and hidden files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in parts
        for path in (folder / part, *(folder / part).rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


@pytest.fixture(scope="session")
def runs(store: Store) -> Path:
    """Make a directory that is mounted for runs."""
    made = store.work / "runs"
    made.mkdir()
    made.chmod(0o1777)
    return made


def train(container: Container, runs: Path, *words: str) -> Finished:
    options = (f"--volume={runs}:{PROJECT}/runs", "--env=OMP_NUM_THREADS=1")
    return container.run(*words, options=options)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if "lm_loss" in record]


@pytest.fixture(scope="session")
def one_process(cpu: Container, runs: Path) -> Path:
    """Train three steps in one process, the way enroot and apptainer run it.

    They unpack an image, keep it read-only, and take their caller's user, whom it does not know.
    """
    variables = " ".join((*cpu.config["Env"], "OMP_NUM_THREADS=1"))
    words = " ".join(("pretrain", *TINY, "--train-iters", "3", "--save", "runs/one"))
    script = f"""
        mount --bind -o ro {cpu.files} {cpu.files}
        mount --bind {runs} {cpu.files}{PROJECT}/runs
        mount --bind /dev {cpu.files}/dev
        mount -t tmpfs tmpfs {cpu.files}/tmp
        mount -t proc proc {cpu.files}/proc
        exec chroot --userspec=4321:4321 {cpu.files} \\
            /usr/bin/env -C {PROJECT} {variables} {ENTRY} {words}
    """
    command("unshare", "--mount", "bash", "-ec", script)
    return runs / "one"


# Content


def test_user_is_a_number_and_not_root(cpu: Container) -> None:
    assert cpu.config["User"] == "10001:10001"
    assert cpu.run("bash", "-c", "id -u; id -un").stdout.split() == ["10001", "trainer"]


def test_entry_point_is_the_projects_and_its_default_is_help(cpu: Container) -> None:
    assert cpu.config["Entrypoint"] == [ENTRY]
    assert cpu.config["Cmd"] == ["help"]


def test_environment_has_three_variables(cpu: Container) -> None:
    assert {variable.partition("=")[0] for variable in cpu.config["Env"]} == {
        "HOME",
        "PATH",
        "PYTHONNOUSERSITE",
    }


def test_labels_have_version_and_revision(cpu: Container) -> None:
    labels = cpu.config["Labels"]
    assert labels["org.opencontainers.image.version"] == "9.8.7"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_image_holds_the_packages_tools_and_examples_of_the_checkout(
    cpu: Container, checkout: Path
) -> None:
    packages = cpu.path(VENV_PACKAGES)
    installed = ("megatron/trainer", "moe_app", "moe_ext")
    assert contents(packages, *installed) == contents(checkout, *installed)
    copied = ("tools", "examples", "docker/entrypoint.sh")
    assert contents(cpu.path(PROJECT), *copied) == contents(checkout, *copied)


def test_image_holds_nothing_else_of_the_checkout_and_of_the_build(cpu: Container) -> None:
    project = cpu.path(PROJECT)
    directories = {"data", "docker", "examples", "runs", "tools"}
    assert names(project) == {"LICENSE", "README.md"} | directories
    assert [path for path in project.rglob("*") if path.name.startswith(".")] == []
    assert list(project.rglob("*.pyc")) == []
    assert not (cpu.path("/etc/pip.conf")).exists()
    assert names(cpu.path("/tmp")) == set()
    assert not (cpu.path("/home/trainer/.cache")).exists()
    assert not (cpu.path("/build")).exists()


def test_build_context_has_only_what_is_copied(store: Store, checkout: Path) -> None:
    recipe = store.work / "Context"
    recipe.write_text("FROM scratch\nCOPY . /\n")
    store.build("context", checkout, "--file", recipe)
    root = store.start("context").files
    sent = {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert names(root) == sent | {
        "docker",
        "examples",
        "megatron",
        "moe_app",
        "moe_ext",
        "tools",
    }
    assert [str(path) for path in root.rglob("*") if "private" in path.name] == []
    assert not (root / "tools/__pycache__").exists()
    assert not (root / "examples/.key").exists()


# Entry point


def test_help_lists_tools_only(cpu: Container) -> None:
    lines = cpu.run("help").stdout.splitlines()
    assert "  pretrain" in lines
    assert "  recipe" not in lines


def test_exit_status_of_a_command_is_the_containers(cpu: Container) -> None:
    assert cpu.run("bash", "-c", "exit 7", check=False).returncode == 7
    assert cpu.run("pretrian", check=False).returncode == 127


def test_code_is_read_only_and_runs_is_writable(cpu: Container) -> None:
    assert cpu.run("test", "-w", "tools/pretrain.py", check=False).returncode == 1
    assert cpu.run("test", "-w", "runs").returncode == 0


def test_packages_in_a_mounted_home_are_ignored(cpu: Container, store: Store) -> None:
    home = store.work / "home"
    packages = home / ".local/lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    (packages / "stranger.py").write_text("")
    words = ("python", "-c", "import stranger")
    found = cpu.run(*words, options=[f"--volume={home}:/home/trainer"], check=False)
    assert found.returncode == 1
    assert "No module named 'stranger'" in found.stdout


# Console command


def test_console_command_needs_no_repository(cpu: Container) -> None:
    script = """
        cd /tmp
        python -c "import moe_app; print(moe_app.__file__)"
        megatron-moe --help | grep -E "^  [a-z-]+  +[a-z]" | while read -r name _; do
            megatron-moe "$name" --help > help.txt || exit 9
            grep -q "^usage: megatron-moe $name" help.txt && echo "$name"
        done
        rm help.txt
    """
    where, *explained = cpu.run("bash", "-ec", script).stdout.split()
    assert where == f"{VENV_PACKAGES}/moe_app/__init__.py"
    assert explained == list(COMMANDS)


def test_module_trains_from_any_directory(cpu: Container) -> None:
    words = ("-m", "moe_app.pretrain", *TINY, "--train-iters", "2")
    torchrun = ("torchrun", "--nproc-per-node", "1", *words)
    done = cpu.run("bash", "-c", 'cd /tmp && exec "$@" 2>&1', "bash", *torchrun)
    assert "run ended: finished, iteration 2 of 2" in done.stdout


# Training


def test_doctor_runs_by_its_name_and_finds_no_problem(cpu: Container) -> None:
    assert "Nothing here would stop a run." in cpu.run("doctor").stdout


def test_unknown_user_trains_in_a_read_only_image_with_a_mount(one_process: Path) -> None:
    assert (one_process / "metrics.jsonl").stat().st_uid == 4321
    assert (one_process / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    assert len(losses(one_process)) == 3


def test_two_ranks_have_the_same_losses_as_one(
    cpu: Container, runs: Path, one_process: Path
) -> None:
    train(cpu, runs, *TWO_RANKS, *TINY, "--train-iters", "3", "--save", "runs/two")
    assert losses(runs / "two") == pytest.approx(losses(one_process), rel=1e-5)


def test_stopping_the_container_saves_first(cpu: Container, runs: Path) -> None:
    """Sends SIGTERM to the first process, like an engine's stop; the entry point has exec'ed it."""
    script = """
        "$0" pretrain "$@" & first=$!
        until grep -qs '"iteration": 2,' runs/stopped/metrics.jsonl; do
            kill -0 $first || exit 99
            sleep 0.2
        done
        kill -TERM $first
        wait $first
    """
    steps = ("--train-iters", "100000", "--save", "runs/stopped")
    train(cpu, runs, "bash", "-c", script, ENTRY, *TINY, *steps)
    saved = int((runs / "stopped/latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < 100000


# A base with its own torch


def test_torch_of_the_base_is_kept(gpu: Container) -> None:
    script = "import numpy, torch; print(torch.__version__, torch.__file__, numpy.__file__)"
    torch_file = f"{SYSTEM_PACKAGES}/torch/__init__.py"
    numpy_file = f"{SYSTEM_PACKAGES}/numpy/__init__.py"
    printed = gpu.run("python", "-c", script).stdout.split()
    assert printed == [NVIDIA_TORCH, torch_file, numpy_file]
    packages = names(gpu.path(VENV_PACKAGES))
    assert "megatron" in packages
    assert not {"torch", "numpy"} & packages


def test_bash_env_of_the_base_reaches_a_tool(gpu: Container) -> None:
    script = "import os; print(os.environ['PREPARED'])"
    assert gpu.run("python", "-c", script).stdout.strip() == "for-the-driver"


def test_ranks_see_the_bases_torch_and_the_images_packages(
    gpu: Container, runs: Path, one_process: Path
) -> None:
    train(gpu, runs, *TWO_RANKS, *TINY, "--train-iters", "3", "--save", "runs/gpu_base")
    assert losses(runs / "gpu_base") == pytest.approx(losses(one_process), rel=1e-5)
