"""Which weights a run trains, by the names of groups; what is refused."""

import dataclasses
import re
from collections.abc import Iterator

import pytest
from torch import nn

from megatron.trainer.config.validate import validate
from megatron.trainer.errors import ConfigError
from megatron.trainer.runtime.launch import RunContext, initialize, shut_down
from moe_app.pretrain.build import build_state
from moe_app.pretrain.config import PretrainConfig, parse_recipe
from moe_ext.config import MoEModelConfig
from moe_ext.parameter_groups import GROUPS, group_of, groups_of_model
from tests.distributed.jetmoe_cases import JETMOE
from tests.distributed.launcher import flags

DENSE: dict[str, object] = {"num-experts": "None", "ffn-hidden-size": 40, "attention": "standard"}
SHARED: dict[str, object] = {"moe-shared-expert-intermediate-size": 18}
INTERLEAVED: dict[str, object] = {"moe-layer-freq": 2, "ffn-hidden-size": 40}
LAYER_SHARED: dict[str, object] = {"moe-share-across-layers": True}
EVERY = "embedding,attention,router,experts,norm,head"


def config(**overrides: object) -> PretrainConfig:
    return parse_recipe(flags(**overrides), prog="test", description="")


@pytest.fixture
def ctx() -> Iterator[RunContext]:
    yield initialize(config())
    shut_down()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"freeze": "rooter"}, "freeze ('rooter') is no group of this model; did you mean"),
        ({"freeze": "mlp"}, "freeze ('mlp') is no group of this model here"),
        ({**DENSE, "freeze": "router"}, "it has embedding, attention, mlp, norm, head"),
        ({**JETMOE, "freeze": "head"}, "whose head is its embedding"),
        ({"freeze": EVERY}, "nothing would train"),
        ({"lr-multipliers": "router"}, "each is GROUP=FACTOR"),
        ({"lr-multipliers": "router=nan"}, "each is GROUP=FACTOR"),
        ({"lr-multipliers": "router=0"}, "give --freeze router instead"),
        ({"freeze": "router", "lr-multipliers": "router=2"}, "which has no rate"),
        ({"weight-decay-multipliers": "heads=2"}, "did you mean"),
        ({"freeze": "shared_experts"}, "freeze ('shared_experts') is no group of this model here"),
        (
            {**SHARED, "lora-rank": 4, "lora-targets": "shared_experts"},
            "lora_targets ('shared_experts')",
        ),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(
    overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(config(**overrides), 1)


@pytest.mark.parametrize("overrides", [{}, JETMOE, DENSE, SHARED, INTERLEAVED, LAYER_SHARED])
def test_every_parameter_is_in_a_group_and_every_group_has_one(
    overrides: dict[str, object], ctx: RunContext
) -> None:
    state = build_state(config(**overrides), ctx)
    model: MoEModelConfig = state.cfg.model  # type: ignore[attr-defined]
    names = [name for module in state.modules for name, _ in module.named_parameters()]
    found = {name: group_of(name, model) for name in names}
    assert set(found.values()) == set(groups_of_model(model))
    for part, group in {
        "q_norm": "norm",
        "final_layernorm": "norm",
        "router": "router",
        "self_attention.output_bias": "attention",
        "linear_kv": "attention",
        "mlp.output_bias": "experts",
        "weight1": "experts",
        "linear_fc1": "shared_experts" if overrides is SHARED else "mlp",
        "output_layer": "head",
    }.items():
        assert {found[name] for name in names if part in name} <= {group}, part


def test_groups_get_their_rates_and_frozen_weights_no_gradients(ctx: RunContext) -> None:
    cfg = config(
        freeze="attention",
        **{
            "lr-multipliers": "router=0.25",
            "weight-decay-multipliers": "norm=3",
            "weight-decay-on": "matrices",
        },
    )
    state = build_state(cfg, ctx)
    names: dict[nn.Parameter, str] = {
        parameter: group_of(name, cfg.model)
        for module in state.modules
        for name, parameter in module.named_parameters()
    }
    rates = {}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[parameter]] = (group["lr_mult"], group["wd_mult"])
    # Norms are vectors, which do not decay under this rule, whatever the factor.
    assert rates.pop("norm") == (1.0, 0.0)
    assert rates.pop("router") == (0.25, 1.0)
    assert rates == dict.fromkeys(("embedding", "experts", "head"), (1.0, 1.0))
    for parameter, group_name in names.items():
        has_buffer = hasattr(parameter, "main_grad")
        assert has_buffer == parameter.requires_grad == (group_name != "attention")


def test_groups_can_be_given_one_by_one() -> None:
    cfg = config()
    both = dataclasses.replace(cfg.trainable, freeze=("router,norm", "head"))
    assert both.frozen == ("router", "norm", "head")
    assert set(both.frozen) < set(GROUPS)
