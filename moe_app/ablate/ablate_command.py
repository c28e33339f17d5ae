"""Train variants of a recipe under several seeds; compare them with published findings.

    python tools/ablate.py examples/ablations/studies.yaml --output runs/ablations --jobs 2

The same command goes on with a sweep that was stopped. docs/ablations.md describes the file of
studies and the report. Exit status: 0; 1 when a run failed; 2 for an error before the first run;
130 when it was stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.trainer.errors import ConfigError, printable
from megatron.trainer.runtime import signals
from moe_app.ablate.derived_recipes import derive_recipes
from moe_app.ablate.studies_file import Sweep, choose_studies, read_studies
from moe_app.ablate.sweep_export import export_sweep
from moe_app.ablate.sweep_jobs import SweepJob, check_recipe, list_jobs
from moe_app.ablate.sweep_report import write_report
from moe_app.ablate.sweep_runner import SweepRunner, SweepStopped
from moe_app.command_line import program, report_errors
from moe_app.infer.open_model import positive

STOPPED = 130
"""Exit status of a sweep that was stopped, that of a shell after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep that `argv` asks for; return the exit status."""
    args = make_parser().parse_args(argv, argparse.Namespace(argv=argv))
    status = [0]

    def act() -> None:
        status[0] = run(args)

    return report_errors(act) or status[0]


def make_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = argparse.ArgumentParser(
        prog=program("ablate"),
        description="Train variants of a recipe under several seeds; compare them with published"
        " findings.",
    )
    parser.add_argument("studies", metavar="STUDIES", help="YAML file of runs and studies")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets runs/RUN/seed_S and report/"
    )
    parser.add_argument("--seeds", metavar="S,S", help="in place of the file's seeds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STUDY", help="only these, and what they need"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs side by side (%(default)s)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--list", action="store_true", help="list the runs with their numbers, and train none"
    )
    mode.add_argument(
        "--index", type=int, metavar="I", help="train run I of the list alone, as in a job array"
    )
    mode.add_argument(
        "--report-only", action="store_true", help="train none, write the report of what is there"
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="copy tables, figures, recipes and a manifest to this directory, to be committed",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; return the exit status.

    Raises:
        UserError: the file of studies, a recipe or a directory is wrong.
    """
    sweep = read_studies(args.studies)
    if args.seeds is not None:
        sweep = replace(sweep, seeds=_seeds(args.seeds))
    sweep = choose_studies(sweep, args.only)
    jobs = list_jobs(sweep, derive_recipes(sweep), Path(args.output))
    if args.list:
        for number, job in enumerate(jobs):
            sources = [i for i, each in enumerate(jobs) if each.directory == job.source]
            after = f" after {sources[0]}" if sources else ""
            print(printable(f"{number} {job.run.name} seed {job.seed} {job.state}{after}"))
        return 0
    status = 0
    if not args.report_only:
        chosen = jobs if args.index is None else [_one(jobs, args.index)]
        for job in chosen:
            check_recipe(job)
        status = _train(sweep, chosen, args.jobs)
    if args.index is None:
        _report(sweep, jobs, args)
    return status


def _report(sweep: Sweep, jobs: Sequence[SweepJob], args: argparse.Namespace) -> None:
    """Write the report of what is finished, if anything is, and export it if that is wanted."""
    output = Path(args.output)
    if not args.report_only and not any(job.state == "finished" for job in jobs):
        return
    _say(f"report: {write_report(sweep, jobs, output)}")
    if args.export is not None:
        argv = sys.argv[1:] if args.argv is None else args.argv
        _say(f"export: {export_sweep(sweep, jobs, output, Path(args.export), argv=argv)}")


def _train(sweep: Sweep, jobs: Sequence[SweepJob], side_by_side: int) -> int:
    signals.listen()
    try:
        return SweepRunner(sweep, jobs, side_by_side=side_by_side, say=_say).run().status
    except SweepStopped:
        return STOPPED
    finally:
        signals.stop_listening()


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _one(jobs: Sequence[SweepJob], index: int) -> SweepJob:
    """Return a job by its number.

    Raises:
        ConfigError: there is none, or what it begins from is not done.
    """
    if not 0 <= index < len(jobs):
        raise ConfigError(f"--index {index} must be from 0 to {len(jobs) - 1}; see --list")
    job = jobs[index]
    sources = [(number, each) for number, each in enumerate(jobs) if each.directory == job.source]
    for number, source in sources:
        if source.state != "finished":
            raise ConfigError(
                f"--index {index} is {job}, which begins from {source} (--index {number}), and that"
                " is not finished; train it before, or let the array depend on its job"
            )
    return job


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    seeds = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    if len(set(seeds)) < len(parts):
        raise ConfigError(f"--seeds {text} must be different whole numbers: 1,2,3")
    return seeds
