"""What is drawn and read, against the same drawn one sample after the other."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.data.blend import Blend
from megatron.trainer.data.permutation import KeyedPermutation
from megatron.trainer.data.read_ahead import Loading
from megatron.trainer.data.sampler import Phase, Sampler
from megatron.trainer.data.source import WindowSource
from megatron.trainer.data.stream import SampleStream

S = 2
WINDOWS = {"a": 5, "b": 13, "c": 3, "d": 1}
SEED = 7

Counts = npt.NDArray[np.int64]


def next_source(weights: npt.NDArray[np.float64], counts: Counts) -> int:
    """The source with the earliest deadline among those that may be drawn."""
    may = counts < weights * (counts.sum() + 1)
    return int(np.argmin(np.where(may, (counts + 1) / weights, np.inf)))


def one_by_one(
    phases: Sequence[Phase], before: Counter[str], skipped: Sequence[Counter[str]] = ()
) -> Iterator[tuple[str, int]]:
    """Source and number of every sample of a run whose sources were drawn from before."""
    drawn = Counter(before)
    for phase, skip in zip(phases, skipped or [Counter[str]()] * len(phases), strict=True):
        weights = Blend(phase.weights).weights
        counts = np.zeros(len(weights), dtype=np.int64)
        drawn.update({name: skip[name] for name in phase.sources})
        for _ in range(phase.num_samples or 0):
            source = next_source(weights, counts)
            counts[source] += 1
            name = phase.sources[source]
            yield name, drawn[name]
            drawn[name] += 1


weights = st.one_of(
    st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=12),
    st.lists(st.integers(1, 6).map(float), min_size=1, max_size=12),  # many equal deadlines
)


@given(
    weights=weights,
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    start=st.sampled_from([0, 1, 1000, 10**9, 10**12]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_blend_draws_what_the_rule_draws_one_by_one(
    weights: list[float], sizes: list[int], start: int
) -> None:
    blend = Blend(weights)
    blend.counts = np.floor(blend.weights * start).astype(np.int64)
    counts = blend.counts.copy()
    for size in sizes:
        expected = []
        for _ in range(size):
            source = next_source(blend.weights, counts)
            expected.append((source, int(counts[source])))
            counts[source] += 1
        sources, numbers = blend.draw(size)
        assert list(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected
        assert blend.counts.tolist() == counts.tolist()


def test_blend_of_counts_that_no_draw_leads_to_takes_bounded_memory() -> None:
    blend = Blend([1.0, 1.0])
    blend.counts = np.array([1 << 40, 0])
    sources, numbers = blend.draw(5)
    assert (sources.tolist(), numbers.tolist()) == ([1] * 5, list(range(5)))


def random_phases(rng: random.Random) -> list[Phase]:
    phases = []
    for index in range(rng.randint(1, 3)):
        names = rng.sample(list(WINDOWS), rng.randint(1, 4))
        shares = tuple(rng.choice([1.0, rng.uniform(0.01, 10)]) for _ in names)
        length = 8 * rng.randint(1, 5)
        phases.append(
            Phase(name=str(index), sources=tuple(names), weights=shares, num_samples=length)
        )
    return phases


def branch_from(trunk: list[Phase], sampler: Sampler) -> Counter[str]:
    """Let a sampler begin after a trunk; what was drawn of each source by then."""
    first = Sampler(trunk, seed=SEED, windows=WINDOWS)
    first.draw(sum(phase.num_samples or 0 for phase in trunk))
    sampler.inherit(first.state_dict())
    return Counter(name for name, _ in one_by_one(trunk, Counter()))


def skip_some(sampler: Sampler, phases: list[Phase], rng: random.Random) -> list[Counter[str]]:
    """Skip samples of each source; how many of which in which phase."""
    skip = {name: rng.randint(0, 9) for name in WINDOWS}
    sampler.skip(skip)
    skipped = [Counter[str]() for _ in phases]
    for name, count in skip.items():
        index = next((i for i, phase in enumerate(phases) if name in phase.sources), None)
        if index is not None:
            skipped[index][name] = count
    return skipped


@pytest.mark.parametrize("seed", range(60))
def test_sampler_draws_in_any_pieces_what_is_drawn_one_by_one(seed: int) -> None:
    """Whole runs and branches, skipped samples, and a resume after every piece."""
    rng = random.Random(seed)
    phases = random_phases(rng)
    sampler = Sampler(phases, seed=SEED, windows=WINDOWS)
    before = branch_from(random_phases(rng), sampler) if seed % 2 else Counter[str]()
    skipped = skip_some(sampler, phases, rng) if seed % 3 else [Counter[str]() for _ in phases]
    expected = list(one_by_one(phases, before, skipped))
    found: list[tuple[str, int]] = []
    while len(found) < len(expected):
        sources, numbers = sampler.draw(min(rng.randint(0, 40), len(expected) - len(found)))
        found += [(sampler.names[s], int(n)) for s, n in zip(sources, numbers, strict=True)]
        state = json.loads(json.dumps(sampler.state_dict()))
        sampler = Sampler(phases, seed=SEED, windows=WINDOWS)
        sampler.load_state_dict(state)
    assert found == expected


def source(name: str) -> WindowSource:
    first, tokens = 1000 * list(WINDOWS).index(name), WINDOWS[name] * S + 1
    return WindowSource(
        name=name,
        tokens=np.arange(first, first + tokens, dtype=np.uint16),
        start_token=0,
        stop_token=tokens,
        seq_length=S,
        seed=SEED,
    )


def window_one_by_one(name: str, number: int) -> list[int]:
    epoch, position = divmod(number, WINDOWS[name])
    order = KeyedPermutation(WINDOWS[name], (SEED, epoch, name))
    return source(name).read_window(int(order(position))).tolist()


@pytest.mark.parametrize("num_ahead", [0, 1, 3])
@pytest.mark.parametrize(("micro_batch_size", "data_parallel_size"), [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_read_what_is_read_one_by_one(
    seed: int, micro_batch_size: int, data_parallel_size: int, num_ahead: int
) -> None:
    """Over several epochs of each source, whatever the layout; counts agree after every step."""
    phases = random_phases(random.Random(seed))
    streams = [
        SampleStream(
            [source(name) for name in WINDOWS],
            phases,
            seq_length=S,
            seed=SEED,
            loading=Loading(num_ahead=num_ahead),
        )
        for _ in range(data_parallel_size)
    ]
    sizes: dict[str, Any] = {
        "global_batch_size": 8,
        "micro_batch_size": micro_batch_size,
        "data_parallel_size": data_parallel_size,
    }
    expected = [window_one_by_one(*sample) for sample in one_by_one(phases, Counter())]
    for start in range(0, len(expected), 8):
        parts = [
            stream.next_global_batch(**sizes, data_parallel_rank=rank)
            for rank, stream in enumerate(streams)
        ]
        rows = [
            [*tokens, labels[-1]]
            for batches in zip(*parts, strict=True)
            for batch in batches
            for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        ]
        assert rows == expected[start : start + 8]
        assert [stream.consumed_samples for stream in streams] == [start + 8] * len(streams)
    assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
