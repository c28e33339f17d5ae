"""Say on one page what this machine can do for a run, and what would stop it.

    python tools/doctor.py --config recipe.yaml --save runs/a
    torchrun --nproc-per-node 8 tools/doctor.py --config recipe.yaml --save runs/a

It takes the flags of pretrain.py and asks what that run would need: its layout, its precision, its
directory. Under torchrun all ranks answer, compute and exchange, and rank 0 prints. Exit status: 0,
or 1 if something would stop a run, or 2 for a wrong flag, or when a rank hangs.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron.trainer.config.cli import load_config
from megatron.trainer.config.durations import resolve_lengths
from megatron.trainer.config.validate import size_problems
from megatron.trainer.errors import UserError
from megatron.trainer.health.preflight import Findings, examine
from megatron.trainer.health.rank_checks import PreflightError
from megatron.trainer.runtime.launch import (
    RunContext,
    environment_rank,
    environment_world_size,
    initialize,
    run_main,
    shut_down,
    slurm_environment,
)
from megatron.trainer.runtime.log import configure_logging
from moe_app.command_line import program
from moe_app.doctor.facts import (
    attention_section,
    experts_section,
    machine_section,
    slurm_section,
    versions_section,
)
from moe_app.doctor.page import Page, Row, Section, show
from moe_app.pretrain.config import PretrainConfig
from moe_ext.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """How the page is given."""

    json: bool = False
    """Print the page as JSON."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PretrainConfig):
    """A run, and how to tell about it."""

    doctor: DoctorOptions = field(default_factory=DoctorOptions)
    """The page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page that `argv` asks for; returns the exit status."""
    return run_main(lambda: doctor(parse(argv)))


def parse(argv: Sequence[str] | None) -> DoctorConfig:
    """Read recipe and flags; on ranks other than 0 without a word."""
    return load_config(
        DoctorConfig,
        sys.argv[1:] if argv is None else argv,
        presets=PRESETS,
        resolve=resolve_lengths,
        prog=program("doctor"),
        description=__doc__ or "",
        quiet=environment_rank() != 0,
    )


def doctor(cfg: DoctorConfig) -> int:
    """Look at everything; print it on rank 0, whose status is the job's."""
    configure_logging(environment_rank())
    logging.getLogger().setLevel(logging.WARNING)
    sections = [versions_section(), machine_section()]
    is_cuda = torch.cuda.is_available() and cfg.parallel.device != "cpu"
    device_type = "cuda" if is_cuda else "cpu"
    # Both divide by sizes; where these are wrong, the ranks below say so.
    if environment_rank() == 0 and not (size_problems(cfg) or cfg.model.problems()):
        sections.append(experts_section(cfg, device_type))
        sections.append(attention_section(cfg, device_type))
    findings, rows = look_together(cfg)
    sections.append(
        Section(key="ranks", title=f"Ranks ({environment_world_size()})", rows=tuple(rows))
    )
    if environment_rank() != 0:
        return 0
    num_hosts = None if findings is None else len({each.host for each in findings.ranks})
    sections.append(slurm_section(slurm_environment(), num_hosts=num_hosts))
    page = Page(sections=tuple(sections))
    if cfg.doctor.json:
        print(page.to_json())
    else:
        show(page)
    return page.status


def look_together(cfg: DoctorConfig) -> tuple[Findings | None, list[Row]]:
    """What all ranks find out together; None if they cannot come together."""
    try:
        ctx = initialize(cfg)
    except (UserError, RuntimeError) as error:
        return None, [_problem("start", "fails", str(error))]
    try:
        save = None if cfg.checkpoint.save is None else Path(cfg.checkpoint.save)
        findings = examine(ctx, timeout_s=cfg.reliability.preflight_timeout, save=save)
    except PreflightError as error:
        if error.is_local:
            raise
        return None, [_problem("all-reduce", "fails", str(error))]
    shut_down()
    return findings, _rank_rows(ctx, findings, cfg)


def _problem(name: str, value: str, detail: str) -> Row:
    return Row(name=name, value=value, state="bad", detail=detail)


def _rank_rows(ctx: RunContext, findings: Findings, cfg: DoctorConfig) -> list[Row]:
    hosts = [each.host for each in findings.ranks]
    layout = ctx.layout
    rows = [
        Row(
            name="answer",
            value=f"{_counted(len(hosts), 'rank')} on {_counted(len(set(hosts)), 'node')}",
            detail=f"{findings.ranks[0].device}, {_counted(ctx.num_threads, 'thread')} a rank; TP"
            f" {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, EP {layout.expert}, ETP"
            f" {layout.expert_tensor}, DP {layout.data}",
        ),
        _product_row(findings),
    ]
    for group in findings.groups:
        if group.num_ranks == 1:
            continue
        rows.append(
            Row(
                name=f"all-reduce, {group.name}",
                value=f"{group.latency_s * 1e3:.2f} ms",
                detail=f"{group.num_ranks} ranks; 4 MiB in {group.message_s * 1e3:.1f} ms,"
                f" {group.bytes_per_s / 1e9:.2f} GB/s",
            )
        )
    if len(hosts) == 1:
        rows.append(
            Row(
                name="all-reduce",
                value="not tried",
                state="note",
                detail="one rank has nobody to talk to; start the doctor with torchrun",
            )
        )
    for disk in findings.disks:
        rows.append(
            Row(
                name=f"--save on {disk.host}",
                value=f"{disk.bytes_per_s / 1e6:,.0f} MB/s",
                detail=f"{disk.free_bytes / 2**30:,.1f} GiB free in {disk.directory}",
            )
        )
    if cfg.checkpoint.save is None:
        rows.append(
            Row(name="--save", value="not given", state="note", detail="no disk was looked at")
        )
    rows += [Row(name="ranks", value="differ", state="warn", detail=w) for w in findings.warnings]
    rows += [_problem("ranks", "cannot run", each) for each in findings.problems]
    return rows


def _product_row(findings: Findings) -> Row:
    flops = findings.flops
    slowest = findings.ranks[flops.index(min(flops))]
    low, high = f"{min(flops) / 1e9:,.0f}", f"{max(flops) / 1e9:,.0f}"
    return Row(
        name="product in fp32",
        value=f"{low if low == high else f'{low} to {high}'} GFLOP/s",
        detail=f"slowest: rank {slowest.rank} on {slowest.host}" if len(flops) > 1 else "",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
