"""Sampler: exact shares in each phase, sources that span phases, resumes and branches."""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.data.batch import Batch
from megatron.trainer.data.phase_records import read_records
from megatron.trainer.data.sampler import Phase, Sampler
from megatron.trainer.data.source import WindowSource
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.errors import DataError

S = 4
WINDOWS = {"web": 50, "code": 17, "math": 9}
SIZES: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2}
ALONE: dict[str, Any] = {**SIZES, "data_parallel_rank": 0, "data_parallel_size": 1}

STABLE = Phase(name="stable", sources=("web", "code"), weights=(0.7, 0.3), num_samples=48)
DECAY = Phase(
    name="decay", sources=("web", "code", "math"), weights=(40.0, 23.4, 36.3), num_samples=40
)


def source(name: str, windows: int, seed: int) -> WindowSource:
    first = 1000 * sorted(WINDOWS).index(name)
    tokens = windows * S + 1
    return WindowSource(
        name=name,
        tokens=np.arange(first, first + tokens),
        start_token=0,
        stop_token=tokens,
        seq_length=S,
        seed=seed,
    )


def stream(
    *phases: Phase, seed: int = 3, windows: dict[str, int] | None = None, seq_length: int = S
) -> SampleStream:
    sizes = {**WINDOWS, **(windows or {})}
    sources = [source(name, count, seed) for name, count in sizes.items()]
    return SampleStream(sources, phases or (STABLE, DECAY), seq_length=seq_length, seed=seed)


def ids(batches: list[Batch]) -> list[int]:
    """The first token of each window, which names it."""
    return [int(first) for batch in batches for first in batch.tokens[:, 0]]


def draw_samples(sampler: Sampler, n: int) -> list[tuple[str, int]]:
    """Source name and number of the next n samples."""
    sources, numbers = sampler.draw(n)
    return [(sampler.names[s], int(number)) for s, number in zip(sources, numbers, strict=True)]


def draw(drawn: SampleStream, steps: int, **sizes: Any) -> list[int]:
    return [id_ for _ in range(steps) for id_ in ids(drawn.next_global_batch(**{**ALONE, **sizes}))]


def moved(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint hands it over."""
    return dict(json.loads(json.dumps(state)))


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(
        st.lists(st.floats(0.01, 100), min_size=1, max_size=5), min_size=4, max_size=4
    ),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_prefix_of_every_phase_is_within_one_of_its_shares(
    lengths: list[int], weights: list[list[float]]
) -> None:
    phases = [
        Phase(
            name=str(index),
            sources=tuple(f"s{n}" for n in range(len(parts))),
            weights=tuple(parts),
            num_samples=length,
        )
        for index, (length, parts) in enumerate(zip(lengths, weights, strict=False))
    ]
    sampler = Sampler(phases, seed=1, windows={f"s{n}": 7 for n in range(5)})
    numbers: Counter[str] = Counter()
    for phase in phases:
        drawn: Counter[str] = Counter()
        for n in range(1, (phase.num_samples or 0) + 1):
            ((name, number),) = draw_samples(sampler, 1)
            assert sampler.phase is phase
            # Numbered over all phases without a gap: nothing is lost or drawn twice.
            assert number == numbers[name]
            numbers[name] += 1
            drawn[name] += 1
            for source_name, weight in zip(phase.sources, phase.weights, strict=True):
                share = weight / sum(phase.weights)
                # 1e-9 for the rounding of weight * n, as in the blend's own test.
                assert abs(drawn[source_name] - share * n) < 1 + 1e-9
    assert sampler.drawn_per_source() == {
        name: numbers[name]
        for name in dict.fromkeys(name for phase in phases for name in phase.sources)
    }
    with pytest.raises(
        DataError, match=f"^all {len(phases)} phases are used up after {sum(lengths)}"
    ):
        sampler.draw(1)


def test_no_window_is_drawn_twice_in_an_epoch_across_phases() -> None:
    drawn = draw(stream(), 11)
    per_source = [[id_ for id_ in drawn if id_ // 1000 == n] for n in range(3)]
    assert [len(found) for found in per_source] == [14 + 9, 15, 34 + 16]
    for name, found in zip(sorted(WINDOWS), per_source, strict=True):
        windows = WINDOWS[name]
        for start in range(0, len(found), windows):
            epoch = found[start : start + windows]
            assert len(set(epoch)) == len(epoch)
    # Web is through exactly once, although its last windows came in the other phase.
    assert sorted(per_source[2]) == list(range(2000, 2200, 4))


def test_phase_changes_between_two_steps_and_is_named() -> None:
    drawn = stream()
    names = []
    for _ in range(11):
        drawn.next_global_batch(**ALONE)
        names.append(drawn.phase)
    assert names == ["stable"] * 6 + ["decay"] * 5


@pytest.mark.parametrize("stop", range(12))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_resume_anywhere_on_any_number_of_ranks_continues_alike(stop: int, size: int) -> None:
    """Both sides of every border are among the stops."""
    whole = stream()
    expected = draw(whole, 11)
    first = stream()
    found = draw(first, stop)
    ranks = [stream() for _ in range(size)]
    assert [rank.load_state_dict(moved(first.state_dict())) for rank in ranks] == [[]] * size
    for _ in range(stop, 11):
        parts = [
            rank.next_global_batch(**SIZES, data_parallel_rank=number, data_parallel_size=size)
            for number, rank in enumerate(ranks)
        ]
        for index in range(4):
            found += ids([parts[index % size][index // size]])
    assert found == expected
    assert [rank.state_dict() for rank in ranks] == [whole.state_dict()] * size


def test_global_batch_may_span_two_phases_and_loses_nothing() -> None:
    alone, large = stream(), stream()
    assert draw(large, 5, global_batch_size=16) == draw(alone, 10)


def test_counts_are_kept_by_phase_and_over_the_run() -> None:
    drawn = stream()
    draw(drawn, 8)
    state = drawn.state_dict()
    assert [record["consumed"] for record in state["phases"]] == [[34, 14], [6, 4, 6]]
    assert state["consumed_samples"] == 64
    assert drawn.consumed_per_source() == {"web": 40, "code": 18, "math": 6}
    assert state["consumed_per_source"] == drawn.consumed_per_source()


def after(steps: int, *phases: Phase, **changes: Any) -> dict[str, Any]:
    drawn = stream(*phases, **changes)
    draw(drawn, steps)
    return moved(drawn.state_dict())


def changed(phase: Phase, **fields: Any) -> Phase:
    return Phase(**{**vars(phase), **fields})


@pytest.mark.parametrize(
    ("steps", "phases", "difference"),
    [
        (
            3,
            (changed(STABLE, weights=(0.5, 0.5)), DECAY),
            "phase 1 (stable) weights: checkpoint [0.7, 0.3], this run [0.5, 0.5]",
        ),
        (
            8,
            (changed(STABLE, sources=("code", "web")), DECAY),
            "phase 1 (stable) sources: checkpoint ['web', 'code'], this run ['code', 'web'];"
            " phase 1 (stable) windows_per_epoch: checkpoint [50, 17], this run [17, 50]",
        ),
        (
            8,
            (changed(STABLE, num_samples=56), DECAY),
            "phase 1 (stable) num_samples: checkpoint 48, this run 56",
        ),
        (
            3,
            (changed(STABLE, num_samples=16), DECAY),
            "phase 1 (stable) num_samples: the checkpoint has drawn 24, this run 16",
        ),
        (
            8,
            (changed(STABLE, num_samples=88),),
            "phase 1 (stable) num_samples: checkpoint 48, this run 88;"
            " phase 2 (decay) has drawn 16 samples, this run has no such phase",
        ),
    ],
)
def test_resume_that_changes_what_was_drawn_is_refused(
    steps: int, phases: tuple[Phase, ...], difference: str
) -> None:
    message = (
        f"the checkpoint was trained on other data: {difference}; a resumed run must read the same"
        " samples; restore the data flags, or start the data anew with --finetune"
    )
    other = stream(*phases)
    before = other.state_dict()
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        other.load_state_dict(after(steps))
    assert other.state_dict() == before


def test_resume_under_another_seed_or_with_a_changed_file_is_refused() -> None:
    with pytest.raises(DataError, match="seed: checkpoint 3, this run 4; a resumed"):
        stream(seed=4).load_state_dict(after(8))
    with pytest.raises(DataError, match=r"windows_per_epoch: checkpoint \[50, 17\], this run \[51"):
        stream(windows={"web": 51}).load_state_dict(after(3))


def test_future_phases_may_change_and_the_change_is_reported() -> None:
    """At the border and before it; the stable phase may be made longer as long as it lasts."""
    for steps in (3, 6):
        longer = changed(STABLE, num_samples=56)
        other = changed(DECAY, weights=(1.0, 1.0, 2.0), num_samples=32)
        drawn = stream(longer, other)
        assert drawn.load_state_dict(after(steps)) == [
            "planned by the checkpoint: stable (48 samples: 0.7 web, 0.3 code); decay (40 samples:"
            " 0.4012 web, 0.2347 code, 0.3641 math)",
            "planned by this run: stable (56 samples: 0.7 web, 0.3 code); decay (32 samples:"
            " 0.25 web, 0.25 code, 0.5 math)",
        ]
        assert draw(drawn, 11 - steps) == draw(stream(longer, other), 11)[8 * steps :]


def test_phases_can_follow_a_run_that_had_none() -> None:
    plain = Phase(sources=("web", "code"), weights=(0.7, 0.3))
    drawn = stream()
    assert drawn.load_state_dict(after(6, plain))
    assert draw(drawn, 5) == draw(stream(), 11)[48:]


def test_branch_under_the_same_seed_continues_where_the_trunk_stopped() -> None:
    """Trunk and branch together are the run with both phases, to the sample."""
    plain = Phase(sources=("web", "code"), weights=(0.7, 0.3))
    branch = stream(changed(DECAY, name=None))
    assert branch.inherit(after(6, plain)) == [
        "web: continues at sample 34",
        "code: continues at sample 14",
        "math: from its first sample",
    ]
    assert draw(branch, 5) == draw(stream(), 11)[48:]
    assert branch.consumed_samples == 88
    assert branch.consumed_per_source() == {"web": 50, "code": 23, "math": 15}


def test_branch_under_another_seed_is_shuffled_anew_and_keeps_the_counts() -> None:
    branch = stream(DECAY, seed=42)
    assert branch.inherit(after(6)) == [
        "web: from its first sample",
        "code: from its first sample",
        "math: from its first sample",
    ]
    assert draw(branch, 5) == draw(stream(DECAY, seed=42), 5)
    assert branch.consumed_samples == 88
    same = stream(DECAY)
    same.inherit(after(6))
    assert draw(same, 5) != draw(stream(DECAY, seed=42), 5)


@pytest.mark.parametrize("seed", [3, 42])
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_resumed_branch_continues_identically(seed: int, stop: int) -> None:
    whole, first, rest = (stream(DECAY, seed=seed) for _ in range(3))
    whole.inherit(after(6))
    first.inherit(after(6))
    expected = draw(whole, 5)
    assert draw(first, stop) == expected[: 8 * stop]
    assert rest.load_state_dict(moved(first.state_dict())) == []
    assert draw(rest, 5 - stop) == expected[8 * stop :]
    assert rest.state_dict() == whole.state_dict()


def test_branch_of_a_branch_continues_after_both() -> None:
    trunk = after(6)
    one = stream(changed(DECAY, num_samples=24))
    one.inherit(trunk)
    draw(one, 3)
    two = stream(changed(DECAY, num_samples=16))
    assert two.inherit(moved(one.state_dict()))[0] == "web: continues at sample 44"
    assert [record["inherited"] for record in two.state_dict()["phases"]] == [True, True, False]
    assert two.consumed_samples == 72


def test_branch_over_a_changed_file_or_length_is_refused() -> None:
    message = (
        "source 'web' had 50 windows per epoch in the run that is branched from, here it has 51; a"
        " source that continues must be the same; restore it, or shuffle anew with another --seed"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        stream(DECAY, windows={"web": 51}).inherit(after(6))
    assert stream(DECAY, windows={"web": 51}, seed=42).inherit(after(6))
    state = {**after(6), "seq_length": 8}
    with pytest.raises(DataError, match="seq_length: checkpoint 8, this run 4"):
        stream(DECAY).inherit(state)


def test_state_whose_phases_begin_out_of_order_is_refused() -> None:
    state = after(8)
    state["phases"][0]["consumed"] = [0, 0]
    state["consumed_samples"] = 16
    with pytest.raises(DataError, match="phases must begin in order"):
        stream().load_state_dict(state)


@pytest.mark.parametrize(
    "phases",
    [[], [changed(STABLE, num_samples=None), DECAY], [changed(STABLE, num_samples=0)]],
)
def test_phases_that_cannot_be_drawn_are_refused(phases: list[Phase]) -> None:
    with pytest.raises(ValueError, match="phase"):
        Sampler(phases, seed=1, windows=WINDOWS)


def test_what_was_read_on_both_sides_of_a_border_can_be_skipped() -> None:
    """web and code are in both phases, math in the second alone; the numbers of samples tell."""

    def sampler(state: list[dict[str, Any]] | None = None) -> Sampler:
        made = Sampler((STABLE, DECAY), seed=3, windows=WINDOWS)
        if state is not None:
            total = sum(sum(record["consumed"]) for record in state)
            made.load_state_dict(read_records({"phases": state, "consumed_samples": total}))
        return made

    first = sampler()
    first.draw(32)
    saved, kept = json.loads(json.dumps(first.state_dict())), first.drawn_per_source()
    read = draw_samples(first, 32)
    assert {name for name, _ in read[:16]} == {"web", "code"} and ("math", 0) in read

    again = sampler(saved)
    read_to = first.drawn_per_source()
    again.skip({name: count - kept.get(name, 0) for name, count in read_to.items()})
    assert again.drawn_per_source() == read_to
    drawn = draw_samples(again, 8)
    # Saved and resumed, too, before the second phase begins.
    resumed = sampler(json.loads(json.dumps(again.state_dict())))
    rest = draw_samples(resumed, 48)
    assert draw_samples(again, 48) == rest
    # Every source continues right after what was read.
    for name, count in read_to.items():
        numbers = [number for other, number in drawn + rest if other == name]
        assert numbers == list(range(count, count + len(numbers)))
    # Both phases have their length, and their shares.
    assert resumed.phase.name == "decay"
    for phase, samples in zip(resumed.state_dict(), (48, 40), strict=True):
        fresh = np.subtract(phase["consumed"], phase["left_out"])
        assert fresh.sum() == samples
        assert np.abs(fresh - samples * np.array(phase["weights"])).max() < 1
    with pytest.raises(DataError, match="phases are used up"):
        resumed.draw(1)


@pytest.mark.parametrize("left_out", [8, [8], [-1, 0], [0, 99], [True, 0], "12"])
def test_state_that_skips_what_cannot_be_is_refused(left_out: Any) -> None:
    state = after(4)
    state["phases"][0]["left_out"] = left_out
    with pytest.raises(DataError, match="the checkpoint's data state has phases"):
        stream().load_state_dict(state)
