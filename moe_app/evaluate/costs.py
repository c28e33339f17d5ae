"""States what a model cost and costs, beside its results."""

from typing import Any

from megatron.trainer.config.batch_plan import batch_plan, is_sound
from moe_app.pretrain.config import PretrainConfig
from moe_ext.counting import count_parameters, training_flops_per_token


def model_costs(saved: PretrainConfig, iteration: int) -> dict[str, Any]:
    """Return counts of parameters, and FLOPs of a token and of the run so far.

    Args:
        saved: the config of the run that wrote the checkpoint.
        iteration: of the checkpoint; what an import or an earlier run trained is not known.
    """
    count = count_parameters(saved.model)
    is_untied = saved.model.untie_embeddings_and_output_weights
    multiplied = count.active - (count.embedding if is_untied else 0)
    length = saved.training.seq_length
    plan = batch_plan(saved.training) if is_sound(saved.training) else None
    tokens = 0 if plan is None else plan.samples_after(iteration) * length
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        # Matrix products alone, without attention's scores.
        "forward_flops_per_token": 2 * multiplied,
        "trained_tokens": tokens,
        "training_flops": tokens * training_flops_per_token(saved.model, length),
    }
