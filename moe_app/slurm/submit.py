"""Submit a recipe to SLURM: check it, write its run directory and batch script, follow the job.

    python tools/submit.py RECIPE --nodes 32 --gpus-per-node 8 --time 24:00:00 --follow [FLAGS]

Flags that are not listed here are tools/pretrain.py's; --save DIR, or the recipe's, is the run
directory. DIR/slurm/ gets the resolved recipe and the batch script, which runs
examples/slurm/pretrain.sbatch; DIR/logs/ gets the logs. Exit status: 0; with --follow that of the
job; 2 when something is wrong before that.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.parallel_layout import num_microbatches, resolve_layout
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.hooks.base import Record
from megatron.trainer.records.run_dir import METRICS_NAME, RecordTail, read_ended
from megatron.trainer.runtime.launch import run_main
from moe_app.command_line import program, seconds_up_to
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.slurm.jobs import JobRequest, look_up, submit, watch

REPOSITORY = Path(__file__).resolve().parents[2]
"""The checkout this file lies in, if it is not installed as a package."""
FOLDER, RECIPE, SCRIPT, JOB = "slurm", "recipe.yaml", "job.sbatch", "job_id"
"""What is written under the run directory."""
LAST_LINES = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Submit as `argv` says; returns the exit status."""
    return run_main(lambda: run(*parse_args(argv)))


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is no flag of ours is left for the recipe."""
    parser = argparse.ArgumentParser(
        prog=program("submit"),
        description="Submit a recipe to SLURM.",
        epilog="All other flags are those of tools/pretrain.py, and win over the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML recipe")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, metavar="N", help="GPUs, each with a rank of its own"
    )
    parser.add_argument(
        "--ranks-per-node", type=_positive, metavar="N", help="ranks on nodes without GPUs"
    )
    job = parser.add_argument_group("job")
    job.add_argument("--job-name", metavar="NAME", help="without it the run directory's name")
    for name in ("time", "partition", "account"):
        job.add_argument(f"--{name}", metavar=name.upper(), help="as sbatch has it")
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, as often as needed: --sbatch=--exclusive",
    )
    job.add_argument("--container-image", metavar="IMAGE", help="run in it, through pyxis")
    job.add_argument("--container-mounts", metavar="A:B,...", help="beside repository and run")
    job.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="checkout whose batch scripts run; every node must see it (%(default)s)",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--dry-run", action="store_true", help="show what would be submitted; write nothing"
    )
    what.add_argument(
        "--follow", action="store_true", help="show state and progress until the job has ended"
    )
    what.add_argument(
        "--poll",
        type=seconds_up_to(3600),
        default=5.0,
        metavar="SECONDS",
        help="how often --follow looks (%(default)s)",
    )
    return parser.parse_known_args(argv)


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Check, write, submit, follow; returns the exit status.

    Raises:
        UserError: the recipe, the layout, the directory or SLURM says no.
    """
    cfg = parse_recipe(["--config", args.recipe, *flags], prog=program("submit"), description="")
    request = make_request(args, cfg)
    script, resolved = request.script(), dump_config(cfg)
    print("\n".join(describe(request, cfg)))
    if args.dry_run:
        print(f"\nwould write {request.recipe} and submit {request.recipe.parent / SCRIPT}:\n")
        print(script, end="")
        return 0
    number = _submit(request, script, resolved)
    if not args.follow:
        return 0
    try:
        return follow(number, request, cfg, poll_s=args.poll)
    except KeyboardInterrupt:
        print(f"\njob {number} goes on; scancel {number} ends it")
        return 130


def make_request(args: argparse.Namespace, cfg: PretrainConfig) -> JobRequest:
    """What to ask of SLURM, once it is known that the run can work.

    Raises:
        ConfigError: it cannot.
    """
    if args.gpus_per_node and args.ranks_per_node:
        raise ConfigError(
            f"--gpus-per-node {args.gpus_per_node} and --ranks-per-node {args.ranks_per_node} both"
            " say how many ranks a node has; give one of them"
        )
    if cfg.checkpoint.save is None:
        raise ConfigError("there is no run directory; give --save DIR, or `save` in the recipe")
    ranks_per_node = args.gpus_per_node or args.ranks_per_node or 1
    validate(cfg, args.nodes * ranks_per_node)
    save = Path(cfg.checkpoint.save).resolve()
    options = [f"--{name}={getattr(args, name)}" for name in _SBATCH if getattr(args, name)]
    variables = {} if args.container_image else {"PYTHON": sys.executable}
    for flag in ("container_image", "container_mounts"):
        if getattr(args, flag):
            variables[flag.upper()] = getattr(args, flag)
    if args.container_mounts and not args.container_image:
        raise ConfigError("--container-mounts needs --container-image; give both, or neither")
    if args.gpus_per_node:
        options.append(f"--gpus-per-node={args.gpus_per_node}")
    return JobRequest(
        name=args.job_name or re.sub(r"[^\w.-]", "_", save.name),
        run=save,
        recipe=save / FOLDER / RECIPE,
        repository=_checked_repository(args.repository),
        nodes=args.nodes,
        ranks_per_node=ranks_per_node,
        options=(*options, *args.sbatch),
        variables=variables,
        comment=f"{args.recipe} on {args.nodes} x {ranks_per_node} ranks; written by submit.py",
    )


_SBATCH = ("time", "partition", "account")


def _checked_repository(directory: Path) -> Path:
    """Return the absolute path of a checkout, whose batch scripts the job runs."""
    script = directory / "examples" / "slurm" / "pretrain.sbatch"
    if not script.is_file():
        raise ConfigError(
            f"{script} is not there: jobs run the batch scripts of a checkout; give --repository"
            " DIR, a checkout that every node sees"
        )
    return directory.resolve()


def describe(request: JobRequest, cfg: PretrainConfig) -> list[str]:
    """What will run, in a few lines."""
    world = request.nodes * request.ranks_per_node
    layout = resolve_layout(cfg.parallel, world)
    training = cfg.training
    return [
        f"run: {request.run}",
        f"layout: {request.nodes} nodes x {request.ranks_per_node} ranks = {world}; TP"
        f" {layout.tensor}, PP {layout.pipeline} x {layout.virtual_stages}, CP {layout.context}, EP"
        f" {layout.expert}, ETP {layout.expert_tensor}, DP {layout.data}",
        f"step: {num_microbatches(training, layout)} micro-batches of {training.micro_batch_size}"
        " sequences a data parallel rank",
        f"length: {training.train_iters:,} steps of"
        f" {training.global_batch_size * training.seq_length:,} tokens",
        *_core_notes(request),
    ]


def _core_notes(request: JobRequest) -> list[str]:
    """A warning where SLURM's default, a core a task, would be for all ranks of a node."""
    asked = ("--exclusive", "--cpus-per-", "-c")
    if any(option.startswith(asked) for option in request.options):
        return []
    return [
        "cores: none are asked for, and SLURM's default is one for all ranks of a node; give"
        " --sbatch=--exclusive or --sbatch=--cpus-per-task=N, unless this cluster gives whole nodes"
    ]


def _submit(request: JobRequest, script: str, resolved: str) -> str:
    """Write the files, and hand them to SLURM; returns the job's id."""
    folder = request.recipe.parent
    _refuse_second_job(folder / JOB, request.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Or sbatch could not open the job's log, and the job would fail without a word.
        (request.run / "logs").mkdir(exist_ok=True)
        for name, text in ((RECIPE, resolved), (SCRIPT, script)):
            scratch = folder / f"{name}.tmp"
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, folder / name)
        number = submit(folder / SCRIPT)
        (folder / JOB).write_text(f"{number}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; give --save a directory on a disk with"
            " room that this user may write to"
        ) from error
    print(f"submitted job {number}: {folder / SCRIPT}")
    return number


def _refuse_second_job(record: Path, directory: Path) -> None:
    """Two jobs in one run directory would take turns in failing.

    Raises:
        ConfigError: a job that this tool submitted has not ended.
    """
    if not record.exists():
        return
    number = record.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]+", number):
        raise ConfigError(
            f"{record} holds {number[:40]!r} and must hold the number of the job that was submitted"
            " last; if none is under way, remove it"
        )
    job = look_up(number)
    if job is not None and not job.has_ended:
        raise ConfigError(
            f"job {number} ({job}) has {directory}; wait for it, end it with `scancel {number}`, or"
            " give another --save"
        )


def follow(number: str, request: JobRequest, cfg: PretrainConfig, *, poll_s: float) -> int:
    """Print a job's state and progress as they change; returns its exit status.

    Raises:
        SlurmError: SLURM has lost it.
    """
    tail = RecordTail(request.run / METRICS_NAME)
    shown = ""
    for job in watch(number, poll_s=poll_s):
        if str(job) != shown:
            shown = str(job)
            print(f"job {number}: {shown}", flush=True)
        steps = [record for record in tail.read_new()[1] if "lm_loss" in record]
        if steps:
            print(f"  {progress(steps[-1], cfg)}", flush=True)
    log = request.run / "logs" / f"{request.name}-{number}.out"
    ended = read_ended(request.run)
    if ended is not None:
        print(f"the trainer ended: {ended}")
    if job.exit_status != 0 and log.exists():
        print(f"the last lines of {log}:")
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]:
            print(f"  {line}")
    print(f"job {number} ended: {job.state}, exit status {job.exit_status}")
    return job.exit_status


def progress(record: Record, cfg: PretrainConfig) -> str:
    """A step's record in a line."""
    step, last = record["iteration"], cfg.training.train_iters
    line = f"step {step:,} of {last:,} ({step / last:.0%})"
    if record["lm_loss"] is not None:
        line += f", lm_loss {record['lm_loss']:.4f}"
    speed = record.get("tokens_per_second")
    if speed:
        tokens = (last - step) * cfg.training.global_batch_size * cfg.training.seq_length
        line += f", {speed:,.0f} tokens/s, {_clock(tokens / speed)} left"
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)
