"""Submits a recipe to SLURM: checks it, writes its batch script, follows the job.

    python tools/submit.py RECIPE --nodes 32 --gpus-per-node 8 --time 24:00:00 --follow [FLAGS]

All other flags are those of the tool that trains: tools/pretrain.py, finetune.py or align.py, by
the settings in the recipe, or --stage. --save DIR, or the recipe's, is the run directory. The
resolved recipe and the batch script, which runs examples/slurm/pretrain.sbatch, go to DIR/slurm/,
logs to DIR/logs/. Exit status: 0; with --follow the job's; 2 for an error before that.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.trainer.config.cli import dump_config
from megatron.trainer.config.parallel_layout import num_microbatches, resolve_layout
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.history import PlannedEnd, planned_end
from megatron.trainer.records.losses import loss_name
from megatron.trainer.records.record_file import Record
from megatron.trainer.records.run_dir import EVENTS_NAME, METRICS_NAME, RecordTail, read_ended
from megatron.trainer.runtime.launch import run_main
from moe_app.command_line import program, seconds_up_to
from moe_app.pretrain.config import PretrainConfig
from moe_app.slurm.jobs import JobRequest, poll_job, query_job, submit
from moe_app.submission.job_stages import (
    STAGES,
    JobStage,
    has_known_length,
    length_lines,
    parse_stage,
    stage_of,
)

REPOSITORY = Path(__file__).resolve().parents[2]
"""Checkout that contains this file, unless it is installed as a package."""
FOLDER, RECIPE, SCRIPT, JOB = "slurm", "recipe.yaml", "job.sbatch", "job_id"
"""Folder in the run directory, and its files."""
LAST_LINES = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Submit the job that `argv` describes; return the exit status."""
    return run_main(lambda: run(*parse_args(argv)))


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; also return the unknown flags, which override the recipe."""
    parser = argparse.ArgumentParser(
        prog=program("submit"),
        description="Submit a recipe to SLURM.",
        epilog="All other flags are those of the tool that trains, and override the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML recipe")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="the tool that trains; by default the one whose settings the recipe has",
    )
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=_positive, metavar="N", help="GPUs per node, one rank each"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=_positive,
        metavar="N",
        help="ranks per node, for nodes without GPUs",
    )
    job = parser.add_argument_group("job")
    job.add_argument("--job-name", metavar="NAME", help="defaults to the name of the run directory")
    for name in ("time", "partition", "account"):
        job.add_argument(f"--{name}", metavar=name.upper(), help="same as for sbatch")
    job.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further sbatch option, can be repeated: --sbatch=--exclusive",
    )
    job.add_argument("--container-image", metavar="IMAGE", help="image to run in, through pyxis")
    job.add_argument(
        "--container-mounts", metavar="A:B,...", help="in addition to repository and run"
    )
    job.add_argument(
        "--repository",
        type=Path,
        default=REPOSITORY,
        metavar="DIR",
        help="checkout with the batch scripts, visible on every node (%(default)s)",
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
        help="interval of --follow (%(default)s)",
    )
    return parser.parse_known_args(argv)


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Check, write, submit and follow; return the exit status.

    Raises:
        UserError: recipe, layout or directory are invalid, or SLURM rejects the job.
    """
    stage = args.stage or stage_of(args.recipe, flags)
    cfg = parse_stage(stage, args.recipe, flags, prog=program("submit"))
    request = make_request(args, cfg, stage)
    script, resolved = request.script(), dump_config(cfg)
    print("\n".join(describe(request, cfg)))
    if args.dry_run:
        print(f"\nwould write {request.recipe} and submit {request.recipe.parent / SCRIPT}:\n")
        print(script, end="")
        return 0
    job_id = _submit(request, script, resolved)
    if not args.follow:
        return 0
    try:
        return follow(job_id, request, cfg, poll_s=args.poll)
    except KeyboardInterrupt:
        print(f"\njob {job_id} continues; scancel {job_id} ends it")
        return 130


def make_request(args: argparse.Namespace, cfg: PretrainConfig, stage: JobStage) -> JobRequest:
    """Validate the run and build the request for its job.

    Raises:
        ConfigError: the run cannot work.
    """
    if args.gpus_per_node and args.ranks_per_node:
        raise ConfigError(
            f"--gpus-per-node {args.gpus_per_node} and --ranks-per-node {args.ranks_per_node} both"
            " set the number of ranks per node; give one of them"
        )
    if cfg.checkpoint.save is None:
        raise ConfigError("there is no run directory; give --save DIR, or `save` in the recipe")
    ranks_per_node = args.gpus_per_node or args.ranks_per_node or 1
    validate(cfg, args.nodes * ranks_per_node)
    save = Path(cfg.checkpoint.save).resolve()
    options = [f"--{name}={getattr(args, name)}" for name in _SBATCH if getattr(args, name)]
    variables: dict[str, str] = {} if stage == "pretrain" else {"STAGE": stage}
    if not args.container_image:
        variables["PYTHON"] = sys.executable
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
    """Return the absolute path of the checkout after checking that it has the batch scripts."""
    script = directory / "examples" / "slurm" / "pretrain.sbatch"
    if not script.is_file():
        raise ConfigError(
            f"{script} does not exist: jobs run the batch scripts of a checkout; give --repository"
            " DIR, a checkout that is visible on every node"
        )
    return directory.resolve()


def describe(request: JobRequest, cfg: PretrainConfig) -> list[str]:
    """Summarize in a few lines what will run."""
    world = request.nodes * request.ranks_per_node
    layout = resolve_layout(cfg.parallel, world)
    training = cfg.training
    return [
        f"run: {request.run}",
        f"tool: tools/{request.variables.get('STAGE', 'pretrain')}.py",
        f"layout: {request.nodes} nodes x {request.ranks_per_node} ranks = {world}; TP"
        f" {layout.tensor}, PP {layout.pipeline} x {layout.virtual_stages}, CP {layout.context}, EP"
        f" {layout.expert}, ETP {layout.expert_tensor}, DP {layout.data}",
        f"step: {num_microbatches(training, layout)} micro-batches of {training.micro_batch_size}"
        " sequences a data parallel rank",
        *length_lines(cfg),
        *_core_notes(request),
    ]


def _core_notes(request: JobRequest) -> list[str]:
    """Warn if all ranks of a node would share one core, SLURM's default for a task."""
    core_options = ("--exclusive", "--cpus-per-", "-c")
    if any(option.startswith(core_options) for option in request.options):
        return []
    return [
        "cores: none are requested, and SLURM's default is one for all ranks of a node; give"
        " --sbatch=--exclusive or --sbatch=--cpus-per-task=N, unless this cluster allocates whole"
        " nodes"
    ]


def _submit(request: JobRequest, script: str, resolved: str) -> str:
    """Write the files and submit the job; return its id."""
    folder = request.recipe.parent
    _check_no_active_job(folder / JOB, request.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without it sbatch cannot open the log, and the job fails without a message.
        (request.run / "logs").mkdir(exist_ok=True)
        for name, text in ((RECIPE, resolved), (SCRIPT, script)):
            write_text(folder / name, text)
        job_id = submit(folder / SCRIPT)
        write_text(folder / JOB, f"{job_id}\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; give --save a writable directory with"
            " enough free space"
        ) from error
    print(f"submitted job {job_id}: {folder / SCRIPT}")
    return job_id


def _check_no_active_job(record: Path, directory: Path) -> None:
    """Check that no other job uses the run directory.

    Raises:
        ConfigError: a job that this tool submitted has not ended.
    """
    if not record.exists():
        return
    job_id = record.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9]+", job_id):
        raise ConfigError(
            f"{record} holds {job_id[:40]!r} and must hold the id of the last submitted job; if no"
            " job is active, remove it"
        )
    job = query_job(job_id)
    if job is not None and not job.has_ended:
        raise ConfigError(
            f"job {job_id} ({job}) uses {directory}; wait for it, cancel it (`scancel {job_id}`),"
            " or give another --save"
        )


def follow(job_id: str, request: JobRequest, cfg: PretrainConfig, *, poll_s: float) -> int:
    """Print state and progress of a job as they change; return its exit status.

    Raises:
        SlurmError: SLURM has purged the job, or does not respond.
    """
    tail, events = (RecordTail(request.run / name) for name in (METRICS_NAME, EVENTS_NAME))
    shown, end = "", None
    for job in poll_job(job_id, poll_s=poll_s):
        if str(job) != shown:
            shown = str(job)
            print(f"job {job_id}: {shown}", flush=True)
        end = planned_end(events.read_new()[1]) or end
        steps = [record for record in tail.read_new()[1] if loss_name(record) is not None]
        if steps:
            print(f"  {progress(steps[-1], cfg, end)}", flush=True)
    log = request.run / "logs" / f"{request.name}-{job_id}.out"
    ended = read_ended(request.run)
    if ended is not None:
        print(f"the trainer ended: {ended}")
    if job.exit_status != 0 and log.exists():
        print(f"last lines of {log}:")
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]:
            print(f"  {line}")
    print(f"job {job_id} ended: {job.state}, exit status {job.exit_status}")
    return job.exit_status


def progress(record: Record, cfg: PretrainConfig, end: PlannedEnd | None = None) -> str:
    """Format the record of a step as one line; `end` is what the run itself says of its length."""
    is_known = end is not None or has_known_length(cfg)
    step, last = record["iteration"], cfg.training.train_iters
    tokens = (last - step) * cfg.training.global_batch_size * cfg.training.seq_length
    if end is not None and "consumed_tokens" in record:
        last, tokens = end.train_iters, end.train_tokens - record["consumed_tokens"]
    line = f"step {step:,} of {last:,} ({step / last:.0%})" if is_known else f"step {step:,}"
    name = loss_name(record) or "lm_loss"
    if record[name] is not None:
        line += f", {name} {record[name]:.4f}"
    speed = record.get("tokens_per_second")
    if speed:
        line += f", {speed:,.0f} tokens/s"
        line += f", {_clock(tokens / speed)} left" if is_known else ""
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)
