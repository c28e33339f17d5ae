"""Formats the results of a session as JSON and as a table."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.session import NATIVE, Measured, Session
from benchmarks.timing import Summary, paired_ratio, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Holds the work of one sample."""

    num_tokens: int
    """Tokens per sample."""
    flops: float
    """Model FLOPs per sample."""
    causal_flops: float
    """The same with half of the attention's square, which is what a causal mask leaves."""


def results(session: Session, work: Work, **about: Any) -> dict[str, Any]:
    """Collect all measurements and the figures derived from them.

    Args:
        session: a session after `run`.
        work: work of one sample.
        about: further entries: benchmark, shape, routing.
    """
    flops = [sample["flops_per_second"] for sample in session.ceilings]
    copies = [sample["copy_bytes_per_second"] for sample in session.ceilings]
    native = session.found.get(NATIVE)
    return {
        **about,
        "machine": describe_machine(),
        "tokens_per_sample": work.num_tokens,
        "model_flops_per_sample": work.flops,
        "causal_flops_per_sample": work.causal_flops,
        "ceilings": {
            "gemm_flops_per_second": dataclasses.asdict(summarize(flops)),
            "copy_bytes_per_second": dataclasses.asdict(summarize(copies)),
        },
        "implementations": {
            name: _implementation(measured, native, work, flops)
            for name, measured in session.found.items()
        },
        "native_against_best_peer": _against_best_peer(session.found),
    }


def _implementation(
    measured: Measured, native: Measured | None, work: Work, ceiling: Sequence[float]
) -> dict[str, Any]:
    if measured.missing is not None:
        return {"status": f"not installed: {measured.missing}"}
    if measured.failed is not None:
        return {"status": f"failed: {measured.failed.replace('|', '/')}"}
    seconds = measured.series("seconds")
    rates = [work.flops / each for each in seconds]
    found = {
        "status": "measured",
        "seconds": seconds,
        "milliseconds": dataclasses.asdict(summarize([1e3 * each for each in seconds])),
        "tokens_per_second": dataclasses.asdict(
            summarize([work.num_tokens / each for each in seconds])
        ),
        "model_flops_per_second": dataclasses.asdict(summarize(rates)),
        "share_of_gemm_ceiling": dataclasses.asdict(paired_ratio(rates, ceiling)),
        "peak_bytes": measured.peak_bytes,
        "compared_loss": measured.loss,
        "gradient_difference": measured.gradient_difference,
    }
    if "kept_bytes_per_token" in measured.samples[0]:
        found["kept_bytes_per_token"] = measured.samples[0]["kept_bytes_per_token"]
    if native is not None:
        found["time_over_native"] = dataclasses.asdict(
            paired_ratio(seconds, native.series("seconds"))
        )
    return found


def _against_best_peer(found: Mapping[str, Measured]) -> dict[str, Any] | None:
    """Compute the speedup over the fastest peer and the memory relative to the leanest one."""
    peers = {
        name: measured
        for name, measured in found.items()
        if measured.is_present and not name.startswith(NATIVE)
    }
    if not peers or NATIVE not in found:
        return None
    native = found[NATIVE]
    name = min(peers, key=lambda peer: summarize(peers[peer].series("seconds")).median)
    speedup = paired_ratio(peers[name].series("seconds"), native.series("seconds"))
    leanest = min(peers, key=lambda peer: peers[peer].peak_bytes or 0)
    least = peers[leanest].peak_bytes
    return {
        "fastest_peer": name,
        "speedup": dataclasses.asdict(speedup),
        "leanest_peer": leanest,
        "memory_ratio": (native.peak_bytes or 0) / least if least else None,
    }


def table(found: Mapping[str, Any]) -> str:
    """Format a Markdown table, a row per implementation: medians (minimum to maximum)."""
    lines = [
        "| implementation | ms | tokens/s | TFLOP/s | of the GEMM ceiling | peak memory, GB |"
        " kept, KB per token | time / native's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["implementations"].items():
        if row["status"] != "measured":
            lines.append(f"| {name} | {row['status']} | | | | | | |")
            continue
        ratio = row.get("time_over_native")
        lines.append(
            f"| {name} | {_spread(row['milliseconds'], '.1f')} |"
            f" {row['tokens_per_second']['median']:,.0f} |"
            f" {row['model_flops_per_second']['median'] / 1e12:.3f} |"
            f" {_spread(row['share_of_gemm_ceiling'], '.0%')} | {row['peak_bytes'] / 1e9:.2f} |"
            f" {_kilobytes(row.get('kept_bytes_per_token'))} |"
            f" {_spread(ratio, '.2f') if ratio else ''} |"
        )
    return "\n".join([*lines, "", *_remarks(found)])


def _remarks(found: Mapping[str, Any]) -> list[str]:
    machine, ceilings = found["machine"], found["ceilings"]
    gemm, copy = ceilings["gemm_flops_per_second"], ceilings["copy_bytes_per_second"]
    lines = [
        f"Ceilings in the same rounds: GEMM {_spread(_scaled(gemm, 1e12), '.3f')} TFLOP/s, copy"
        f" {_spread(_scaled(copy, 1e9), '.1f')} GB/s.",
        f"{machine['date']}, {machine['gpu'] or machine['processor']}, {machine['cpu_count']}"
        f" cores ({machine['cpu_capability']}), torch {machine['torch']}, load average"
        f" {machine['load_average']:.1f}.",
    ]
    best = found["native_against_best_peer"]
    if best is not None:
        lines.append(
            f"native is {_spread(best['speedup'], '.2f')} times as fast as {best['fastest_peer']}"
            + (
                f" and takes {best['memory_ratio']:.2f} of the memory of {best['leanest_peer']}."
                if best["memory_ratio"] is not None
                else "."
            )
        )
    return lines


def _kilobytes(number: float | None) -> str:
    return "" if number is None else f"{number / 1e3:.1f}"


def _scaled(summary: Mapping[str, float], unit: float) -> dict[str, float]:
    return {key: value / unit for key, value in summary.items()}


def _spread(summary: Mapping[str, float] | Summary, form: str) -> str:
    values = dataclasses.asdict(summary) if isinstance(summary, Summary) else summary
    low, high = format(values["low"], form), format(values["high"], form)
    return f"{values['median']:{form}} ({low} to {high})"


def write_json(found: Mapping[str, Any], path: Path) -> None:
    """Write the results as JSON."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
