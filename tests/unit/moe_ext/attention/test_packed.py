"""Variable-length attention against the mask that keeps the same documents apart."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.attention import SDPACoreAttention, core, packed
from moe_ext.attention.packed import PackedDocuments, has_kernel, pack_documents, way_of

ConfigMaker = Callable[..., TransformerConfig]
S = 11
ROWS = [[1, 4, 1, 5], [S], [3, 8]]
"""Documents of one token, of a whole row, and equal ones; another number in each row."""


def core_attention(config: TransformerConfig) -> SDPACoreAttention:
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3)


def documents(rows: Sequence[Sequence[int]] = ROWS) -> PackedDocuments:
    lengths = torch.tensor([length for row in rows for length in row])
    borders = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    return pack_documents(borders, num_rows=len(rows), length=S, device=torch.device("cpu"))


def hidden_by_a_mask(rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    numbers = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    apart = torch.stack([each[:, None] != each[None] for each in numbers])
    return (apart | torch.ones(S, S, dtype=torch.bool).triu(1))[:, None]


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    longest_q: int,
    longest_kv: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Does on a CPU what torch's kernel is documented to do: [t, n, hn] of all documents."""
    assert window_size == (-1, 0) and cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
    longest = int(cu_seqlens_q.diff().max())
    assert (longest_q, longest_kv) == (longest, longest) and scale is not None
    shared = query.shape[1] // key.shape[1]
    assert enable_gqa == (shared > 1)
    found = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        q, k, v = (each[begin:end].transpose(0, 1) for each in (query, key, value))
        k, v = (each.repeat_interleave(shared, dim=0) for each in (k, v))
        scores = scale * q @ k.transpose(1, 2)
        future = torch.ones(end - begin, end - begin).triu(1).bool()
        found.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("at_once", [False, True])
def test_output_and_gradients_are_those_of_the_mask(
    groups: int, at_once: bool, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(S, len(ROWS), heads, 3, generator=generator, dtype=torch.float64)
        for heads in (4, groups, groups)
    ]
    for each in inputs:
        each.requires_grad_()
    attention = core_attention(make_config())
    expected = attention(*inputs, hidden_by_a_mask())
    if at_once:
        monkeypatch.setattr(core, "has_kernel", lambda *_: True)
        monkeypatch.setattr(packed, "_kernel", lambda: kernel)
    output = attention(*inputs, None, packed_seq_params=documents())
    assert output.is_contiguous()
    # float64 softmax over up to eleven terms of order one.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    for found, truth in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_nothing_as_large_as_a_mask_is_kept(make_config: ConfigMaker) -> None:
    length = 512
    query, key, value = (torch.randn(length, 1, 1, 2, requires_grad=True) for _ in range(3))
    borders = torch.arange(0, length + 1, 64, dtype=torch.int32)
    apart = pack_documents(borders, num_rows=1, length=length, device=torch.device("cpu"))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def largest(*arguments: Any, **named: Any) -> int:
        sizes = [0]

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            core_attention(make_config())(query, key, value, *arguments, **named)
        return max(sizes)

    assert largest(mask) >= length**2
    assert largest(None, packed_seq_params=apart) <= 2 * length


def test_a_cpu_has_no_kernel_and_says_so() -> None:
    cpu = torch.device("cpu")
    assert not has_kernel(cpu, torch.bfloat16, 64)
    assert way_of(cpu, torch.bfloat16, 64, 1) == "one call of causal attention a document"


def refused(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("head size 3 is not a multiple of 8")


@pytest.mark.parametrize(
    ("stand_in", "agrees"),
    [
        (kernel, True),
        (lambda *arguments, **options: kernel(*arguments, **options) * 1.5, False),
        (lambda query, key, *rest, **options: kernel(query, key.flip(0), *rest, **options), False),
        (refused, False),
    ],
)
def test_a_kernel_is_taken_if_it_agrees(
    stand_in: Any, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_kernel", lambda: stand_in)
    assert packed.kernel_agrees(torch.device("cpu"), torch.float32, 8) is agrees


@pytest.mark.parametrize(
    ("borders", "message"),
    [
        ([0, 5, 11, 22], None),
        ([0, 5, 11, 20], "goes from [0] to [20], but must go from [0] to [22], 2 rows of 11"),
        ([3, 11, 22], "goes from [3] to [22], but must go from [0] to [22]"),
        ([0, 5, 15, 22], "a document from 5 to 15, which is no part of one of 2 rows of 11"),
        ([0, 5, 5, 11, 22], "a document from 5 to 5, which is no part of one of 2 rows of 11"),
        ([0, 11, 33], "a document from 11 to 33, which is no part of one of 2 rows of 11"),
        ([], "goes from [] to [], but must go from [0] to [22]"),
    ],
)
def test_documents_that_do_not_fill_the_rows_are_refused(
    borders: list[int], message: str | None
) -> None:
    def pack() -> PackedDocuments:
        at = torch.tensor(borders, dtype=torch.int32)
        return pack_documents(at, num_rows=2, length=S, device=torch.device("cpu"))

    if message is None:
        assert pack().lengths == ((5, 6), (11,))
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        pack()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed_seq_params": PackedSeqParams(qkv_format="thd")}, "needs PackedDocuments"),
        ({"attention_mask": hidden_by_a_mask()}, "attention_mask with packed_seq_params"),
        ({"attn_mask_type": AttnMaskType.no_mask}, "causal attention with packed_seq_params"),
    ],
)
def test_what_packed_documents_do_not_go_with_is_refused(
    changes: dict[str, Any], message: str, make_config: ConfigMaker
) -> None:
    tensors = {name: torch.zeros(S, len(ROWS), 4, 3) for name in ("query", "key", "value")}
    given = {"attention_mask": None, "packed_seq_params": documents(), **tensors, **changes}
    with pytest.raises(ValueError, match=message):
        core_attention(make_config())(**given)
