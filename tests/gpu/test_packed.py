"""Compares torch's kernel for packed documents with one call a document, and with the mask."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ext.attention import SDPACoreAttention, core
from moe_ext.attention.packed import has_kernel, pack_documents

pytestmark = pytest.mark.gpu

LENGTHS = ((1, 200, 37, 18), (256,))


@pytest.mark.parametrize("groups", [8, 2])
def test_kernel_equals_one_call_a_document_and_the_mask(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    if not has_kernel(device, torch.bfloat16, 64):
        pytest.skip("this GPU or torch has no kernel for packed documents")
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(256, 2, heads, 64, generator=generator, device=device).bfloat16()
        for heads in (8, groups, groups)
    ]
    for each in inputs:
        each.requires_grad_()
    flat = torch.tensor([length for row in LENGTHS for length in row])
    borders = torch.cat((torch.zeros(1), flat.cumsum(0))).int()
    packed = pack_documents(borders, num_rows=2, length=256, device=device)
    numbers = torch.repeat_interleave(torch.arange(len(flat)), flat).view(2, 256).to(device)
    future = torch.ones(256, 256, dtype=torch.bool, device=device).triu(1)
    mask = ((numbers[:, :, None] != numbers[:, None]) | future)[:, None]
    config = TransformerConfig(num_layers=1, hidden_size=512, num_attention_heads=8)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    upstream = torch.randn(256, 2, 512, generator=generator, device=device).bfloat16()

    def outcome(output: Tensor) -> list[Tensor]:
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    at_once = outcome(attention(*inputs, None, packed_seq_params=packed))
    monkeypatch.setattr(core, "has_kernel", lambda *_: False)
    one_by_one = outcome(attention(*inputs, None, packed_seq_params=packed))
    masked = outcome(attention(*inputs, mask))
    for found, other, truth in zip(at_once, one_by_one, masked, strict=True):
        # Of 8 bits, in sums of up to 256 terms of order one.
        tolerance = 0.02 * truth.abs().max().item()
        torch.testing.assert_close(found, truth, rtol=0, atol=tolerance)
        torch.testing.assert_close(other, truth, rtol=0, atol=tolerance)
