"""Tests the GPU report without a GPU: commands, limits, sums over a trace, figures of the page."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, moe_layer, pretrain_run, train_step
from benchmarks.gpu_page import page
from benchmarks.gpu_parts import DEFAULT, Part, Setup, parts, read_json, read_tests
from benchmarks.session import Plan
from benchmarks.shapes import SHAPES, causal_flops_per_token, moa_flops
from benchmarks.trace import busy_us, group_of, sum_up_trace
from megatron.trainer.config.validate import validate
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.counting import training_flops_per_token

MACHINE = {
    "gpu": "NVIDIA H100", "gpu_memory_bytes": 85_000_000_000, "cpu_count": 16, "processor": "EPYC",
    "versions": {"torch": "2.13.0"}, "torch": "2.13.0",
}  # fmt: skip


def setup(folder: Path, device: str = "cuda") -> Setup:
    return Setup(device=device, folder=folder, gpu_bytes=MACHINE["gpu_memory_bytes"])  # type: ignore[arg-type]


class ReachedError(Exception):
    """Ends a benchmark where it would start."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


def planned(module: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return the plan that a benchmark makes of its flags."""
    benchmark = {"moe_layer": moe_layer, "train_step": train_step}[module]

    def stop(plan: Plan) -> None:
        raise ReachedError(plan)

    monkeypatch.setattr(benchmark, "Session", stop)
    with pytest.raises(ReachedError) as reached:
        benchmark.main(flags)
    return reached.value.plan


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_part_has_flags_that_its_program_takes(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parses them as the programs do; nothing runs."""
    every = parts(setup(tmp_path, device))
    assert set(DEFAULT[device]) <= every.keys()
    names = {}
    commands = [(part, each) for part in every for each in every[part].commands.values()]
    for part, (module, *flags) in commands:
        if module == "benchmarks.pretrain_run":
            _, recipe = pretrain_run.new_parser().parse_known_args(flags)
            validate(parse_recipe(recipe, prog="test", description=""), 1)
        elif module != "pytest":
            plan = planned(module.partition(".")[2], flags, monkeypatch)
            assert plan.device.type == device and plan.peer_timeout_s
            names[part] = list(plan.entries)
    assert names["step"][0] == names["layer"][0] == names["moa"][0] == "native"
    if device == "cuda":
        peers = {"transformers-grouped_mm", "megatron-core-sequential", "te-grouped"}
        assert peers | {"megablocks-grouped", "scattermoe", "sonicmoe"} < set(names["layer"])
        assert "native:triton" in names["step"] and "native:loop" not in names["step"]


def test_layers_fit_the_memory() -> None:
    cfg = parse_recipe(["--preset", "olmoe_1b_7b", "--mock-data"], prog="test", description="")

    def layers(memory: float | None) -> int:
        bytes_ = None if memory is None else int(memory)
        fitted: PretrainConfig = pretrain_run.with_layers(cfg, 8, bytes_)
        return fitted.model.num_layers

    # 8 layers took 84e9 bytes on an H200; those of an H100 are fewer.
    assert [layers(each) for each in (141e9, 85e9, 24e9, 8e9, None)] == [8, 6, 1, 1, 8]


def test_run_is_measured_between_records_and_trains_as_the_command(
    tmp_path: Path, make_state: Any
) -> None:
    from megatron.trainer.hooks.base import Hook
    from megatron.trainer.loop import train
    from megatron.trainer.objective import NEXT_TOKEN
    from tests.distributed.launcher import flags

    class Losses(Hook):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_log(self, record: Any) -> None:
            self.found.append(record["lm_loss"])

    sizes = {"train_iters": 3, "log_interval": 1}
    profile = ["--profile", "--profile-step-start", "2", "--profile-step-end", "3"]
    result = tmp_path / "run.json"
    own = ["--result", str(result), "--gemm-size", "8"]
    recipe = [*flags(device="cpu", save=tmp_path / "save", **sizes), *profile]
    assert pretrain_run.main([*own, *recipe]) == 0
    found = read_json(result)
    watch, state = Losses(), make_state(**sizes)
    train(state, NEXT_TOKEN, hooks=[watch])
    assert found["losses"] == watch.found
    # Between the records of steps 1, 2 and 3; what came before the first is compiled once.
    assert len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    assert found["tokens_per_step"] == 8 * 16
    assert found["model_flops_per_token"] == state.flops_per_token
    assert found["profile"]["num_steps"] == 1 and found["profile"]["wall_ms"] > 0
    assert not list((tmp_path / "save").glob("iter_*")), "a benchmark saves nothing"


def event(name: str, ts: float, dur: float, cat: str, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}


def test_trace_is_summed_up_a_step() -> None:
    """Two steps of 10 ms; kernels on two streams; the profiler's own wait comes after them."""
    events = [
        event("step 7", 0, 10_000, "user_annotation"),
        event("step 8", 10_000, 10_000, "user_annotation"),
        event("step 7", 0, 50_000, "gpu_user_annotation"),
        event("cudaLaunchKernel", 100, 10, "cuda_runtime"),
        event("cuLaunchKernelEx", 11_000, 10, "cuda_driver"),
        event("cudaStreamSynchronize", 12_000, 4000, "cuda_runtime"),
        event("cudaDeviceSynchronize", 20_500, 9000, "cuda_runtime"),
        event("nvjet_tst_128x256", 1000, 4000, "kernel", tid=7),
        event("gated_gradient_kernel", 3000, 4000, "kernel", tid=8),
        event("Memcpy DtoH (Device -> Pinned)", 12_000, 1000, "gpu_memcpy", tid=7),
        event("aten::mm", 0, 9000, "cpu_op"),
    ]
    found = sum_up_trace(events, num_steps=2)
    assert (found["wall_ms"], found["busy_ms"]) == (10.0, 3.5)
    assert (found["kernels"], found["launches"]) == (1.5, 1.0)
    assert found["waits"] == {"cudaStreamSynchronize": {"calls": 0.5, "ms": 2.0}}
    assert found["groups"] == {
        "dense products": {"ms": 2.0, "calls": 0.5},
        "grouped products": {"ms": 2.0, "calls": 0.5},
        "copies, casts and concatenations": {"ms": 0.5, "calls": 0.5},
    }
    assert found["longest"][0]["ms"] == 2.0
    assert busy_us([event("a", 0, 9, "kernel"), event("b", 2, 3, "kernel")]) == 9


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        (
            "void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<int>>>",
            "grouped products",
        ),
        ("nvjet_hsh_256x128_64x4_NNT", "dense products"),
        (
            "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>",
            "optimizer, clipping and norms of gradients",
        ),
        (
            "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>",
            "copies, casts and concatenations",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "elementwise"),
        ("void at::native::vectorized_gather_kernel<16, long>", "gathers and scatters"),
        ("void cunn_SoftMaxForward<8, float>", "softmax and cross-entropy"),
        ("product_kernel", "grouped products"),
        ("weight_gradient_kernel", "grouped products"),
        ("add_slots_kernel", "gathers and scatters"),
        ("statistics_kernel", "softmax and cross-entropy"),
        ("gradient_kernel", "softmax and cross-entropy"),
        ("rms_norm_gradient_kernel", "normalization"),
        ("gated_unit_gradient_kernel", "elementwise"),
        ("something new", "others"),
    ],
)
def test_kernels_have_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_causal_count_halves_the_scores_alone() -> None:
    model, length = SHAPES["olmoe"].model, 4096
    full = training_flops_per_token(model, length)
    scores = 12 * model.num_layers * model.hidden_size * length
    assert causal_flops_per_token(model, length) == full - scores / 2
    shape = SHAPES["jetmoe"]
    width = shape.model.attention_topk * 16 * 128
    halved = moa_flops(shape) - moa_flops(shape, is_causal=True)
    assert halved == 6 * width * shape.seq_length * shape.num_tokens


def test_command_ends_with_all_that_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = ["sh", "-c", f"exec 3> '{fifo}'; sleep 3600 & exit 3"]
        assert gpu_report.run(command, tmp_path / "log", limit_s=60) == "ended with status 3"
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b"", "nobody holds it any more"
    finally:
        os.close(reader)


def test_part_that_fails_or_hangs_is_recorded_and_its_result_not_taken_from_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "LEAST_S", float("-inf"))
    monkeypatch.setattr(gpu_report, "command_line", lambda command: ["sh", "-c", *command])
    (tmp_path / "stale.json").write_text("{}")
    commands = {
        "good.json": [f"echo '{{\"a\": 1}}' > {tmp_path}/good.json"],
        "stale.json": ["echo why; exit 7"],
    }
    part = Part(title="Some", limit_s=600.0, commands=commands, read=read_json)
    record = gpu_report.run_part("some", part, setup(tmp_path), MACHINE, deadline=float("inf"))
    assert record["found"] == {"good.json": {"a": 1}}
    assert record["problems"] == ["ended with status 7", "no stale.json: FileNotFoundError"]
    hanging = Part(title="", limit_s=0.0, commands={"no": ["sleep 3600"]}, read=read_json)
    late = gpu_report.run_part("late", hanging, setup(tmp_path), MACHINE, deadline=float("inf"))
    assert late["problems"][0].endswith("s, its limit")
    assert json.loads((tmp_path / "part-some.json").read_text()) == record
    assert record["commands"][0] == ["echo '{\"a\": 1}' > gpu-results/good.json"]
    assert "why" in capsys.readouterr().out


def test_machine_without_a_gpu_and_unknown_parts_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "read_machine", lambda: {**MACHINE, "gpu": None})
    assert gpu_report.main(["--folder", str(tmp_path)]) == 2
    assert "torch 2.13.0 sees no GPU here" in capsys.readouterr().err
    assert gpu_report.main(["--folder", str(tmp_path), "--device", "cpu", "--parts", "lier"]) == 2
    assert "no part 'lier'; use tests, pretrain, layer," in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_outcomes_of_tests_are_read_from_junit(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="E: 1 != 2&#10;more"/></testcase>'
        '<testcase classname="b" name="three"><skipped message="no te"/></testcase>'
        '<testcase classname="b" name="four"><error message="boom"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_tests(path) == {
        "passed": 1,
        "failed": ["a.two: E: 1 != 2", "b.four: boom"],
        "skipped": ["b.three: no te"],
    }


def row(milliseconds: float, share: float) -> dict[str, Any]:
    def summary(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    return {
        "status": "measured", "milliseconds": summary(milliseconds),
        "tokens_per_second": summary(1e6), "model_flops_per_second": summary(4e14),
        "share_of_gemm_ceiling": summary(share), "peak_bytes": 3e9, "kept_bytes_per_token": 37_400,
        "time_over_native": summary(1.0),
    }  # fmt: skip


def record(title: str, found: dict[str, Any], *problems: str) -> dict[str, Any]:
    return {
        "title": title, "date": "2026-11-28T12:00+00:00", "seconds": 61.4, "machine": MACHINE,
        "commands": [["benchmarks.some", "--only", "native:[cgt]*"]], "problems": list(problems),
        "found": found,
    }  # fmt: skip


def test_page_has_shares_of_the_ceiling_and_says_what_is_not_measured() -> None:
    ceiling = {"median": 8e14, "low": 7e14, "high": 9e14}
    training = {
        "num_layers": 8, "parameters": 3.5e9, "tokens_per_step": 32_000,
        "step_seconds": [0.4, 0.5, 0.8], "model_flops_per_token": 5e9,
        "causal_flops_per_token": 4e9, "gemm_flops_per_second": ceiling, "peak_bytes": 8.4e10,
    }  # fmt: skip
    step = {
        "model_flops_per_sample": 10.0, "causal_flops_per_sample": 9.0,
        "ceilings": {"gemm_flops_per_second": ceiling},
        "implementations": {
            "native": row(20.0, 0.5), "scattermoe": row(10.0, 0.6),
            "sonicmoe": {"status": "failed: 'check' took more than 150 s"},
        },
    }  # fmt: skip
    parts_ = {
        "pretrain": record("Training", {"pretrain.json": training}),
        "step": record("Step", {"step.json": step}),
        "moa": record("MoA", {}, "ended after 240 s, its limit"),
    }
    text = page(parts_, missing={"Profile": "not run"}, is_trial=False)
    # 32,000 tokens in the middle step's 0.5 s are 64,000 a second, 320 TFLOP/s of 800.
    assert "| 64,000 (40,000 to 80,000) | 320.0 | 40% | 32% | 84.00 |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| native ", "| scattermoe "))]
    assert rows[0].startswith("| scattermoe | 10.00 (10.00 to 10.00) | 1,000,000 | 400.0 | 60%")
    assert "| 54% | 3.00 | 37.4 | 1.00" in rows[0] and "| native |" in rows[1]
    assert "    python -m benchmarks.some --only 'native:[cgt]*'" in text
    missing = text.partition("## Not measured")[2].splitlines()
    assert "* Profile: not run" in missing
    assert "* Step: sonicmoe, failed: 'check' took more than 150 s" in missing
    assert "* MoA: ended after 240 s, its limit" in missing
    assert "* NVIDIA H100, 85 GB; 16 cores; torch 2.13.0" in text
    assert "its figures mean nothing" in page(parts_, missing={}, is_trial=True)
