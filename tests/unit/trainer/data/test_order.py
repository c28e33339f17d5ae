"""Permutation, sources and blend: every window once an epoch, every prefix in proportion."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.trainer.data.blend import Blend
from megatron.trainer.data.permutation import KeyedPermutation
from megatron.trainer.data.source import MockSource, WindowSource
from megatron.trainer.errors import DataError


def source(num_tokens: int, seq_length: int = 4, seed: int = 3, name: str = "x") -> WindowSource:
    """A source whose tokens are their own positions, 10 on in the file."""
    return WindowSource(
        name=name,
        tokens=np.arange(num_tokens + 20),
        start_token=10,
        stop_token=10 + num_tokens,
        seq_length=seq_length,
        seed=seed,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    order = KeyedPermutation(n, (7,))(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 100)))
@settings(max_examples=50, deadline=None)
def test_permutation_is_a_bijection_for_any_size_and_key(n: int, key: tuple[int, int]) -> None:
    assert np.bincount(KeyedPermutation(n, key)(np.arange(n)), minlength=n).tolist() == [1] * n


def test_permutation_of_one_position_equals_that_of_all() -> None:
    order = KeyedPermutation(1000, (7, 1))
    together = order(np.arange(1000))
    assert [int(order(i)) for i in range(1000)] == together.tolist()


def test_another_key_is_another_order() -> None:
    keys = [(0,), (1,), (0, 1), (1, 0)]
    orders = [KeyedPermutation(1000, key)(np.arange(1000)) for key in keys]
    for one, other in itertools.combinations(orders, 2):
        # Two independent orders share about 1 of n places; 10 has probability 1e-7.
        assert (one == other).sum() < 10


def test_first_place_is_uniform_over_keys() -> None:
    n, draws = 10, 4000
    counts = np.zeros(n)
    for key in range(draws):
        counts[int(KeyedPermutation(n, (key,))(0))] += 1
    chi_square = ((counts - draws / n) ** 2 / (draws / n)).sum()
    # 9 degrees of freedom: mean 9; 33.7 is exceeded by chance once in 10,000. The keys are fixed.
    assert chi_square < 33.7


def test_neighbours_scatter() -> None:
    n = 4096
    order = KeyedPermutation(n, (5,))(np.arange(n))
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    # A random order has |correlation| about 1 / sqrt(n) = 0.016; 0.07 is over four sigma.
    assert abs(correlation) < 0.07
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.07


def test_permutation_memory_does_not_grow_with_n() -> None:
    order = KeyedPermutation(2**62, (1,))
    there = order(np.array([0, 1, 2**62 - 1]))
    assert len(set(there.tolist())) == 3
    assert ((there >= 0) & (there < 2**62)).all()


@pytest.mark.parametrize("i", [-1, 5])
def test_permutation_refuses_positions_outside(i: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"positions must be 0 to 4, got {i}")):
        KeyedPermutation(5, (1,))(i)


def test_permutation_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match=re.escape("n is 0; it must be 1 to 2**62")):
        KeyedPermutation(0, (1,))


def test_windows_are_consecutive_overlap_by_the_label_and_drop_the_remainder() -> None:
    # 15 tokens, 4 a window and 1 label: windows at 0, 4, 8; the 4th would need a 17th token.
    windows = [source(15).read_window(n).tolist() for n in range(3)]
    assert windows == [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18], [18, 19, 20, 21, 22]]
    assert source(15).num_windows == 3
    assert [source(n).num_windows for n in (5, 8, 9, 16, 17)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [-1, 3])
def test_there_is_no_window_past_the_end(n: int) -> None:
    with pytest.raises(IndexError, match=re.escape(f"window {n} of source 'x': it has 3")):
        source(15).read_window(n)


def test_every_epoch_visits_every_window_once_in_an_order_of_its_own() -> None:
    drawn = source(4 * 50 + 1)
    epochs = [drawn.windows_of(np.arange(50 * e, 50 * e + 50)).tolist() for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_samples_of_many_epochs_in_any_order_are_what_each_is_alone() -> None:
    drawn = source(4 * 50 + 1)
    samples = np.array([1234, 0, 49, 50, 99, 0, 51, 1234])
    alone = [int(drawn.windows_of(samples[i : i + 1])[0]) for i in range(len(samples))]
    assert drawn.windows_of(samples).tolist() == alone
    assert alone[0] == alone[-1] and alone[1] == alone[5]


def test_seed_and_name_change_the_order() -> None:
    def order(drawn: WindowSource) -> list[int]:
        return drawn.windows_of(np.arange(50)).tolist()

    base = source(201)
    assert order(base) == order(source(201))
    assert order(base) != order(source(201, seed=4))
    assert order(base) != order(source(201, name="y"))


def test_source_shorter_than_a_window_is_refused_with_both_numbers() -> None:
    message = (
        "source 'x' has 4 tokens, but one window takes 5 (--seq-length 4 and one label); a source"
        " must hold at least one window; give more data, another --split or a shorter --seq-length"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        source(4)


def test_mock_samples_follow_from_seed_and_number_and_fill_the_vocabulary() -> None:
    mock = MockSource(vocab_size=7, seq_length=500, seed=1)
    assert (
        mock.read_window(3).tolist()
        == MockSource(vocab_size=7, seq_length=500, seed=1).read_window(3).tolist()
    )
    assert mock.windows_of(np.array([3, 9])).tolist() == [3, 9]
    assert mock.read_window(3).tolist() != mock.read_window(4).tolist()
    other = MockSource(vocab_size=7, seq_length=500, seed=2)
    assert mock.read_window(3).tolist() != other.read_window(3).tolist()
    assert mock.read_window(3).shape == (501,)
    assert set(mock.read_window(3).tolist()) == set(range(7))
    assert mock.num_windows is None


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), n=st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_every_prefix_is_within_one_of_its_shares(weights: list[float], n: int) -> None:
    blend = Blend(weights)
    shares = np.array(weights) / sum(weights)
    for drawn in range(1, n + 1):
        blend.draw(1)
        # 1e-9: rounding of weight * n and of the deadlines, at most a few ulp of n = 400.
        assert np.abs(blend.counts - shares * drawn).max() < 1 + 1e-9
    assert blend.num_drawn == n


def test_blend_keeps_the_bound_where_serving_the_largest_deficit_does_not() -> None:
    weights = [22, 28, 1, 1, 1, 1]
    blend, greedy = Blend(weights), np.zeros(6)
    worst, worst_greedy = 0.0, 0.0
    for n in range(1, sum(weights) + 1):
        blend.draw(1)
        greedy[np.argmax(blend.weights * n - greedy)] += 1
        worst = max(worst, np.abs(blend.counts - blend.weights * n).max())
        worst_greedy = max(worst_greedy, np.abs(greedy - blend.weights * n).max())
    assert worst < 1
    assert worst_greedy > 1.07


def test_blend_numbers_the_samples_of_each_source_from_0() -> None:
    blend = Blend([3, 1])
    sources, numbers = blend.draw(400)
    for index, count in ((0, 300), (1, 100)):
        assert numbers[sources == index].tolist() == list(range(count))


def test_only_ratios_of_weights_matter() -> None:
    one, other = Blend([0.5, 0.25, 0.25]), Blend([2, 1, 1])
    assert np.array_equal(one.draw(200), other.draw(200))


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], [float("inf")]])
def test_weights_must_be_positive_and_finite(weights: list[float]) -> None:
    message = (
        f"blend weights are {weights}; there must be at least one, each positive and finite; leave"
        " a source out instead of giving it weight 0"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        Blend(weights)


def test_window_outside_the_vocabulary_is_refused_where_it_is_drawn() -> None:
    source = WindowSource(
        name="web",
        tokens=np.array([1, 2, 3, 4, 99, 5, 6, 7, 8], dtype=np.uint16),
        start_token=0,
        stop_token=9,
        seq_length=4,
        seed=0,
        vocab_size=50,
    )
    message = "source 'web': token 4 has id 99, but the vocabulary has 50 ids"
    for n in (0, 1):  # the label of the first window, the first token of the second
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            source.read_window(n)
        assert caught.value.is_local


def test_weights_whose_sum_overflows_are_drawn_evenly() -> None:
    blend = Blend([1e308, 1e308])
    assert blend.weights.tolist() == [0.5, 0.5]
    blend.draw(10)
    assert blend.counts.tolist() == [5, 5]
