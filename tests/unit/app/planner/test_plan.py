"""tools/plan.py: legal layouts by brute force, flags that mean what they say, and its advice."""

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.config.parallel_layout import resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from moe_app.planner import plan, search
from moe_app.pretrain.config import parse_recipe
from moe_ext.counting import count_parameters
from moe_ext.presets import PUBLISHED_STEPS
from tests.paths import REPO

OLMOE = ["--config", str(REPO / "examples/olmoe_1b_7b/olmoe_1b_7b.yaml")]
JETMOE = ["--config", str(REPO / "examples/jetmoe_8b/jetmoe_8b.yaml")]
SMALL = [
    *("--preset", "olmoe_tiny", "--bf16", "--seq-length", "256"),
    *("--micro-batch-size", "2", "--global-batch-size", "32"),
]


def parsed(*argv: str) -> search.PlanConfig:
    return plan.parse(argv)[0]


def sizes(parallel: ParallelConfig) -> tuple[int | None, ...]:
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )


def legal(cfg: search.PlanConfig, num_gpus: int) -> set[tuple[int | None, ...]]:
    """By asking the trainer about everything."""
    found = set()
    numbers = range(1, num_gpus + 1)
    for tensor, pipeline, virtual, context, expert in itertools.product(numbers, repeat=5):
        for expert_tensor in {1, tensor}:
            parallel = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                num_virtual_stages_per_pipeline_rank=virtual,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                expert_tensor_parallel_size=expert_tensor,
            )
            try:
                validate(dataclasses.replace(cfg, parallel=parallel), num_gpus)
            except ConfigError:
                continue
            found.add(sizes(parallel))
    return found


def test_all_legal_layouts_are_looked_at_and_no_others() -> None:
    cfg = parsed(*SMALL)
    plans = search.search(cfg, 4).plans
    assert {sizes(each.parallel) for each in plans} == legal(cfg, 4)
    assert {each.layout.data for each in plans} == {1, 2, 4}
    with_both = [sizes(each.parallel) for each in plans if each.layout.data == 4]
    assert all(with_both.count(each) == 2 for each in with_both)


def test_sizes_can_be_asked_for() -> None:
    cfg = parsed(*SMALL, "--tp", "2", "--ep", "2", "4", "--etp", "2", "--pp", "1")
    found = {sizes(each.parallel) for each in search.search(cfg, 8).plans}
    assert {each[0] for each in found} == {2}
    assert {(each[4], each[5]) for each in found} == {(2, 2), (4, 2)}
    only = parsed(*SMALL, "--distributed-optimizer", "on")
    plans = search.search(only, 4).plans
    assert all(each.parallel.use_distributed_optimizer for each in plans)


def test_those_that_fit_come_first_then_the_fastest() -> None:
    cfg = parsed(*OLMOE, "--memory", "60")
    limit = search.memory_limit(cfg.planning)
    assert limit == 54e9
    plans = search.search(cfg, 8).plans
    fits = [each.fits(limit) for each in plans]
    assert True in fits and False in fits
    assert fits == sorted(fits, reverse=True)
    number = fits.count(True)
    seconds = [each.seconds for each in plans[:number]]
    assert seconds == sorted(seconds)
    peaks = [each.footprint.peak for each in plans[number:]]
    assert peaks == sorted(peaks) and peaks[0] > limit


def test_flags_to_paste_make_the_layout_of_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*OLMOE, "--gpus", "16", "--memory", "80"]) == 0
    printed = capsys.readouterr().out
    blocks = re.split(r"\nflags of row \d+:\n", printed)
    assert len(blocks) == 4
    rows = [line.split() for line in blocks[0].splitlines() if re.match(r" +\d+ ", line)]
    for row, block in zip(rows, blocks[1:], strict=False):
        flags = shlex.split(block.replace("\\\n", " "))
        cfg = parse_recipe([*OLMOE, *flags], prog="test", description="")
        validate(cfg, 16)
        layout = resolve_layout(cfg.parallel, 16)
        stages = f"{layout.pipeline}x{layout.virtual_stages}"
        shown = (layout.tensor, stages, layout.context, layout.expert, layout.expert_tensor)
        assert row[1:7] == [*map(str, shown), str(layout.data)]
        assert row[8] == ("dist" if cfg.parallel.use_distributed_optimizer else "full")


@pytest.mark.parametrize(("argv", "gpus"), [(OLMOE, 16), (JETMOE, 24)])
def test_table_is_for_eyes(argv: list[str], gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*argv, "--gpus", str(gpus), "--memory", "80"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    count = count_parameters(parsed(*argv).model)
    assert f"{count.total:,} parameters, {count.active:,} active" in printed
    rows = [line for line in printed.splitlines() if re.match(r" +\d+ ", line)]
    assert len(rows) == 12
    for row in rows:
        *parts, peak = (float(each) for each in row.split()[9:15])
        assert sum(parts) == pytest.approx(peak, abs=0.31)


def test_example_of_the_document_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--gpus", "64", "--memory", "80", "--rows", "8", "--paste", "1"]
    assert plan.main([*OLMOE, *asked]) == 0
    assert capsys.readouterr().out in (REPO / "docs" / "planning.md").read_text("utf-8")


PAPERS = [
    # OLMoE, arXiv 2409.02060, section 4.1.1: 23,600 tokens/s a GPU on 128 H100; 5.133T tokens in
    # about 10 days on 256 (appendix B) agree. FSDP, no other parallelism: here a sharded optimizer,
    # which exchanges the same bytes.
    (OLMOE, 256, (), (1, 1, 1, 1), 23_600.0),
    # JetMoE, arXiv 2404.07413: 30,000 H100 hours for 1.25T tokens, three pipeline stages, 96 GPUs.
    # No expert parallelism, because uneven loads slow it (section 4.1).
    (JETMOE, 96, ("--ep", "1"), (1, 3, 1, 1), 1.25e12 / (30_000 * 3_600)),
]


@pytest.mark.parametrize(("argv", "gpus", "flags", "sizes_of_paper", "rate"), PAPERS)
def test_the_papers_layouts_come_first_and_run_at_their_rates(
    argv: list[str], gpus: int, flags: tuple[str, ...], sizes_of_paper: tuple[int, ...], rate: float
) -> None:
    """With `grouped`, the slowest of the measured backends: docs/planning.md says why."""
    few = ["--tp", "1", "--cp", "1", "--vp", "1", "--distributed-optimizer", "on", *flags]
    cfg = parsed(*argv, "--gpus", str(gpus), "--expert-backend", "grouped", *few)
    found = search.search(cfg, gpus).plans
    limit = search.memory_limit(cfg.planning)
    assert limit == 72e9 and found[0].fits(limit)
    layouts = [each.layout for each in found]
    first = layouts[0]
    assert (first.tensor, first.pipeline, first.context, first.expert) == sizes_of_paper
    assert first.data == gpus // first.pipeline
    predicted = 1024 * 4096 / found[0].seconds / gpus
    assert predicted == pytest.approx(rate, rel=0.2)


def test_json_has_every_plan(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    assert plan.main([*SMALL, "--gpus", "4", "--imbalance", "1.5", "--json", str(file)]) == 0
    found = json.loads(file.read_text("utf-8"))
    cfg = parsed(*SMALL, "--imbalance", "1.5")
    assert len(found["plans"]) == len(search.search(cfg, 4).plans)
    assert found["parameters"]["total"] == count_parameters(cfg.model).total
    for each in found["plans"]:
        footprint = each["footprint"]
        state = sum(footprint["state"][key] for key in ("weights", "gradients", "optimizer"))
        assert footprint["peak"] > state
        assert each["step"]["imbalance"] == (1.5 if each["layout"]["expert"] > 1 else 1.0)


def test_imbalance_costs_memory_and_time_where_experts_are_spread() -> None:
    def found(imbalance: str) -> dict[tuple[int | None, ...], tuple[float, float]]:
        cfg = parsed(*OLMOE, "--imbalance", imbalance, "--distributed-optimizer", "on")
        cfg = dataclasses.replace(cfg, planning=dataclasses.replace(cfg.planning, pp=(1,), cp=(1,)))
        return {
            sizes(each.parallel): (each.footprint.peak, each.seconds)
            for each in search.search(cfg, 8).plans
        }

    even, busy = found("1"), found("1.5")
    assert even.keys() == busy.keys()
    for key, (peak, seconds) in even.items():
        if key[4] == 1:
            assert busy[key] == (peak, seconds)
        else:
            assert busy[key][0] > peak and busy[key][1] > seconds


def test_what_would_help_is_said_and_true(capsys: pytest.CaptureFixture[str]) -> None:
    tight = [*OLMOE, "--memory", "24", "--tp", "1", "--cp", "1", "--pp", "1"]
    assert plan.main([*tight, "--gpus", "8", "--distributed-optimizer", "off"]) == 2
    told = capsys.readouterr().err
    assert "no layout of 8 GPUs fits into 21.6 GB; the nearest, row 1, needs" in told
    tried = re.findall(r"^- (.+): ([\d.]+) GB, (.+)$", told, flags=re.MULTILINE)
    assert {verdict for *_, verdict in tried} == {"fits", "still too much"}
    for words, size, verdict in tried:
        flags = words.split() if "--gpus" in words else ["--gpus", "8", *words.split()]
        assert plan.main([*tight, *flags]) == (0 if verdict == "fits" else 2)
        first = capsys.readouterr().out.partition("   step\n")[2].splitlines()[0]
        assert first.split()[14].rstrip("!") == size


PRESET_RECIPES = {"olmoe_1b_7b": OLMOE, "jetmoe_8b": JETMOE}


@pytest.mark.parametrize("preset", PUBLISHED_STEPS)
def test_a_preset_is_planned_with_its_published_step(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is that of the recipe in examples/, as both cite the same source."""
    recipe_step = parsed(*PRESET_RECIPES[preset]).training
    cfg, published = plan.parse(["--preset", preset])
    assert cfg.training.seq_length == recipe_step.seq_length == 4096
    assert cfg.training.global_batch_size == recipe_step.global_batch_size == 1024
    assert published == ("seq_length", "global_batch_size")
    asked = ["--gpus", "256", "--rows", "1", "--paste", "0", "--tp", "1", "--cp", "1", "--pp", "1"]
    assert plan.main(["--preset", preset, *asked]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("step: 1,024 x 4,096 tokens, ")
    assert said[2].startswith("seq_length and global_batch_size: as published for the preset")


def test_a_step_that_is_given_wins_over_the_published_one(tmp_path: Path) -> None:
    argv = ["--preset", "olmoe_1b_7b", "--seq-length", "2048"]
    cfg, published = plan.parse(argv)
    assert (cfg.training.seq_length, cfg.training.global_batch_size) == (2048, 1024)
    assert published == ("global_batch_size",)
    file = tmp_path / "recipe.yaml"
    file.write_text("preset: olmoe_1b_7b\nglobal_batch_size: 64\n")
    cfg, published = plan.parse(["--config", str(file)])
    assert (cfg.training.seq_length, cfg.training.global_batch_size) == (4096, 64)
    assert published == ("seq_length",)
    assert plan.parse(OLMOE)[1] == ()


@pytest.mark.parametrize(
    ("argv", "names", "flags"),
    [
        (
            ["--preset", "olmoe_tiny"],
            "seq_length and global_batch_size",
            "--seq-length N and --global-batch-size N",
        ),
        (["--seq-length", "128"], "global_batch_size", "--global-batch-size N"),
    ],
)
def test_a_step_is_asked_for_where_none_is_published(
    argv: list[str], names: str, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*argv, "--gpus", "8"]) == 2
    assert capsys.readouterr().err == (
        f"ConfigError: {names} must be given: memory and time are those of one step, and only the"
        f" presets olmoe_1b_7b, jetmoe_8b have published ones; set {flags}, or give the recipe of"
        " the run as --config\n"
    )


def test_nothing_helps_a_gpu_that_is_far_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*SMALL, "--gpus", "1", "--memory", "0.001"]) == 2
    assert "none of it is enough" in capsys.readouterr().err


def test_no_legal_layout_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*SMALL, "--gpus", "7"]) == 2
    told = capsys.readouterr().err
    assert "no layout of 7 ranks is legal" in told
    assert "global_batch_size (32) must be a multiple of" in told


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "gpus (None) must be given"),
        (["--gpus", "0"], "gpus (0) must be at least 1"),
        (["--gpus", "8", "--imbalance", "0.5"], "imbalance (0.5) must be at least 1"),
        (["--gpus", "8", "--headroom", "1"], "headroom (1) must be at least 0 and below 1"),
        (["--gpus", "8", "--memory", "-1"], "memory (-1) must be above 0"),
        (["--gpus", "8", "--lr", "0"], "lr (0.0) must be above 0"),
        (["--gpus", "8", "--tp", "0"], "tensor_model_parallel_size (0) must be at least 1"),
        (["--gpus", "8", "--json", "no/such/place"], "cannot write --json no/such/place"),
        (
            ["--gpus", "4", "--moe-token-dispatcher-type", "flex"],
            "moe_token_dispatcher_type is 'flex'",
        ),
        (["--gpus", "4", "--expert-backend", "grouppped"], "did you mean 'grouped'"),
    ],
)
def test_wrong_settings_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([*SMALL, *argv]) == 2
    assert message in capsys.readouterr().err


def test_step_has_what_the_recipe_says() -> None:
    flags: list[Any] = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
    flags += ["--expert-backend", "loop", "--reset-attention-mask", "--packed-attention", "mask"]
    cfg = parse_recipe([*SMALL, *flags], prog="test", description="")
    layout = resolve_layout(cfg.parallel, 4)
    step = search.make_step(cfg, layout, device_type="cuda")
    assert (step.recompute, step.recompute_core_attention) == (None, True)
    assert (step.has_mask, step.has_positions, step.keeps_activation) == (True, False, True)
    assert not step.is_varlen
    cfg = parse_recipe([*SMALL, "--reset-attention-mask"], prog="test", description="")
    step = search.make_step(cfg, layout, device_type="cuda")
    assert (step.has_mask, step.is_varlen) == (False, True)
    assert (step.num_microbatches, step.bf16) == (4, True)
    assert step.fused_kernels and not search.make_step(cfg, layout, device_type="cpu").fused_kernels
    cfg = parse_recipe([*SMALL, "--fused-kernels", "off"], prog="test", description="")
    assert not search.make_step(cfg, layout, device_type="cuda").fused_kernels
