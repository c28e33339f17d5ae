"""Writes the page of a GPU report from the JSON of its parts."""

import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
"""What gpu_report keeps of a part: title, commands, problems, machine, and what they left."""

HEAD = """# Measured on a GPU

    make gpu-report                                    # on a machine with one GPU; under 40 min
    make gpu-report REPORT_FLAGS='--parts layer,step'  # some parts; the others stay as they are

writes this page anew. [performance.md](performance.md#how-it-is-measured) says what is compared and
how, [benchmarks/README.md](../benchmarks/README.md#on-a-gpu) how peers are installed. Every part
measures the ceiling, a GEMM of 8192 in bf16, itself. Shares count attention over the full square,
as published figures do; where a causal mask halves it, a second share counts half.
"""
TRIAL = "\n**A trial on a CPU at tiny sizes: its figures mean nothing.**\n"


def page(parts: Mapping[str, Record], *, missing: Mapping[str, str], is_trial: bool) -> str:
    """Return the page.

    Args:
        parts: records by the name of the part, in the order of the page.
        missing: titles of parts without a record, and why there is none.
        is_trial: whether the figures are of a trial.
    """
    lines = [HEAD + (TRIAL if is_trial else ""), *_overview(parts.values())]
    absent = [f"{title}: {why}" for title, why in missing.items()]
    for name, record in parts.items():
        found = record["found"]
        lines += ["", f"## {record['title']}", ""]
        lines += [f"    python -m {shlex.join(command)}" for command in record["commands"]]
        if found:
            for result in found.values():
                lines += ["", *_SECTIONS.get(name, _benchmark)(result)]
                absent += [f"{record['title']}: {each}" for each in _absent(result)]
        absent += [f"{record['title']}: {problem}" for problem in record["problems"]]
    lines += ["", "## Not measured", "", *(f"* {each}" for each in dict.fromkeys(absent))]
    lines += ["* More than one GPU, and whatever this page does not name."]
    return "\n".join(lines) + "\n"


def _overview(records: Iterable[Record]) -> Iterator[str]:
    """Yield a row a part, and the machines."""
    yield "| part | outcome | seconds | date |"
    yield "|---|---|---|---|"
    machines = []
    for record in records:
        outcome = "ran" if not record["problems"] else "; ".join(record["problems"])
        seconds = f"{record['seconds']:.0f}"
        yield f"| {record['title']} | {_cell(outcome)} | {seconds} | {record['date']} |"
        machines.append(_machine(record["machine"]))
    yield ""
    yield from (f"* {each}" for each in dict.fromkeys(machines))


def _machine(machine: Mapping[str, Any]) -> str:
    """Describe device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    device = machine["processor"]
    if machine["gpu"] is not None:
        device = f"{machine['gpu']}, {machine['gpu_memory_bytes'] / 1e9:.0f} GB"
    return f"{device}; {machine['cpu_count']} cores; {versions}"


def _tests(found: Mapping[str, Any]) -> Iterator[str]:
    failed, skipped = found["failed"], found["skipped"]
    yield f"{found['passed']} passed, {len(failed)} failed, {len(skipped)} skipped."
    if failed or skipped:
        yield ""
    yield from (f"* failed: {_cell(each)}" for each in failed)
    # A reason is worth a line once, however many tests have it.
    reasons = [each.partition(": ")[2] for each in skipped]
    yield from (
        f"* skipped, {reasons.count(each)}: {_cell(each)}" for each in dict.fromkeys(reasons)
    )


def _training(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of a run: medians of the intervals between records (extremes)."""
    tokens, ceiling = found["tokens_per_step"], found["gemm_flops_per_second"]["median"]
    rates = [tokens / each for each in found["step_seconds"]]
    flops, causal = found["model_flops_per_token"], found["causal_flops_per_token"]
    yield (
        "| layers | parameters | tokens a step | tokens/s | model TFLOP/s | of the ceiling |"
        " attention counted half | peak memory, GB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    middle = statistics.median(rates)
    yield (
        f"| {found['num_layers']} | {found['parameters'] / 1e9:.2f}e9 | {tokens:,} |"
        f" {middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {middle * flops / 1e12:.1f} |"
        f" {middle * flops / ceiling:.0%} | {middle * causal / ceiling:.0%} |"
        f" {found['peak_bytes'] / 1e9:.2f} |"
    )
    yield ""
    yield f"The ceiling: {spread(found['gemm_flops_per_second'], '.1f', 1e12)} TFLOP/s."


def _profile(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield kernels by group, launches and waits of a step."""
    profile = found["profile"]
    kernels = "kernels and copies" if profile["has_gpu"] else "operations of the CPU"
    whole = sum(each["ms"] for each in profile["groups"].values())
    yield (
        f"A step under the profiler: {profile['wall_ms']:.1f} ms, of which the device was busy"
        f" {profile['busy_ms']:.1f} ({profile['busy_ms'] / profile['wall_ms']:.0%});"
        f" {profile['kernels']:.0f} {kernels}, {profile['launches']:.0f} launches; peak memory"
        f" {found['peak_bytes'] / 1e9:.2f} GB."
    )
    yield ""
    yield from ("| group | ms a step | share | calls a step |", "|---|---|---|---|")
    for name, each in profile["groups"].items():
        yield f"| {name} | {each['ms']:.2f} | {each['ms'] / whole:.0%} | {each['calls']:.0f} |"
    yield ""
    yield from ("| where the host waits | calls a step | ms of the host |", "|---|---|---|")
    for name, each in profile["waits"].items():
        yield f"| `{name}` | {each['calls']:.1f} | {each['ms']:.2f} |"
    yield ""
    yield from ("| longest | ms a step | calls a step |", "|---|---|---|")
    for each in profile["longest"]:
        name = each["name"] if len(each["name"]) <= 90 else f"{each['name'][:87]}..."
        yield f"| `{_cell(name)}` | {each['ms']:.2f} | {each['calls']:.1f} |"


def _benchmark(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield a row an implementation, fastest first."""
    halved = found["causal_flops_per_sample"] / found["model_flops_per_sample"]
    kind = found.get("routing", {}).get("kind")
    if kind is not None:
        yield from (f"Routing: {kind}.", "")
    yield (
        "| implementation | ms | tokens/s | TFLOP/s | of the ceiling |"
        + (" attention counted half |" if halved < 1 else "")
        + " peak memory, GB | kept, KB a token | time / native's |"
    )
    yield "|---|---|---|---|---|" + ("---|" if halved < 1 else "") + "---|---|---|"
    measured = {
        name: row for name, row in found["implementations"].items() if row["status"] == "measured"
    }
    for name in sorted(measured, key=lambda each: measured[each]["milliseconds"]["median"]):
        row = measured[name]
        share, ratio = row["share_of_gemm_ceiling"], row.get("time_over_native")
        kept = row.get("kept_bytes_per_token")
        yield (
            f"| {name} | {spread(row['milliseconds'], '.2f')} |"
            f" {row['tokens_per_second']['median']:,.0f} |"
            f" {row['model_flops_per_second']['median'] / 1e12:.1f} | {spread(share, '.0%')} |"
            + (f" {share['median'] * halved:.0%} |" if halved < 1 else "")
            + f" {row['peak_bytes'] / 1e9:.2f} | {'' if kept is None else f'{kept / 1e3:.1f}'} |"
            f" {'' if ratio is None else spread(ratio, '.2f')} |"
        )
    yield ""
    ceiling = found["ceilings"]["gemm_flops_per_second"]
    yield f"The ceiling: {spread(ceiling, '.1f', 1e12)} TFLOP/s."


def _absent(found: Mapping[str, Any]) -> Sequence[str]:
    """List the implementations of a benchmark that were not measured, and why."""
    return [
        f"{name}, {_cell(row['status'])}"
        for name, row in found.get("implementations", {}).items()
        if row["status"] != "measured"
    ]


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "tests": _tests,
    "pretrain": _training,
    "whole": _training,
    "profile": _profile,
}


def spread(summary: Mapping[str, float], form: str, unit: float = 1.0) -> str:
    """Format a median with its extremes."""
    median, low, high = (format(summary[key] / unit, form) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _cell(text: str) -> str:
    """Return text that does not end a cell of a table."""
    return text.replace("|", "/").replace("\n", " ")
