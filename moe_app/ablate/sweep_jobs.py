"""Lists the runs of a sweep under each seed, says how far each is, and what starts it."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.trainer.checkpoint.origin import has_checkpoints
from megatron.trainer.config.cli import dump_config
from megatron.trainer.errors import ConfigError
from megatron.trainer.io.atomic_write import write_text
from megatron.trainer.records.run_dir import METRICS_NAME, last_record, read_ended
from moe_app.ablate.derived_recipes import differences, recipe_text, with_seed
from moe_app.ablate.studies_file import Run, Sweep
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_app.upcycle.upcycle_command import REPORT_NAME

RECIPE_NAME = "recipe.yaml"
"""What a run was started with, in its directory."""
LOG_NAME = "log.txt"
"""What it printed."""
_UPCYCLED = "upcycled"
_SHOWN = 4

JobState = Literal["finished", "interrupted", "new"]


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """Holds one run under one seed."""

    run: Run
    """The variant."""
    seed: int
    """Its seed."""
    cfg: PretrainConfig
    """Its settings, with the seed, without directories."""
    directory: Path
    """Of the run."""
    source: Path | None
    """Directory of the run that it begins from, under the same seed."""
    ranks: int
    """Processes."""

    def __str__(self) -> str:
        """Return run and seed."""
        return f"{self.run.name} seed {self.seed}"

    @property
    def state(self) -> JobState:
        """Return how far it is, as its own records say."""
        ended = read_ended(self.directory)
        if ended is not None and ended.reason == "finished":
            return "finished"
        return "interrupted" if has_checkpoints(self.directory) else "new"

    @property
    def iteration(self) -> int:
        """Return the steps that its records tell of."""
        record = last_record(self.directory / METRICS_NAME)
        return 0 if record is None else int(record["iteration"])


def list_jobs(sweep: Sweep, recipes: Mapping[str, PretrainConfig], output: Path) -> list[SweepJob]:
    """Return every run under every seed, seed by seed, each behind what it begins from.

    Args:
        sweep: the runs.
        recipes: their settings by name.
        output: of the sweep.
    """
    return [
        SweepJob(
            run=run,
            seed=seed,
            cfg=with_seed(recipes[run.name], seed),
            directory=run_directory(output, run.name, seed),
            source=None if run.after is None else run_directory(output, run.after, seed),
            ranks=sweep.nproc_per_node,
        )
        for seed in sweep.seeds
        for run in sweep.runs.values()
    ]


def run_directory(output: Path, run: str, seed: int) -> Path:
    """Return where a run is trained under a seed."""
    return output / "runs" / run / f"seed_{seed}"


def check_recipe(job: SweepJob) -> None:
    """Refuse a directory whose run was started with other settings.

    Raises:
        ConfigError: it was; the message names what differs.
    """
    path = job.directory / RECIPE_NAME
    if not path.exists():
        if has_checkpoints(job.directory):
            raise ConfigError(
                f"{job.directory} holds checkpoints and no {RECIPE_NAME}, so this sweep did not"
                " train them; give another --output, or remove the directory"
            )
        return
    if path.read_text("utf-8").endswith(dump_config(job.cfg)):
        return  # parsing takes a while
    before = parse_recipe(["--config", str(path)], prog="ablate", description="")
    changed = differences(before, job.cfg)
    if changed:
        shown = "; ".join(map(str, changed[:_SHOWN]))
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise ConfigError(
            f"{job}: the recipe has changed since {job.directory} was begun: {shown}{more}; runs of"
            " one sweep are not mixed of two; remove the directory to train the run again, give"
            " another --output, or undo the change"
        )


def write_recipe(sweep: Sweep, job: SweepJob) -> None:
    """Write the job's recipe into its directory, if it is not there."""
    path = job.directory / RECIPE_NAME
    if not path.exists():
        job.directory.mkdir(parents=True, exist_ok=True)
        write_text(path, recipe_text(sweep, job.run, job.cfg))


def commands_of(job: SweepJob) -> list[list[str]]:
    """Return the command lines that begin the job or go on with it, one after the other.

    What an earlier start left without a checkpoint is removed.
    """
    resumes = has_checkpoints(job.directory)
    load = job.directory
    commands = []
    if not resumes and job.source is not None:
        # A run that begins from another one refuses a directory with records.
        (job.directory / METRICS_NAME).unlink(missing_ok=True)
        load = job.source
        if job.run.upcycle is not None:
            load = job.directory / _UPCYCLED
            if not (load / REPORT_NAME).exists():
                shutil.rmtree(load, ignore_errors=True)
                commands.append(_upcycle_command(job, load))
    recipe = str(job.directory / RECIPE_NAME)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(job.ranks), "-m", "moe_app.pretrain"]
    commands.append(
        [*launch, "--config", recipe, "--save", str(job.directory), "--load", str(load)]
    )
    return commands


def _upcycle_command(job: SweepJob, save: Path) -> list[str]:
    rule = job.run.upcycle
    assert rule is not None and job.source is not None  # see `commands_of`
    command = [sys.executable, "-m", "moe_app", "upcycle", "--load", str(job.source)]
    command += ["--save", str(save), "--num-experts", str(rule.num_experts)]
    command += ["--moe-router-topk", str(rule.moe_router_topk)]
    command += ["--granularity", str(rule.granularity), "--noise", str(rule.noise)]
    command += ["--drop", str(rule.drop), "--seed", str(job.seed)]
    if rule.moe_layer_freq > 1:
        command += ["--moe-layer-freq", str(rule.moe_layer_freq)]
    if rule.iteration is not None:
        command += ["--ckpt-step", str(rule.iteration)]
    return [*command, "--preserve-function"] if rule.preserve_function else command
