"""Compares the arithmetic of benchmarks with references: figures, digests, what is left out."""

import math
import re

import pytest
import torch

from benchmarks.ceilings import build_ceilings
from benchmarks.digests import digest, largest_difference
from benchmarks.report import Work, results, table
from benchmarks.session import DifferentMathsError, Measured, Plan, Session
from benchmarks.timing import interleave, paired_ratio, summarize
from benchmarks.workers import Entry

CPU = torch.device("cpu")


def test_summary_is_median_and_extremes() -> None:
    odd, even = summarize([3.0, 1.0, 2.0]), summarize([4.0, 1.0, 2.0, 3.0])
    assert (odd.median, odd.low, odd.high) == (2.0, 1.0, 3.0)
    assert even.median == 2.5
    with pytest.raises(ValueError, match=re.escape("use at least 1 round")):
        summarize([])


def test_paired_ratio_is_unaffected_by_load_on_both() -> None:
    load = [1.0, 7.0, 3.0]
    found = paired_ratio([2.0 * x for x in load], [1.0 * x for x in load])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match=re.escape("2 measurements against 1")):
        paired_ratio([1.0, 2.0], [1.0])


def test_every_round_visits_all_and_rotates_the_order() -> None:
    visits = list(interleave(["a", "b", "c"], 4))
    rounds = [[name for number, name in visits if number == each] for each in range(4)]
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 4
    assert [names[0] for names in rounds] == ["a", "b", "c", "a"]


def test_digest_of_a_tensor_equals_that_of_its_parts() -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    parts = [("w", 0, rows[:4]), ("w", 4, rows[4:])]
    norm, *products = digest(parts)["w"]
    assert norm == pytest.approx(rows.norm().item(), rel=1e-6)
    of_parts = [digest([part])["w"][1:] for part in parts]
    assert products == pytest.approx([sum(pair) for pair in zip(*of_parts, strict=True)])


def test_digests_measure_the_distance_of_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    expected = torch.randn(1000, generator=generator)
    for share in (1e-3, 1e-1):
        changed = expected + share * torch.randn(1000, generator=generator)
        found, name = largest_difference(digest([("w", 0, changed)]), digest([("w", 0, expected)]))
        # A product with a random vector is off by a normal number of that deviation.
        assert share / 10 < found < share * 4
        assert name == "w"
    assert largest_difference(digest([("w", 0, expected)]), digest([("w", 0, expected)]))[0] == 0


def test_wrong_sign_order_or_nan_gives_a_large_difference() -> None:
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(5))
    expected = digest([("w", 0, rows)])
    for wrong in (-rows, rows.flip(0), rows * 2):
        assert largest_difference(digest([("w", 0, wrong)]), expected)[0] > 0.1
    broken = rows.clone()
    broken[0, 0] = math.nan
    assert largest_difference(digest([("w", 0, broken)]), expected)[0] == math.inf
    with pytest.raises(ValueError, match=re.escape("only one side has v, w")):
        largest_difference(digest([("v", 0, rows)]), expected)


def fake_session(**samples: list[float]) -> Session:
    entries = {name: Entry(build_ceilings, ()) for name in samples}
    session = Session(
        Plan(entries=entries, device=CPU, dtype=torch.float32, rounds=2, warmup=0, gemm_size=8)
    )
    for name, seconds in samples.items():
        session.found[name] = Measured(
            samples=[{"seconds": each} for each in seconds], peak_bytes=1000 * len(name)
        )
    session.ceilings = [
        {"flops_per_second": rate, "copy_bytes_per_second": 1e9} for rate in (1e12, 2e12)
    ]
    return session


def test_report_takes_ratios_round_by_round() -> None:
    session = fake_session(native=[1.0, 2.0], slow=[3.0, 8.0], quick=[2.0, 3.0])
    session.found["absent"] = Measured(missing="some_package")
    found = results(session, Work(num_tokens=100, flops=5e11, causal_flops=4e11))
    native = found["implementations"]["native"]
    assert native["share_of_gemm_ceiling"] == {"median": 0.3125, "low": 0.125, "high": 0.5}
    assert native["tokens_per_second"]["high"] == 100
    slow = found["implementations"]["slow"]
    assert slow["time_over_native"] == {"median": 3.5, "low": 3.0, "high": 4.0}
    best = found["native_against_best_peer"]
    assert best["fastest_peer"] == "quick"
    assert best["speedup"] == {"median": 1.75, "low": 1.5, "high": 2.0}
    assert (best["leanest_peer"], best["memory_ratio"]) == ("slow", 1.5)
    printed = table(found)
    assert "| absent | not installed: some_package |" in printed
    assert "native is 1.75 (1.50 to 2.00) times as fast as quick" in printed


def test_different_results_are_not_timed() -> None:
    session = fake_session(native=[], peer=[])
    rows = torch.ones(4, 4)
    digests = {"native": digest([("w", 0, rows)]), "peer": digest([("w", 0, rows)])}
    session.found["native"].loss = session.found["peer"].loss = 2.0
    session._compare_pair("native", "peer", digests)
    assert session.found["native"].gradient_difference == 0
    assert session._reference(digests) == "peer"
    digests["native"] = digest([("w", 0, 1.01 * rows)])
    with pytest.raises(DifferentMathsError, match="No peer computes what native does"):
        session._reference(digests)
    with pytest.raises(DifferentMathsError, match=re.escape("the gradient of w of native differs")):
        session._compare_pair("native", "peer", digests)
    session.found["native"].loss = 2.001
    with pytest.raises(DifferentMathsError, match=re.escape("the loss of native is 2.001, that")):
        session._compare_pair("native", "peer", digests)
    session.found["native"].loss = math.nan
    with pytest.raises(DifferentMathsError, match=re.escape("the loss of native is nan")):
        session._compare_pair("native", "peer", digests)


@pytest.mark.parametrize(
    "names", [("native", "wrong", "other", "right"), ("right", "wrong", "other")]
)
def test_peer_that_computes_something_else_is_left_out_by_name(names: tuple[str, ...]) -> None:
    """Compares with native, or without it with the first peer."""
    session = fake_session(**{name: [] for name in names})
    rows = torch.ones(4, 4)
    digests = {name: digest([("w", 0, rows)]) for name in names}
    digests["wrong"] = digest([("w", 0, 1.01 * rows)])
    digests["other"] = digest([("v", 0, rows)])
    for name in names:
        session.found[name].loss = 2.0
    assert session._reference(digests) == "right"
    assert session._present() == [name for name in names if name in ("native", "right")]
    failed = session.found["wrong"].failed
    assert failed is not None and f"of {names[0]} differs from that of wrong by 0.00" in failed
    assert "only one side has v, w" in str(session.found["other"].failed)
