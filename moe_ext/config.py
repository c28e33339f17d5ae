"""Define what configures a model: its fields, and what is wrong with them."""

from dataclasses import dataclass

from moe_ext import config_checks
from moe_ext.model_fields import ModelFields


@dataclass(frozen=True, kw_only=True)
class MoEModelConfig(ModelFields):
    """Configures a decoder-only language model with mixture-of-experts feed-forward layers."""

    def problems(self) -> list[str]:
        """Return what is wrong with the architecture itself, one message each; empty if valid."""
        return config_checks.architecture_problems(self)

    def layout_problems(
        self,
        *,
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        virtual_stages: int,
        expert_model_parallel_size: int,
        expert_tensor_parallel_size: int,
        sequence_parallel: bool,
        seq_length: int,
        is_training: bool = True,
    ) -> list[str]:
        """Return what prevents this parallel layout, one message each; empty if valid.

        Args:
            tensor_model_parallel_size: ranks per attention or embedding matrix, at least 1.
            pipeline_model_parallel_size: stages, at least 1.
            virtual_stages: model chunks per pipeline rank, at least 1.
            expert_model_parallel_size: ranks per layer's experts, at least 1.
            expert_tensor_parallel_size: ranks per expert, at least 1.
            sequence_parallel: whether activations are split along the sequence.
            seq_length: tokens per sequence (s).
            is_training: whether backward passes will run.
        """
        return config_checks.layout_problems(
            self,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_stages=virtual_stages,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            sequence_parallel=sequence_parallel,
            seq_length=seq_length,
            is_training=is_training,
        )
