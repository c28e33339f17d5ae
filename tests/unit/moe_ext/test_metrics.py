"""Routing metrics against values counted by hand."""

import math
import re

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from moe_ext.metrics import RouterMetrics, RouterReport


def record(metrics: RouterMetrics, layer: int, counts: list[int], **changes: float) -> None:
    fields = {"load_balancing": 1.5, "z_sum": 40.0, "entropy_sum": 8.0, **changes}
    metrics.record(
        layer,
        load_balancing=torch.tensor(fields["load_balancing"]),
        z_sum=torch.tensor(fields["z_sum"]),
        entropy_sum=torch.tensor(fields["entropy_sum"]),
        tokens_per_expert=torch.tensor(counts),
        num_tokens=int(fields.get("num_tokens", 4)),
        group_size=int(fields.get("group_size", 1)),
    )


def test_report_is_the_mean_over_micro_batches_tokens_and_layers() -> None:
    metrics = RouterMetrics(2, 4)
    record(metrics, 1, [4, 4, 0, 0], load_balancing=2.0, z_sum=40.0, entropy_sum=4.0)
    record(metrics, 1, [2, 2, 4, 0], load_balancing=1.0, z_sum=24.0, entropy_sum=8.0)
    record(metrics, 2, [2, 2, 2, 2], load_balancing=1.0, z_sum=16.0, entropy_sum=2.0)
    report = metrics.reduce()
    assert report.layer_load_balancing_loss == [1.5, 1.0]
    assert report.load_balancing_loss == 1.25
    assert report.layer_z_loss == [8.0, 4.0]
    assert report.z_loss == 6.0
    assert report.layer_entropy == [1.5, 0.5]
    assert report.load.tolist() == [[1.5, 1.5, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert report.layer_max_load_ratio == [1.5, 1.0]
    assert report.layer_dead_experts == [1, 0]
    assert report.as_dict() == {
        "load_balancing_loss": 1.25,
        "z_loss": 6.0,
        "moe_entropy": 1.0,
        "moe_max_load_ratio": 1.5,
        "moe_mean_load_ratio": 1.25,
        "moe_dead_experts": 1.0,
    }


def test_attention_routers_have_keys_of_their_own() -> None:
    metrics = RouterMetrics(1, 2)
    record(metrics, 1, [4, 0])
    report = metrics.reduce()
    feed_forward = report.as_dict() | report.layers_as_dict()
    attention = report.as_dict("moa") | report.layers_as_dict("moa")
    assert not feed_forward.keys() & attention.keys()
    bare = {key.removeprefix("moe_"): value for key, value in feed_forward.items()}
    assert {key.removeprefix("moa_"): value for key, value in attention.items()} == bare
    assert attention["moa_load_balancing_loss"] == 1.5
    assert attention["moa_layer_dead_experts"] == [1]


def test_the_parts_of_a_shared_micro_batch_make_one() -> None:
    whole, parts = RouterMetrics(1, 2), RouterMetrics(1, 2)
    record(whole, 1, [5, 3], load_balancing=1.2, z_sum=16.0, num_tokens=8)
    record(parts, 1, [4, 0], load_balancing=0.7, z_sum=6.0, entropy_sum=3.0, group_size=2)
    record(parts, 1, [1, 3], load_balancing=0.5, z_sum=10.0, entropy_sum=5.0, group_size=2)
    assert parts.reduce().as_dict() == pytest.approx(whole.reduce().as_dict(), rel=1e-6)


def test_reduce_starts_again_from_zero() -> None:
    metrics = RouterMetrics(1, 2)
    record(metrics, 1, [4, 0])
    metrics.reduce()
    record(metrics, 1, [2, 2])
    assert metrics.reduce().layer_dead_experts == [0]


def test_reset_drops_what_was_recorded() -> None:
    metrics = RouterMetrics(1, 2)
    record(metrics, 1, [4, 0])
    metrics.reset()
    assert metrics.reduce().as_dict() == {}


def test_a_layer_without_a_record_is_left_out_of_the_means() -> None:
    metrics = RouterMetrics(2, 2)
    record(metrics, 2, [4, 0], load_balancing=2.0)
    report = metrics.reduce()
    assert math.isnan(report.layer_load_balancing_loss[0])
    assert report.load_balancing_loss == 2.0
    assert report.layer_dead_experts == [0, 1]


def test_without_any_record_there_are_no_scalars() -> None:
    report = RouterMetrics(2, 2).reduce()
    assert report.as_dict() == {}
    assert math.isnan(report.load_balancing_loss)


def test_reduce_works_inside_a_world_where_this_rank_recorded_nothing(
    single_rank: ProcessGroupCollection,
) -> None:
    assert RouterMetrics(2, 2).reduce().as_dict() == {}


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_outside_the_model_is_refused(layer: int) -> None:
    message = f"layer number ({layer}) must be between 1 and num_layers (2)"
    with pytest.raises(ValueError, match=re.escape(message)):
        record(RouterMetrics(2, 2), layer, [1, 1])


def test_another_number_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("tokens_per_expert must be [2], got [3]")):
        record(RouterMetrics(1, 2), 1, [1, 1, 2])


def test_the_report_is_frozen() -> None:
    report = RouterMetrics(1, 2).reduce()
    assert isinstance(report, RouterReport)
    with pytest.raises(AttributeError):
        report.z_loss = 0.0  # type: ignore[misc]
