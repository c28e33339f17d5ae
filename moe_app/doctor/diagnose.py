"""Reports on one page what this machine can do for a run, and what would stop it.

    python tools/doctor.py --config recipe.yaml --save runs/a
    torchrun --nproc-per-node 8 tools/doctor.py --config recipe.yaml --save runs/a

It takes the flags of pretrain.py and checks what that run needs: its layout, precision and
directory. Under torchrun all ranks respond, compute and communicate, and rank 0 prints. Exit
status: 0; 1 if something would stop a run; 2 for a wrong flag, or when a rank hangs.
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
    """Sets the output format of the page."""

    json: bool = False
    """Print the page as JSON."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(PretrainConfig):
    """Extends the config of a run with the options of the doctor."""

    doctor: DoctorOptions = field(default_factory=DoctorOptions)
    """Output format of the page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page for the run that `argv` describes; return the exit status."""
    return run_main(lambda: doctor(parse(argv)))


def parse(argv: Sequence[str] | None) -> DoctorConfig:
    """Parse recipe and flags; print nothing on ranks other than 0."""
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
    """Run all checks and print them on rank 0, whose exit status is the job's."""
    configure_logging(environment_rank())
    logging.getLogger().setLevel(logging.WARNING)
    sections = [versions_section(), machine_section()]
    is_cuda = torch.cuda.is_available() and cfg.parallel.device != "cpu"
    device_type = "cuda" if is_cuda else "cpu"
    # Both divide by sizes; the ranks section below reports invalid ones.
    if environment_rank() == 0 and not (size_problems(cfg) or cfg.model.problems()):
        sections.append(experts_section(cfg, device_type))
        sections.append(attention_section(cfg, device_type))
    findings, rows = check_ranks(cfg)
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


def check_ranks(cfg: DoctorConfig) -> tuple[Findings | None, list[Row]]:
    """Run the checks that need all ranks; None for the findings if the ranks cannot communicate."""
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
            name="responding",
            value=f"{_counted(len(hosts), 'rank')} on {_counted(len(set(hosts)), 'node')}",
            detail=f"{findings.ranks[0].device}, {_counted(ctx.num_threads, 'thread')} a rank; TP"
            f" {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, EP {layout.expert}, ETP"
            f" {layout.expert_tensor}, DP {layout.data}",
        ),
        _matmul_row(findings),
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
                value="not tested",
                state="note",
                detail="there is only one rank; start the doctor with torchrun to test it",
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
            Row(name="--save", value="not given", state="note", detail="no disk was tested")
        )
    rows += [Row(name="ranks", value="differ", state="warn", detail=w) for w in findings.warnings]
    rows += [_problem("ranks", "cannot run", each) for each in findings.problems]
    return rows


def _matmul_row(findings: Findings) -> Row:
    flops = findings.flops
    slowest = findings.ranks[flops.index(min(flops))]
    low, high = f"{min(flops) / 1e9:,.0f}", f"{max(flops) / 1e9:,.0f}"
    return Row(
        name="matmul in fp32",
        value=f"{low if low == high else f'{low} to {high}'} GFLOP/s",
        detail=f"slowest: rank {slowest.rank} on {slowest.host}" if len(flops) > 1 else "",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
