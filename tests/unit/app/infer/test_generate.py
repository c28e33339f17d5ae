"""Compare sampling with plain loops over probabilities, and generation with a toy model."""

import math
import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron.trainer.errors import CheckpointError, ConfigError
from megatron.trainer.inference.decode import Prompt, generate
from megatron.trainer.inference.sampling import TokenSampler, greedy_token, next_token

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.3, -4.0, 1.1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_nucleus(
    logits: list[float], temperature: float, top_p: float, top_k: int | None = None
) -> dict[int, float]:
    """Return the probabilities of the tokens that may be drawn, adding one token at a time."""
    least = sorted(logits, reverse=True)[:top_k][-1]  # no two logits at the cut are equal
    weights = [math.exp(logit / temperature) * (logit >= least) for logit in logits]
    probs = [weight / sum(weights) for weight in weights]
    kept: dict[int, float] = {}
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if sum(kept.values()) >= top_p or probs[token] == 0.0:
            break
        kept[token] = probs[token]
    return {token: prob / sum(kept.values()) for token, prob in kept.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [None, 2, 5])
def test_draws_follow_the_renormalised_nucleus(
    temperature: float, top_p: float, top_k: int | None
) -> None:
    expected = reference_nucleus(LOGITS.tolist(), temperature, top_p, top_k)
    generator, draws = seeded(3), 1000
    counts = Counter(
        next_token(LOGITS, temperature=temperature, top_p=top_p, top_k=top_k, generator=generator)
        for _ in range(draws)
    )
    assert counts.keys() <= expected.keys()
    for token, prob in expected.items():
        # Five standard deviations of a binomial count: one such test in a million fails by chance.
        slack = 5 * math.sqrt(draws * prob * (1 - prob))
        assert abs(counts[token] - draws * prob) <= slack


def test_nucleus_is_the_smallest_set_reaching_top_p() -> None:
    # Four equal tokens of 1/4, exact in binary.
    for top_p, size in ((0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)):
        generator = seeded(0)
        drawn = {
            next_token(torch.zeros(4), temperature=1.0, top_p=top_p, generator=generator)
            for _ in range(200)
        }
        assert drawn == set(range(size))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_temperature_towards_zero_is_the_argmax(temperature: float) -> None:
    for seed in range(20):
        logits = torch.randn(50, generator=seeded(seed))
        token = next_token(logits, temperature=temperature, top_p=1.0, generator=seeded(seed))
        assert token == max(range(50), key=logits.tolist().__getitem__) == greedy_token(logits)


def test_greedy_breaks_ties_by_the_lowest_id() -> None:
    assert greedy_token(torch.tensor([1.0, 3.0, 3.0, 2.0])) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_depend_only_on_values_and_seed(dtype: torch.dtype) -> None:
    logits = torch.randn(1000, generator=seeded(1)).to(torch.bfloat16)

    def draw(values: Tensor, seed: int) -> list[int]:
        generator = seeded(seed)
        return [
            next_token(values, temperature=1.0, top_p=1.0, generator=generator) for _ in range(20)
        ]

    assert draw(logits.to(dtype), 5) == draw(logits.double(), 5)
    assert draw(logits, 5) != draw(logits, 6)
    assert len(set(draw(logits, 5))) > 5  # the generator advances


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_out_of_range_is_refused(temperature: float) -> None:
    message = (
        f"--temperature is {temperature}; it must be a finite number above 0; use 0.8, for"
        " example, or --greedy for the likeliest token each time"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        next_token(LOGITS, temperature=temperature, top_p=1.0, generator=seeded(0))


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, math.nan])
def test_top_p_out_of_range_is_refused(top_p: float) -> None:
    message = (
        f"--top-p is {top_p}; it must be above 0 and at most 1; use 0.95, for example, or 1 to"
        " draw from all tokens"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        next_token(LOGITS, temperature=1.0, top_p=top_p, generator=seeded(0))


@pytest.mark.parametrize("top_k", [0, -3])
def test_top_k_out_of_range_is_refused(top_k: int) -> None:
    message = (
        f"--top-k is {top_k}; it must be at least 1; use 50, for example, or leave it out to draw"
        " from all tokens"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        next_token(LOGITS, temperature=1.0, top_p=1.0, top_k=top_k, generator=seeded(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused(bad: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    message = (
        "1 of 3 logits are not finite; a valid model gives finite ones, so its weights are corrupt;"
        " take an earlier checkpoint with --ckpt-step"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        greedy_token(logits)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        next_token(logits, temperature=1.0, top_p=1.0, generator=seeded(0))


class SumModel:
    """Predicts the sum of the tokens up to `last`, modulo v, remembering them by position.

    Logits are [b, v + 2], and the two padding rows have the largest of all.
    """

    def __init__(self, vocab_size: int, *, rows: int = 1) -> None:
        self.vocab_size = vocab_size
        self.memory = torch.zeros(rows, 100, dtype=torch.int64)
        self.widths: list[int] = []
        self.non_finite_row: int | None = None

    def next_logits(self, tokens: Tensor, position_ids: Tensor, last: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64 and tokens.shape == position_ids.shape
        assert not torch.is_grad_enabled()
        self.widths.append(tokens.shape[1])
        self.memory.scatter_(1, position_ids, tokens)
        ends = position_ids.gather(1, last[:, None])  # [b, 1]
        seen = torch.arange(self.memory.shape[1]) <= ends  # [b, 100]
        wanted = (self.memory * seen).sum(dim=1) % self.vocab_size  # [b]
        logits = torch.zeros(len(tokens), self.vocab_size + 2)
        logits.scatter_(1, wanted[:, None], 5.0)
        logits[:, self.vocab_size :] = 9.0
        if self.non_finite_row is not None:
            logits[self.non_finite_row, :3] = math.nan
        return logits

    def broadcast(self, values: list[int] | None, *, count: int) -> list[int]:
        assert values is not None and len(values) == count
        return values

    def all_reduce_max(self, values: list[int]) -> list[int]:
        return values


def prompt_of(ids: list[int], count: int, sample: TokenSampler = greedy_token) -> Prompt:
    return Prompt(ids=ids, sample=sample, max_new_tokens=count)


def reference_continuation(
    prompt: list[int], vocab_size: int, count: int, stop_id: int
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(sum(tokens) % vocab_size)
        if tokens[-1] == stop_id:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("stop_id", [0, 4, 99])
def test_generation_matches_a_plain_loop(count: int, stop_id: int) -> None:
    prompt, vocab_size = [3, 1, 3], 11
    model = SumModel(vocab_size)
    (new,) = generate(model, [prompt_of(prompt, count)], stop_ids={stop_id}, vocab_size=vocab_size)
    assert new == reference_continuation(prompt, vocab_size, count, stop_id)
    assert model.widths == [3] + [1] * (len(new) - 1)  # no token is computed twice


@pytest.mark.parametrize("stop_id", [0, 4, 99])
def test_batched_rows_match_rows_generated_alone(stop_id: int) -> None:
    prompts = [[3, 1, 3], [7], [2, 2, 2, 2, 2, 2], [5, 5]]
    counts = [4, 9, 1, 0]
    model = SumModel(11, rows=4)
    found = generate(
        model,
        [prompt_of(ids, count) for ids, count in zip(prompts, counts, strict=True)],
        stop_ids={stop_id},
        vocab_size=11,
    )
    for ids, count, new in zip(prompts, counts, found, strict=True):
        assert new == reference_continuation(ids, 11, count, stop_id)
    # The batch ends with its longest row, at most one token a pass.
    assert len(model.widths) == max(1, *(len(new) for new in found))


def test_vocabulary_padding_is_never_sampled() -> None:
    generator = seeded(2)

    def draw(logits: Tensor) -> int:
        return next_token(logits, temperature=50.0, top_p=1.0, generator=generator)

    (new,) = generate(SumModel(6), [prompt_of([1], 90, draw)], stop_ids=(), vocab_size=6)
    assert set(new) == set(range(6))


def test_batch_with_non_finite_logits_is_refused() -> None:
    model = SumModel(6, rows=2)
    model.non_finite_row = 1
    prompts = [prompt_of([1], 3), prompt_of([2], 3)]
    with pytest.raises(CheckpointError, match=re.escape("3 of 6 logits are not finite")):
        generate(model, prompts, stop_ids=(), vocab_size=6)
