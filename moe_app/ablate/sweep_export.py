"""Copies what a sweep found to a directory to be committed: tables, figures, recipes, manifest."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.io.bounded_read import read_small
from moe_app.ablate.derived_recipes import recipe_text
from moe_app.ablate.studies_file import Sweep
from moe_app.ablate.sweep_jobs import SweepJob
from moe_app.ablate.sweep_report import PAGE_NAME, report_directory
from moe_app.doctor.facts import machine_section

MANIFEST_NAME = "manifest.json"
PACKAGES = ("megatron-moe", "torch", "megatron-core", "numpy")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_MOST_BYTES = 1 << 20


def export_sweep(
    sweep: Sweep, jobs: Sequence[SweepJob], output: Path, target: Path, *, argv: Sequence[str]
) -> Path:
    """Copy a report, which is there, with what it was made from; return the manifest's path.

    The page is left out: `--report-only` makes it, and every table, of what is copied.

    Args:
        sweep: the file of studies.
        jobs: its runs.
        output: of the sweep.
        target: gets report/, recipes/, the file of studies and the manifest.
        argv: the command line.

    Raises:
        ConfigError: the target cannot be written.
    """
    report = report_directory(target)
    try:
        if report.resolve() != report_directory(output).resolve():
            if report.exists():
                _check_is_export(target)
                shutil.rmtree(report)
            shutil.copytree(
                report_directory(output), report, ignore=shutil.ignore_patterns(PAGE_NAME)
            )
        recipes = target / "recipes"
        recipes.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            if job.seed == jobs[0].seed:
                path = recipes / f"{job.run.name}.yaml"
                write_text(path, recipe_text(sweep, job.run, job.cfg))
        studies = target / "studies.yaml"
        if not studies.exists() or not studies.samefile(sweep.path):
            shutil.copyfile(sweep.path, studies)
        manifest = target / MANIFEST_NAME
        write_text(manifest, json.dumps(describe(sweep, jobs, argv), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--export {target} cannot be written: {error.strerror or error}; give a directory"
            " that can be made and written to"
        ) from error
    return manifest


def _check_is_export(target: Path) -> None:
    """Refuse a directory whose report an export did not write."""
    if not (target / MANIFEST_NAME).exists():
        raise ConfigError(
            f"--export {target} has a report/ and no {MANIFEST_NAME}, so it is no export and would"
            " lose what is there; give another directory"
        )


def describe(sweep: Sweep, jobs: Sequence[SweepJob], argv: Sequence[str]) -> dict[str, object]:
    """Return what has to be known of a sweep to repeat it."""
    machine = {
        row.name: f"{row.value}; {row.detail}" if row.detail else row.value
        for row in machine_section().rows
        if row.name != "host"
    }
    return {
        "command": shlex.join(["python", "tools/ablate.py", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "machine": machine,
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "ranks": sweep.nproc_per_node,
        "seeds": list(sweep.seeds),
        "finished": [str(job) for job in jobs if job.state == "finished"],
    }


def commit_of(repository: Path) -> str | None:
    """Return the commit that is checked out; None outside a clone."""
    try:
        git = repository / ".git"
        if git.is_file():  # of a worktree
            git = repository / _text(git).partition("gitdir: ")[2]
        head = _text(git / "HEAD")
        name = head.partition("ref: ")[2]
        if not name:
            return head if _COMMIT.fullmatch(head) else None
        common = git / "commondir"
        roots = [git, git / _text(common)] if common.exists() else [git]
        for root in roots:
            if (root / name).exists():
                return _text(root / name)
        for line in _text(roots[-1] / "packed-refs").splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return commit
    except OSError:
        pass
    return None


def _text(path: Path) -> str:
    return read_small(path, most_bytes=_MOST_BYTES).decode(errors="replace").strip()
