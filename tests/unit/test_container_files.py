"""Tests the files of the image without a build: their consistency, and the entry point."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

from megatron.trainer.config.validate import validate
from moe_app.pretrain.config import parse_recipe
from moe_ext.compat import LINES
from tests.container.pip_settings import local_paths, read_settings, render
from tests.paths import REPO

tomllib = pytest.importorskip("tomllib", reason="the image's Python is 3.11 or newer")

DOCKERFILE = (REPO / "Dockerfile").read_text("utf-8")
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
GUIDE = (REPO / "examples/docker/README.md").read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """Parse the Dockerfile to name and arguments of each instruction; join continued lines."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def arguments() -> dict[str, str]:
    """Return the default of each ARG."""
    pairs = (rest.partition("=") for name, rest in instructions() if name == "ARG")
    return {name: value for name, _, value in pairs}


# The Dockerfile


def test_versions_are_the_tested_ones() -> None:
    tested = re.search(r"^TORCH \?= (\S+)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert tested
    assert arguments()["TORCH"] == tested[1]
    assert arguments()["MEGATRON_CORE"] == ""
    for written, line in zip(lines(requirements("core")), LINES, strict=True):
        wanted = Requirement(written)
        assert str(wanted.specifier) == f"=={line.tested}"
        assert f"python_version {line.python}" == str(wanted.marker).replace('"', "")
    assert arguments()["VERSION"] == PYPROJECT["project"]["version"]


def test_build_context_has_only_what_the_dockerfile_copies() -> None:
    copied = {
        source.partition("/")[0]
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    ignored = (REPO / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((REPO / source).exists() for source in copied)


def test_image_ends_as_a_user_after_the_checks() -> None:
    """Checks the last stage: a numeric user, then the checks as that user, then the entry point."""
    last = [name for name, _ in instructions()][::-1].index("FROM")
    stage = instructions()[-last:]
    names = [name for name, _ in stage]
    assert dict(stage)["USER"] == "${USER_ID}:${GROUP_ID}"
    assert arguments()["USER_ID"].isdigit() and int(arguments()["USER_ID"]) > 0
    checks = [at for at, (name, rest) in enumerate(stage) if "tools/doctor.py" in rest]
    assert len(checks) == 1
    assert names.index("USER") < checks[0] < names.index("ENTRYPOINT")
    assert names.count("USER") == 1
    # pip runs only in the first stage, so no layer of the image has its settings and caches.
    assert not [rest for _, rest in stage if re.search(r"\bpip\b", rest)]


def test_entry_point_is_where_the_dockerfile_says() -> None:
    entry = dict(instructions())["ENTRYPOINT"]
    assert entry == '["/opt/megatron-moe/docker/entrypoint.sh"]'
    assert os.access(REPO / "docker/entrypoint.sh", os.X_OK)


def hadolint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed: pip install -e '.[dev]'")
    return subprocess.run([program, dockerfile], capture_output=True, text=True)


def test_hadolint_passes_and_finds_a_planted_mistake(tmp_path: Path) -> None:
    assert hadolint(REPO / "Dockerfile").stdout == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(f"{DOCKERFILE}USER root\nRUN cd /tmp && pip install torch\n")
    found = hadolint(worse)
    assert found.returncode == 1
    assert {"DL3002", "DL3003", "DL3013"} <= set(re.findall(r"DL\d+", found.stdout))


# Requirements


def interpreter(packages: Path) -> Path:
    """Make an environment that has the packages in a directory, and no others."""
    root = packages.parent / f"{packages.name}-environment"
    venv.create(root, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return root / "bin" / "python"


def requirements(
    *words: str, cwd: Path = REPO, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script, with only the packages of `path` if given."""
    python = Path(sys.executable) if path is None else interpreter(path)
    return subprocess.run(
        [python, REPO / "docker/requirements.py", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def lines(finished: subprocess.CompletedProcess[str]) -> list[str]:
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_wanted_is_everything_but_torch() -> None:
    project = PYPROJECT["project"]
    everything = [
        *(*PYPROJECT["build-system"]["requires"], *project["dependencies"]),
        *(*project["optional-dependencies"]["hf"], *project["optional-dependencies"]["wandb"]),
    ]
    assert any(line.startswith("torch>") for line in everything)
    found = lines(requirements("wanted", "hf,wandb"))
    assert found == [line for line in everything if not line.startswith("torch>")]
    assert set(lines(requirements("wanted", ""))) < set(found)


def test_default_extras_are_extras() -> None:
    assert lines(requirements("wanted", arguments()["EXTRAS"]))


@pytest.mark.parametrize(
    ("extras", "message"),
    [("hf,wandd", "no extra 'wandd'.* te, triton, cute, wandb"), ("test", "name those in EXTRAS")],
)
def test_unknown_or_composed_extra_is_refused(extras: str, message: str) -> None:
    refused = requirements("wanted", extras)
    assert refused.returncode == 2
    assert re.search(message, refused.stderr)


def test_pins_are_the_versions_in_use() -> None:
    found = lines(requirements("pins"))
    assert f"torch=={version('torch')}" in found
    assert f"numpy=={version('numpy')}" in found


def installed(folder: Path, **versions: str) -> Path:
    """Make a directory with packages of these versions and the real `packaging`."""
    for name, number in versions.items():
        described = folder / f"{name}-{number}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    (folder / "packaging").symlink_to(packaging.__path__[0])
    return folder


@pytest.mark.parametrize(
    ("torch", "status", "message"),
    [
        ("2.13.0a0+1.nv26.07", 0, ""),
        ("2.13.0", 1, r"pip replaced torch==2.13.0a0\+1.nv26.07.* now installed: torch==2.13.0,"),
    ],
)
def test_replaced_torch_fails_the_build(
    torch: str, status: int, message: str, tmp_path: Path
) -> None:
    before = installed(tmp_path / "before", torch="2.13.0a0+1.nv26.07", numpy="2.4.6")
    pins = tmp_path / "pins.txt"
    pins.write_text(requirements("pins", path=before).stdout)
    assert pins.read_text().split() == ["torch==2.13.0a0+1.nv26.07", "numpy==2.4.6"]
    after = installed(tmp_path / "after", torch=torch, numpy="2.4.6", triton="3.9.0")
    checked = requirements("check", str(pins), path=after)
    assert checked.returncode == status, checked.stderr
    assert re.search(message, checked.stderr)


def test_base_with_an_old_torch_fails_the_build(tmp_path: Path) -> None:
    old = installed(tmp_path / "old", torch="2.9.0a0+1.nv25.09")
    pins = tmp_path / "pins.txt"
    pins.write_text("torch==2.9.0a0+1.nv25.09\n")
    checked = requirements("check", str(pins), path=old)
    assert checked.returncode == 1
    assert "torch 2.9.0a0+1.nv25.09, the project needs torch>=2.10" in checked.stderr


# The entry point


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make the directory of an image with a tool that prints its arguments."""
    (tmp_path / "docker").mkdir()
    shutil.copy(REPO / "docker/entrypoint.sh", tmp_path / "docker")
    (tmp_path / "tools").mkdir()
    program = "import os, sys\nprint(sys.argv, os.getcwd(), os.getpid())\n"
    main = f"def main():\n    sys.exit(5)\n\n\n{program}main()\n"
    (tmp_path / "tools/pretrain.py").write_text(main)
    return tmp_path


def with_python() -> dict[str, str]:
    """Return this process's environment with this Python as `python`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def start(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(image / "docker/entrypoint.sh"), *words]
    return subprocess.run(command, cwd="/", env=with_python(), capture_output=True, text=True)


def test_tool_gets_its_arguments_directory_and_the_first_process(image: Path) -> None:
    command = [str(image / "docker/entrypoint.sh"), "pretrain", "--a", "b c", ""]
    with subprocess.Popen(
        command, cwd="/", env=with_python(), stdout=subprocess.PIPE, text=True
    ) as process:
        output, _ = process.communicate()
    words = [str(image / "tools/pretrain.py"), "--a", "b c", ""]
    assert output == f"{words} / {process.pid}\n"
    assert process.returncode == 5


def test_command_is_run_unchanged(image: Path) -> None:
    found = start(image, "bash", "-c", 'echo "$1"; exit 7', "bash", "a  b")
    assert (found.returncode, found.stdout) == (7, "a  b\n")


def test_entry_point_leaves_the_environment_alone(image: Path) -> None:
    program = "import os; print(sorted(os.environ))"
    shells_own = {"_", "SHLVL", "PWD", "OLDPWD"}
    found = set(ast.literal_eval(start(image, "python", "-c", program).stdout))
    assert found - shells_own == set(os.environ) - shells_own


@pytest.mark.parametrize("words", [(), ("help",)])
def test_help_lists_tools(image: Path, words: tuple[str, ...]) -> None:
    found = start(image, *words)
    assert found.returncode == 0
    assert "\n  pretrain\n" in found.stdout


@pytest.mark.parametrize(
    ("word", "status", "message"),
    [
        ("pretrian", 127, "error: pretrian is neither a tool nor a program of this image"),
        ("recipe", 127, "error: recipe is neither"),
        ("../tools/pretrain", 127, "error: ../tools/pretrain is neither"),
        ("--config", 2, "error: expected a tool or a command, not the flag --config"),
    ],
)
def test_unknown_command_is_named(image: Path, word: str, status: int, message: str) -> None:
    found = start(image, word)
    assert found.returncode == status
    assert found.stdout == ""
    assert found.stderr.startswith(message)
    assert "\n  pretrain\n" in found.stderr


# This machine's pip settings, which the build test mounts


def test_environment_wins_over_files_and_sections_stay(tmp_path: Path) -> None:
    listing = (
        ":env:.find-links='/b'\n"
        ":env:.config-file='/x'\n"
        "global.find-links='/a'\n"
        "global.extra-index-url='one\\ntwo'\n"
        "install.no-binary='x'\n"
        "list.format='json'\n"
    )
    settings = read_settings(listing)
    assert render(settings) == (
        "[global]\nextra-index-url = one\n    two\nfind-links = /b\n[install]\nno-binary = x\n"
    )


def test_local_paths_are_found_with_what_an_index_points_to(tmp_path: Path) -> None:
    for name in ("index/simple", "wheels"):
        (tmp_path / name).mkdir(parents=True)
    settings = {
        "global.extra-index-url": f"https://a.b/simple\nfile://{tmp_path}/index/simple",
        "global.find-links": f"{tmp_path}/wheels {tmp_path}/gone",
        "global.timeout": "180",
    }
    assert local_paths(settings) == [f"{tmp_path}/index", f"{tmp_path}/wheels"]


# The guide


def guide_commands() -> list[list[str]]:
    """List the words of each command in the guide's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_guide_shows_each_engine() -> None:
    starts = {" ".join(words[:2]) for words in guide_commands()}
    engines = {"docker run", "podman run", "enroot start", "apptainer run"}
    assert engines | {"docker build", "enroot import", "apptainer build"} <= starts
    assert any(words[0] == "srun" for words in guide_commands())


def test_guide_names_what_is_in_the_image() -> None:
    inside = [
        word.removeprefix("/opt/megatron-moe/")
        for words in guide_commands()
        for word in words
        if re.match(r"(/opt/megatron-moe/)?(tools|examples)/", word)
    ]
    assert "tools/pretrain.py" in inside
    assert [name for name in inside if not (REPO / name).exists()] == []


def test_guides_trainings_are_valid_for_their_ranks() -> None:
    """Validates each `torchrun --nproc-per-node N ... pretrain.py` of the guide on N ranks."""
    trainings = [words for words in guide_commands() if "torchrun" in words]
    assert len(trainings) == 5
    for words in trainings:
        ranks = int(words[words.index("--nproc-per-node") + 1])
        (script,) = (at for at, word in enumerate(words) if word.endswith("tools/pretrain.py"))
        cfg = parse_recipe(words[script + 1 :], prog="test", description="")
        validate(cfg, ranks)
