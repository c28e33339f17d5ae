"""One training step and one evaluation against plain autograd on the same weights."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.trainer.data.batch import Batch, make_batch
from megatron.trainer.data.stream import SampleStream
from megatron.trainer.errors import TrainingError
from megatron.trainer.objective import NEXT_TOKEN
from megatron.trainer.state import TrainState
from megatron.trainer.step import evaluate, train_step
from moe_app.pretrain.build import build_chunks
from moe_app.pretrain.config import parse_recipe
from moe_ext.model import LanguageModel
from moe_ext.routers.base import MoERouter
from tests.distributed.launcher import flags

# megatron-core 0.16's own RowParallelLinear does not hand its group on.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

StateMaker = Callable[..., TrainState]
DENSE = {"num-experts": "None", "ffn-hidden-size": 40, "attention": "standard"}


class FixedBatches(SampleStream):
    """Yields given micro-batches at every step."""

    def __init__(self, stream: SampleStream, batches: list[Batch]) -> None:
        vars(self).update(vars(stream))
        self._batches = batches

    def next_global_batch(self, **sizes: int) -> list[Batch]:
        super().next_global_batch(**sizes)
        return self._batches


def random_batches(count: int, *, size: int = 2, seq_length: int = 16) -> list[Batch]:
    ids = torch.randint(0, 120, (count, size, seq_length + 1), generator=seeded(1))
    return [make_batch(list(each.numpy())) for each in ids]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(state: TrainState) -> LanguageModel:
    model = state.modules[0]
    assert isinstance(model, LanguageModel)
    return model


def fresh_model(state: TrainState, **overrides: Any) -> LanguageModel:
    """A bare model with the weights of iteration 0, of the state's flags or of other ones."""
    cfg = parse_recipe(flags(device="cpu", **overrides), prog="test", description="")
    return build_chunks(cfg, state.ctx, seed=cfg.training.seed).chunks[0]


def weights_of(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model_of(state).named_parameters()}


def plain_losses(model: LanguageModel, batch: Batch) -> Tensor:
    """Cross-entropy [b, s] from logits."""
    logits = model(batch.tokens, batch.position_ids, None)  # [b, s, v]
    return F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")


class ExplicitLosses:
    """Writes both auxiliary losses of every router out, from the hidden states that it sees."""

    def __init__(self, model: LanguageModel, *, balance: float, z: float) -> None:
        self.balance, self.z = balance, z
        self.total: Tensor = torch.zeros(())
        for module in model.modules():
            if isinstance(module, MoERouter):
                module.aux_loss_coeff = module.z_loss_coeff = 0.0
                module.register_forward_pre_hook(self.add)

    def add(self, router: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(router, MoERouter)
        logits = inputs[0].flatten(0, 1) @ router.weight.T  # [t, e]
        probs = logits.softmax(dim=-1)
        chosen = probs.topk(router.topk, dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=router.num_experts)
        share = counts / counts.sum()
        balance = router.num_experts * (share * probs.mean(dim=0)).sum()
        z = logits.logsumexp(dim=-1).square().mean()
        self.total = self.total + self.balance * balance + self.z * z


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_step_is_the_mean_loss_clipped_and_given_to_adamw(
    micro_batch_size: int, make_state: StateMaker
) -> None:
    """Over 4 micro-batches and over 1, auxiliary losses included, against plain autograd."""
    state = make_state(micro_batch_size=micro_batch_size, clip_grad=0.05)
    count = 8 // micro_batch_size
    batches = random_batches(count, size=micro_batch_size)
    state.train_data = FixedBatches(state.train_data, batches)
    truth = fresh_model(state)
    # 0.1 in OLMoE's convention: a mean over 4 layers; the z-loss over the 3 choices besides.
    explicit = ExplicitLosses(truth, balance=0.1 / 4, z=0.1 / 4 / 3)

    result = train_step(state, NEXT_TOKEN)
    lm_loss = torch.stack([plain_losses(truth, batch).mean() for batch in batches]).mean()
    (lm_loss + explicit.total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), 0.05)
    optimizer = torch.optim.AdamW(truth.parameters(), lr=0.003, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer.step()

    # fp32: sums of some hundred terms in another order.
    assert result.loss == pytest.approx(lm_loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.grad_norm > 2 * 0.05
    assert (result.learning_rate, result.skipped, state.iteration) == (0.003, None, 1)
    for name, expected in truth.named_parameters():
        found = dict(model_of(state).named_parameters())[name]
        # AdamW's first step is lr * sign(gradient): only gradients near 0 can differ by rounding.
        distance = torch.linalg.vector_norm(found - expected)
        assert distance <= 1e-4 * torch.linalg.vector_norm(expected), name


def test_z_loss_does_not_depend_on_the_number_of_micro_batches(make_state: StateMaker) -> None:
    norms = []
    for micro_batch_size in (1, 2, 8):
        state = make_state(
            micro_batch_size=micro_batch_size, moe_aux_loss_coeff=0, moe_z_loss_coeff=10
        )
        norms.append(train_step(state, NEXT_TOKEN).grad_norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    state = make_state(moe_aux_loss_coeff=0, moe_z_loss_coeff=0)
    assert train_step(state, NEXT_TOKEN).grad_norm < 0.9 * norms[0]


def masked(batch: Batch, mask: Tensor) -> Batch:
    return Batch(
        tokens=batch.tokens,
        labels=batch.labels,
        loss_mask=mask.float(),
        position_ids=batch.position_ids,
    )


def unequal_masks(count: int) -> list[Tensor]:
    """[2, 16] each; the first micro-batch counts one token, the last all."""
    limits = torch.linspace(1, 32, count).round()
    return [(torch.arange(32) < limit).view(2, 16) for limit in limits]


def test_reported_loss_is_the_mean_over_counted_tokens(make_state: StateMaker) -> None:
    """Not the mean of the micro-batches' means, which weighs a lone token like 32."""
    state = make_state()
    batches = [masked(b, m) for b, m in zip(random_batches(4), unequal_masks(4), strict=True)]
    state.train_data = FixedBatches(state.train_data, batches)
    with torch.no_grad():
        losses = [plain_losses(model_of(state), batch) for batch in batches]
    total = sum((x * b.loss_mask).sum() for x, b in zip(losses, batches, strict=True))
    expected = float(total) / sum(int(batch.loss_mask.sum()) for batch in batches)
    of_means = sum(
        float((x * b.loss_mask).sum() / b.loss_mask.sum())
        for x, b in zip(losses, batches, strict=True)
    )
    found = train_step(state, NEXT_TOKEN).loss
    assert found == pytest.approx(expected, rel=1e-6)
    assert found != pytest.approx(of_means / 4, rel=1e-3)


def test_gradient_is_that_of_the_mean_over_counted_tokens(make_state: StateMaker) -> None:
    state = make_state(clip_grad=0, moe_aux_loss_coeff=0, moe_z_loss_coeff=0)
    batches = [masked(b, m) for b, m in zip(random_batches(4), unequal_masks(4), strict=True)]
    state.train_data = FixedBatches(state.train_data, batches)
    truth = fresh_model(state, moe_aux_loss_coeff=0, moe_z_loss_coeff=0)
    found = train_step(state, NEXT_TOKEN).grad_norm
    total = torch.stack([(plain_losses(truth, b) * b.loss_mask).sum() for b in batches]).sum()
    (total / sum(batch.loss_mask.sum() for batch in batches)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in truth.parameters() if p.grad is not None])
    assert found == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_loss_that_is_not_finite_names_its_samples_and_changes_no_weight(
    micro_batch_size: int, make_state: StateMaker
) -> None:
    state = make_state(micro_batch_size=micro_batch_size)
    train_step(state, NEXT_TOKEN)
    before = weights_of(state)
    batches = random_batches(8 // micro_batch_size, size=micro_batch_size)
    for broken in (1, 3):
        mask = batches[broken].loss_mask.clone()
        mask[0, 3] = math.nan
        batches[broken] = masked(batches[broken], mask)
    stream = FixedBatches(state.train_data, batches)
    stream.load_state_dict({**state.train_data.state_dict(), "seed": 0})
    state.train_data = stream

    samples = "9, 11" if micro_batch_size == 1 else "10 to 11, 14 to 15"
    message = (
        f"loss is nan at iteration 2, in global samples {samples}; the weights were not updated and"
        " no checkpoint was written. Resume from the last checkpoint with a lower --lr, or look at"
        " those samples"
    )
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        train_step(state, NEXT_TOKEN)
    assert state.iteration == 1
    for name, weight in weights_of(state).items():
        assert torch.equal(weight, before[name]), name


def test_gradient_that_is_not_finite_ends_the_run_with_its_samples(make_state: StateMaker) -> None:
    state = make_state()
    model_of(state).decoder.final_layernorm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        TrainingError,
        match=r"^gradient norm is (nan|inf) at iteration 1 \(loss 4\.\d+\), global samples 0 to 7;",
    ):
        train_step(state, NEXT_TOKEN)
    assert state.iteration == 0


def test_evaluation_is_the_mean_of_plain_forward_passes(make_state: StateMaker) -> None:
    state = make_state(eval_iters=3)
    (name,) = state.validation
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}
    batches = list(
        state.validation[name].batches(3, **sizes, data_parallel_rank=0, data_parallel_size=1)
    )
    assert [len(each) for each in batches] == [4, 4, 4]
    model = model_of(state)
    with torch.no_grad():
        losses = [plain_losses(model, batch) for each in batches for batch in each]
    expected = torch.stack(losses).double().mean().item()
    assert evaluate(state, NEXT_TOKEN, name) == pytest.approx({"lm_loss": expected}, rel=1e-6)


def test_evaluation_changes_nothing(make_state: StateMaker) -> None:
    state = make_state()
    train_step(state, NEXT_TOKEN)
    assert state.metrics is not None
    weights, rng = weights_of(state), torch.get_rng_state()
    position, recorded = state.train_data.state_dict(), state.metrics.reduce()
    gradients = [p.main_grad.clone() for p in model_of(state).parameters()]
    losses = [evaluate(state, NEXT_TOKEN, "mock") for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(module.training for chunk in state.chunks for module in chunk.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert state.train_data.state_dict() == position
    for p, gradient in zip(model_of(state).parameters(), gradients, strict=True):
        assert torch.equal(p.main_grad, gradient)
    for name, weight in weights_of(state).items():
        assert torch.equal(weight, weights[name]), name
    # Routers recorded the training step alone: nothing was added by the evaluations.
    assert "load_balancing_loss" in recorded
    assert "load_balancing_loss" not in state.metrics.reduce()


def test_evaluation_between_steps_leaves_the_next_step_alone(make_state: StateMaker) -> None:
    results = []
    for is_evaluated in (False, True):
        state = make_state()
        train_step(state, NEXT_TOKEN)
        if is_evaluated:
            evaluate(state, NEXT_TOKEN, "mock")
        results.append(train_step(state, NEXT_TOKEN))
    assert results[0] == results[1]


def test_one_expert_is_the_dense_model_with_its_weights(make_state: StateMaker) -> None:
    """Same loss and same gradients, attention and embeddings included."""
    (batch,) = random_batches(1)
    one = {"num-experts": 1, "moe-router-topk": 1, "moe-ffn-hidden-size": 40}
    plain = {"attention": "standard", "moe-aux-loss-coeff": 0, "moe-z-loss-coeff": 0}
    state = make_state()
    dense, sparse = fresh_model(state, **DENSE), fresh_model(state, **one, **plain)
    translated = {name: as_experts(name, p) for name, p in dense.named_parameters()}
    target = dict(sparse.named_parameters())
    routers = {name for name in target if name.endswith("router.weight")}
    assert target.keys() - routers == {name for name, _ in translated.values()}
    assert len(routers) == 4
    with torch.no_grad():
        for name, weight in translated.values():
            target[name].copy_(weight)

    losses = [plain_losses(model, batch).mean() for model in (dense, sparse)]
    gradients = [
        {
            name: torch.autograd.grad(loss, p, retain_graph=True)[0]
            for name, p in model.named_parameters()
        }
        for model, loss in zip((dense, sparse), losses, strict=True)
    ]
    # fp32, the same products in another grouping.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, gradient in gradients[0].items():
        other, expected = as_experts(name, gradient)
        torch.testing.assert_close(gradients[1][other], expected, rtol=1e-4, atol=1e-7)
    for name in routers:  # one expert leaves no choice
        assert not gradients[1][name].any()


def as_experts(name: str, weight: Tensor) -> tuple[str, Tensor]:
    """Name and form of a dense parameter in the model of one expert."""
    if name.endswith("mlp.linear_fc1.weight"):  # [2 f, h], gate above up
        stacked = weight.view(1, 2, weight.shape[0] // 2, weight.shape[1])
        return name.replace("linear_fc1.weight", "experts.weight1"), stacked
    if name.endswith("mlp.linear_fc2.weight"):
        return name.replace("linear_fc2.weight", "experts.weight2"), weight[None]
    return name, weight


def test_steps_of_a_ramp_up_are_means_over_their_own_batches(make_state: StateMaker) -> None:
    """Batches of 2, 2, 4, 6 and 8 sequences, one after the other, against plain autograd."""
    still = {"lr": 1e-30, "min_lr": 0.0, "moe_aux_loss_coeff": 0, "moe_z_loss_coeff": 0}
    sizes, first = [2, 2, 4, 6, 8], 0
    samples = make_state(**still).train_data.next_global_batch(
        global_batch_size=sum(sizes),
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    state = make_state(rampup_batch_size="2 2 12", micro_batch_size=1, **still)
    for size in sizes:
        result = train_step(state, NEXT_TOKEN)
        truth = fresh_model(state, **still)
        batches = samples[first : first + size]
        loss = torch.stack([plain_losses(truth, batch).mean() for batch in batches]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), 1.0)
        assert result.global_batch_size == size
        # As in the test of a whole step above.
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        first += size
        assert state.progress.samples == first
