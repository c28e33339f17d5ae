"""Memory that the loop over experts uses again: no row of one expert reaches the next."""

import torch

from moe_ext.experts.scratch import Scratch


def test_a_name_has_one_memory_of_its_own() -> None:
    scratch = Scratch(torch.zeros(0), 8)
    first = scratch.take("first", 3, 4)
    assert first.shape == (3, 4)
    assert scratch.take("first", 8, 4).data_ptr() == first.data_ptr()
    assert scratch.take("second", 8, 4).data_ptr() != first.data_ptr()


def test_rows_beyond_an_expert_are_zeros_whatever_was_there() -> None:
    scratch = Scratch(torch.zeros(0, dtype=torch.bfloat16), 64)
    scratch.take("rows", 64, 4).fill_(torch.nan)
    part = torch.arange(20.0).view(5, 4)
    filled = scratch.fill("rows", part)
    assert filled.shape == (32, 4) and filled.dtype == torch.bfloat16
    assert torch.equal(filled[:5].float(), part)  # small whole numbers are exact in bf16
    assert not filled[5:].any()


def test_rows_that_need_no_change_are_not_copied() -> None:
    part = torch.ones(5, 4)
    assert Scratch(torch.zeros(0), 5).fill("rows", part) is part
