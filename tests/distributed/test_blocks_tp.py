"""Blocks split over two gloo ranks against the whole on one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.experts.loop import loop_experts
from moe_ext.functional import load_balancing_loss, router_z_loss, softmax_topk
from tests.distributed.launcher import ranks

WORKER = Path(__file__).with_name("blocks_worker.py")
WORLD_SIZE = 2
S, B, H, E, K, FFN = 4, 2, 8, 4, 2, 6
HEADS, GROUPS, HEAD_SIZE = 4, 2, 3
HEADS_OF_GROUP = HEADS // GROUPS + 2  # its query heads, k, v: the order of the fused projection


Inputs = dict[str, dict[str, Tensor]]
"""Per case, what both the ranks and the reference start from."""
Results = list[dict[str, Tensor]]
"""What each rank computed."""


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Small random tensors."""
    return {
        "qk_norm": random_tensors(
            hidden=(S, B, H),
            qkv=(GROUPS * HEADS_OF_GROUP * HEAD_SIZE, H),
            q_norm=(HEADS * HEAD_SIZE,),
            k_norm=(GROUPS * HEAD_SIZE,),
            upstream_q=(S, B, HEADS, HEAD_SIZE),
            upstream_k=(S, B, GROUPS, HEAD_SIZE),
            upstream_v=(S, B, GROUPS, HEAD_SIZE),
        ),
        "router": random_tensors(hidden=(S, B, H), gate=(E, H), upstream_probs=(S * B, E)),
        "moe_layer": random_tensors(
            hidden=(S, B, H),
            gate=(E, H),
            weight1=(E, 2, FFN, H),
            weight2=(E, H, FFN),
            upstream=(S, B, H),
        ),
    }


@pytest.fixture(scope="module")
def results(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Per case, what every rank computed; one start of the ranks serves all cases."""
    directory = tmp_path_factory.mktemp("blocks")
    torch.save(inputs, directory / "inputs.pt")
    done = ranks(WORLD_SIZE, WORKER, str(directory))
    assert done.returncode == 0, done.stderr
    saved = [torch.load(directory / f"rank{r}.pt", weights_only=True) for r in range(WORLD_SIZE)]
    return {case: [rank[case] for rank in saved] for case in inputs}


def joined(ranks: Results, name: str, dim: int) -> Tensor:
    return torch.cat([rank[name] for rank in ranks], dim=dim)


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    # float64; ranks only add in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_full_width_qk_norm_under_tensor_parallelism_is_the_norm_of_the_whole(
    inputs: Inputs, results: dict[str, Results]
) -> None:
    given, ranks = inputs["qk_norm"], results["qk_norm"]

    names = ("hidden", "qkv", "q_norm", "k_norm")
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    fused = leaves["hidden"] @ leaves["qkv"].T
    fused = fused.view(S, B, GROUPS, HEADS_OF_GROUP, HEAD_SIZE)
    q, k, v = fused[..., :-2, :].flatten(2), fused[..., -2, :].flatten(2), fused[..., -1, :]
    expected = {
        "q": F.rms_norm(q, (q.shape[-1],), leaves["q_norm"], 1e-5),
        "k": F.rms_norm(k, (k.shape[-1],), leaves["k_norm"], 1e-5),
        "v": v.flatten(2),
    }
    losses = [(expected[n] * given[f"upstream_{n}"].flatten(2)).sum() for n in "qkv"]
    torch.stack(losses).sum().backward()
    for name in "qkv":
        assert_equal(joined(ranks, name, 2).flatten(2), expected[name])
    for name, leaf in leaves.items():
        assert_equal(joined(ranks, f"grad_{name}", 0), gradient(leaf))
    width = HEADS * HEAD_SIZE
    assert [rank["shard"].tolist() for rank in ranks] == [[width, 0], [width, width // 2]]


def test_a_router_whose_tokens_are_split_has_the_losses_and_gradients_of_the_whole(
    inputs: Inputs, results: dict[str, Results]
) -> None:
    given, ranks = inputs["router"], results["router"]

    hidden = given["hidden"].clone().requires_grad_()
    gate = given["gate"].clone().requires_grad_()
    logits = (hidden @ gate.T).view(S * B, E)
    experts, gates, scores = softmax_topk(logits, K)
    probs = torch.zeros_like(scores).scatter(1, experts, gates)
    counts = experts.flatten().bincount(minlength=E)
    balance = load_balancing_loss(scores, counts, num_tokens=S * B, topk=K)
    z_loss = router_z_loss(logits, num_tokens=S * B)
    losses = 0.25 * (0.3 * balance + 0.07 * z_loss)
    ((probs * given["upstream_probs"]).sum() + losses).backward()
    assert_equal(joined(ranks, "probs", 0), probs)
    assert_equal(joined(ranks, "grad_hidden", 0), gradient(hidden))
    # megatron-core sums what is marked sequence_parallel over tensor parallel ranks.
    assert_equal(ranks[0]["grad_gate"] + ranks[1]["grad_gate"], gradient(gate))
    for rank in ranks:
        assert rank["losses"].tolist() == pytest.approx([balance.item(), z_loss.item()], rel=1e-6)
        assert_equal(rank["load"], counts.double() * E / counts.sum())


def test_expert_gradients_and_the_gradient_norm_do_not_depend_on_the_layout(
    inputs: Inputs, results: dict[str, Results]
) -> None:
    given, ranks = inputs["moe_layer"], results["moe_layer"]

    leaves = {n: given[n].clone().requires_grad_() for n in ("gate", "weight1", "weight2")}
    hidden = given["hidden"].view(S * B, H)
    chosen, gates, scores = softmax_topk(hidden @ leaves["gate"].T, K)
    probs = torch.zeros_like(scores).scatter(1, chosen, gates)
    experts, tokens = (probs > 0).T.nonzero(as_tuple=True)
    output = loop_experts(
        hidden[tokens],
        leaves["weight1"],
        leaves["weight2"],
        chosen.flatten().bincount(minlength=E),
        probs[tokens, experts],
    )
    (output * given["upstream"].view(S * B, H)[tokens]).sum().backward()
    norm = torch.cat([gradient(leaf).flatten() for leaf in leaves.values()]).norm().item()
    for name in ranks[0]:
        layout, quantity = name.rsplit(" ", 1)
        if quantity == "norm":
            # fp32 through a few dozen terms.
            assert [r[name].item() for r in ranks] == pytest.approx([norm] * 2, rel=1e-5), layout
            continue
        # Each rank's window holds its shard; where both hold an element they agree.
        a, b = (rank[name].double() for rank in ranks)
        both = (a != 0) & (b != 0)
        torch.testing.assert_close(a[both], b[both], rtol=1e-5, atol=1e-6, msg=layout)
        merged = torch.where(a != 0, a, b)
        expected = gradient(leaves[quantity])
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5, msg=layout)
