"""Passes that remember, against passes over the whole sequence and against transformers."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron.trainer.config.parallel_layout import resolve_layout
from megatron.trainer.config.schema import ParallelConfig
from megatron.trainer.inference.decode import Prompt, cache_capacity, generate
from megatron.trainer.inference.parallel_model import ParallelModel
from megatron.trainer.inference.sampling import greedy_token, next_token
from megatron.trainer.runtime.launch import RunContext
from moe_app.infer.open_model import CachedModel, LoadedModel
from moe_ext.attention.cache import KeyValueCache
from moe_ext.attention.core import use_cache
from moe_ext.builder import build_model
from moe_ext.config import MoEModelConfig
from moe_ext.convert import FAMILIES
from moe_ext.layers.transformer import transformer_config
from tests.distributed.hf_models import fill, random_model, to_native

# Of fp32 logits of a few units: sums in another order.
TOLERANCE = 1e-5
VOCAB = 120
NO_STOP = -1


def native(reference: PreTrainedModel, groups: ProcessGroupCollection, **changes: Any) -> nn.Module:
    """The native model with a transformers model's weights, in evaluation mode."""
    family = FAMILIES[reference.config.model_type]
    model: MoEModelConfig = dataclasses.replace(
        family.model_config(reference.config.to_diff_dict()), **changes
    )
    config = transformer_config(model, bf16=False)
    (chunk,) = build_model(model, config, pg_collection=groups, seq_length=128, seed=None).chunks
    weights = to_native(reference.config.model_type, model, "fused", reference.state_dict())
    fill([chunk], weights)
    return chunk.eval()


@pytest.fixture(params=["olmoe", "jetmoe"])
def reference(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = random_model(request.param, tie_word_embeddings=False)
    # Around 1, as the norms' weights are, biases would drown the rest: one token over and over.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.sub_(1.0)
    return model


@pytest.fixture
def loaded(reference: PreTrainedModel, single_rank: ProcessGroupCollection) -> LoadedModel:
    module = native(reference, single_rank)
    ctx = RunContext(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        layout=resolve_layout(ParallelConfig(), 1),
        groups=single_rank,
        data_parallel_rank=0,
        num_threads=1,
    )
    parallel = ParallelModel(module, ctx, vocab_size=VOCAB)
    return LoadedModel(module=module, parallel=parallel, ctx=ctx)


def rows_of(*lengths: int, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def full_logits(module: nn.Module, ids: Sequence[int]) -> Tensor:
    """[s, v] of one pass over everything."""
    positions = torch.arange(len(ids))[None]
    logits: Tensor = module(torch.tensor([list(ids)]), positions, None)[0, :, :VOCAB]
    return logits


def continue_all(
    loaded: LoadedModel, prompts: Sequence[Prompt], stop_id: int = NO_STOP
) -> list[list[int]]:
    cache = KeyValueCache(batch_size=len(prompts), capacity=cache_capacity(prompts))
    with use_cache(loaded.module, cache):
        return generate(CachedModel(loaded, cache), prompts, stop_ids={stop_id}, vocab_size=VOCAB)


def greedy(ids: list[int], count: int) -> Prompt:
    return Prompt(ids=ids, sample=greedy_token, max_new_tokens=count)


def sampled(ids: list[int], count: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    return Prompt(
        ids=ids,
        sample=lambda logits: next_token(
            logits, temperature=1.0, top_p=0.9, top_k=40, generator=generator
        ),
        max_new_tokens=count,
    )


@torch.no_grad()
def test_pass_by_pass_gives_the_logits_of_one_pass(loaded: LoadedModel) -> None:
    rows = rows_of(9, 14, 11)
    starts = torch.tensor([3, 1, 5])
    truth = [full_logits(loaded.module, row) for row in rows]
    cache = KeyValueCache(batch_size=3, capacity=14)
    with use_cache(loaded.module, cache):
        tokens = torch.zeros(3, 5, dtype=torch.int64)  # what is beyond a row's start is padding
        for index, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
            tokens[index, :start] = torch.tensor(row[:start])
        positions = torch.arange(5).expand(3, 5)
        cache.place(positions)
        logits = loaded.module(tokens, positions, None)
        for index, start in enumerate(starts.tolist()):
            close(logits[index, :start, :VOCAB], truth[index][:start])
        for step in range(9 - 5 + 1):
            positions = (starts + step)[:, None]
            tokens = torch.tensor([[row[at]] for row, at in zip(rows, starts + step, strict=True)])
            cache.place(positions)
            logits = loaded.module(tokens, positions, None)
            for index, at in enumerate(positions[:, 0].tolist()):
                close(logits[index, 0, :VOCAB], truth[index][at])
    close(full_logits(loaded.module, rows[0]), truth[0])  # the cache is gone


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_several_tokens_may_follow_at_once(loaded: LoadedModel) -> None:
    (row,) = rows_of(12)
    cache = KeyValueCache(batch_size=1, capacity=20)
    parts = []
    with use_cache(loaded.module, cache):
        for start, end in ((0, 4), (4, 5), (5, 12)):
            positions = torch.arange(start, end)[None]
            cache.place(positions)
            parts.append(loaded.module(torch.tensor([row[start:end]]), positions, None)[0])
    close(torch.cat(parts)[:, :VOCAB], full_logits(loaded.module, row))


def test_greedy_text_is_transformers_own(reference: PreTrainedModel, loaded: LoadedModel) -> None:
    rows = rows_of(7, 1, 12)
    found = continue_all(loaded, [greedy(row, 20) for row in rows])
    for row, new in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        truth = cast(Any, reference).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert row + new == truth[0].tolist()
        assert len(set(new)) > 3  # there was something to get wrong


def test_greedy_text_is_that_of_whole_passes(loaded: LoadedModel) -> None:
    (row,) = rows_of(6)
    (new,) = continue_all(loaded, [greedy(row, 15)])
    text = list(row)
    for _ in range(15):
        text.append(int(full_logits(loaded.module, text)[-1].argmax()))
    assert row + new == text


def test_text_does_not_depend_on_its_batch(loaded: LoadedModel) -> None:
    rows, counts = rows_of(3, 17, 8, 1), (12, 4, 9, 15)
    stop_id = continue_all(loaded, [greedy(rows[0], 12)])[0][5]  # one row ends before its limit

    def prompts() -> list[Prompt]:
        drawn = [
            sampled(row, n, seed=i) for i, (row, n) in enumerate(zip(rows, counts, strict=True))
        ]
        return [greedy(rows[0], 12), *drawn]

    together = continue_all(loaded, prompts(), stop_id)
    alone = [continue_all(loaded, [prompt], stop_id)[0] for prompt in prompts()]
    assert together == alone
    assert together[0][-1] == stop_id and len(together[0]) <= 6


def test_seed_decides_the_text(loaded: LoadedModel) -> None:
    (row,) = rows_of(5)
    first, again, other = continue_all(
        loaded, [sampled(row, 12, seed=1), sampled(row, 12, seed=1), sampled(row, 12, seed=2)]
    )
    assert first == again != other


@pytest.fixture
def module(single_rank: ProcessGroupCollection) -> Iterator[nn.Module]:
    yield native(random_model("olmoe"), single_rank)


def refusal(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def test_training_model_gets_no_cache(module: nn.Module) -> None:
    module.train()
    with refusal("the model is training, which needs no cache; call model.eval() first"):
        with use_cache(module, KeyValueCache(batch_size=1, capacity=1)):
            pass


def test_cache_is_not_replaced_while_it_is_used(module: nn.Module) -> None:
    cache = KeyValueCache(batch_size=1, capacity=1)
    with use_cache(module, cache), refusal("the model uses a key-value cache already"):
        with use_cache(module, cache):
            pass
    with use_cache(module, cache):  # free again
        pass


def test_attention_that_keeps_no_keys_and_values_is_refused(module: nn.Module) -> None:
    layers: Any = module.decoder
    layers.layers[1].self_attention.core_attention = nn.Identity()
    with refusal("1 of 2 layers attend with SDPACoreAttention, which alone can keep"):
        with use_cache(module, KeyValueCache(batch_size=1, capacity=1)):
            pass


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), "batch_size (0) and capacity (4) of a key-value cache must be at least 1"),
        ((2, 0), "batch_size (2) and capacity (0) of a key-value cache must be at least 1"),
    ],
)
def test_empty_cache_is_refused(sizes: tuple[int, int], message: str) -> None:
    with refusal(message):
        KeyValueCache(batch_size=sizes[0], capacity=sizes[1])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1]], "position_ids are [1, 2], but the cache has 2 rows; give [2, n]"),
        ([0, 1], "position_ids are [2], but the cache has 2 rows; give [2, n]"),
        ([[0], [4]], "position_ids go from 0 to 4, but the cache holds 0 to 3; make it"),
        ([[-1], [0]], "position_ids go from -1 to 0, but the cache holds 0 to 3; make it"),
    ],
)
def test_place_outside_the_cache_is_refused(positions: list[Any], message: str) -> None:
    with refusal(message):
        KeyValueCache(batch_size=2, capacity=4).place(torch.tensor(positions))


@torch.no_grad()
def test_pass_whose_positions_were_not_placed_is_refused(module: nn.Module) -> None:
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    cache = KeyValueCache(batch_size=1, capacity=4)
    with use_cache(module, cache):
        with refusal("the pass has 1 rows of 2 tokens, but positions for None were placed"):
            module(tokens, torch.arange(2)[None], None)
        cache.place(torch.arange(3)[None])
        with refusal("the pass has 1 rows of 2 tokens, but positions for [1, 3] were placed"):
            module(tokens, torch.arange(2)[None], None)
