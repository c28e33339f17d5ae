"""Define what a model family implements to convert to and from Hugging Face."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moe_ext.config import MoEModelConfig
from moe_ext.convert.pieces import ExpertLayout, Piece

TokenIds = int | list[int] | None
"""A special token of a Hugging Face config: an id, several, or none."""


def common_problems(model: MoEModelConfig) -> list[str]:
    """List what prevents `model` from being expressed in any family."""
    if model.num_experts is None:
        return ["num_experts is None, a dense model, and the family has experts in every layer"]
    shared = model.moe_shared_expert_intermediate_size
    others: tuple[tuple[str, object, object, str], ...] = (
        ("moe_shared_expert_intermediate_size", shared, None, "has no shared expert"),
        ("moe_layer_freq", model.moe_layer_freq, 1, "has experts in every layer"),
        (
            *("moe_share_across_layers", model.moe_share_across_layers, False),
            "has other experts in every layer",
        ),
        (
            "moe_router_enable_expert_bias",
            model.moe_router_enable_expert_bias,
            False,
            "has no biases of experts",
        ),
        ("normalization", model.normalization, "RMSNorm", "has RMSNorm"),
    )
    return [
        f"{name} is {value}, and the family {has}"
        for name, value, wanted, has in others
        if value != wanted
    ]


def plain_problems(model: MoEModelConfig, *, family: str) -> list[str]:
    """List what prevents a family whose heads share the hidden size and whose norms are alike.

    Args:
        model: to be expressed.
        family: its name, for the messages.
    """
    found = []
    final = model.final_norm_epsilon
    if final is not None and final != model.norm_epsilon:
        found.append(
            f"final_norm_epsilon is {final}, and {family}'s is norm_epsilon ({model.norm_epsilon})"
        )
    head_size = model.hidden_size / model.num_attention_heads
    if model.kv_channels is not None and model.kv_channels != head_size:
        found.append(
            f"kv_channels is {model.kv_channels}, and {family}'s is hidden_size /"
            f" num_attention_heads = {head_size:g}"
        )
    return found


class ReadConfig(Protocol):
    """Reads a Hugging Face config."""

    def __call__(
        self, hf_config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 128
    ) -> MoEModelConfig:
        """Return the architecture that config.json describes.

        Args:
            hf_config: the parsed file.
            make_vocab_size_divisible_by: pad the vocabulary to a multiple of this, so that tensor
                parallel ranks can share it; 1 pads nothing.

        Raises:
            ValueError: a field is missing, unknown or has a value that the native model does not
                support.
        """
        ...


class MakePieces(Protocol):
    """Splits a model into pieces."""

    def __call__(self, model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
        """Yield every block of every native tensor once, in the order of the HF tensors."""
        ...


class FindProblems(Protocol):
    """Lists what prevents a native model from being expressed in the family's form."""

    def __call__(self, model: MoEModelConfig) -> list[str]:
        """Return one message per field, naming it; empty if there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """Converts a model family: config.json <-> MoEModelConfig, and the weights of both."""

    name: str
    """`model_type` of config.json."""
    layouts: tuple[ExpertLayout, ...]
    """Layouts of its checkpoints; the first is the default for writing."""
    expert_names: Mapping[ExpertLayout, str]
    """A tensor name of layer 0 that identifies the layout."""
    problems: FindProblems
    """Lists what prevents a native model from being expressed."""
    model_config: ReadConfig
    """config.json -> architecture."""
    own_fields: Callable[[MoEModelConfig], dict[str, Any]]
    """Architecture -> the fields of config.json that not all families have."""
    make_pieces: MakePieces
    """Architecture -> pieces, in one of the family's layouts."""
    attention: str = "self_attn"
    """Name of a layer's attention in names of tensors."""

    def pieces(self, model: MoEModelConfig, layout: ExpertLayout) -> Iterator[Piece]:
        """Yield every block of every native tensor once, in the order of the HF tensors.

        Raises:
            ValueError: the family has no such layout, or cannot express the model.
        """
        if layout not in self.layouts:
            raise ValueError(
                f"{self.name} checkpoints have no layout '{layout}'; use"
                f" {' or '.join(self.layouts)}"
            )
        self._refuse(model)
        return self.make_pieces(model, layout)

    def _refuse(self, model: MoEModelConfig) -> None:
        problems = self.problems(model)
        if problems:
            raise ValueError(f"{self.name} cannot express this model: {'; '.join(problems)}")

    def hf_config(
        self,
        model: MoEModelConfig,
        *,
        max_position_embeddings: int,
        dtype: str,
        bos_token_id: TokenIds,
        eos_token_id: TokenIds,
        pad_token_id: int | None,
    ) -> dict[str, Any]:
        """Return the contents of config.json, in the spelling of transformers 4 and of 5.

        Args:
            model: what to describe.
            max_position_embeddings: longest sequence, in tokens.
            dtype: of the weights on disk, "float32" or "bfloat16".
            bos_token_id: begins a sequence; 1 for JetMoE's tokenizer, OLMo and OLMoE have none.
            eos_token_id: ends one; 2 for JetMoE's tokenizer, 50279 for OLMo's and OLMoE's (a 0 in
                early releases of OLMoE is an error).
            pad_token_id: fills one up; 1 for OLMo's and OLMoE's tokenizer, JetMoE has none.

        Raises:
            ValueError: the family cannot express the model; the message names the field.
        """
        self._refuse(model)
        fields = {
            "attention_dropout": 0.0,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "hidden_size": model.hidden_size,
            "initializer_range": model.init_method_std,
            "max_position_embeddings": max_position_embeddings,
            "model_type": self.name,
            "num_attention_heads": model.num_attention_heads,
            "num_hidden_layers": model.num_layers,
            "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
            "pad_token_id": pad_token_id,
            "rope_parameters": {"rope_theta": model.rotary_base, "rope_type": "default"},
            "rope_theta": model.rotary_base,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": model.vocab_size,
            **self.own_fields(model),
        }
        return dict(sorted(fields.items()))

    def hf_tensors(self, model: MoEModelConfig, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of the Hugging Face checkpoint, in writing order.

        Raises:
            ValueError: see `pieces`.
        """
        return {
            source.name: source.shape
            for piece in self.pieces(model, layout)
            for source in piece.sources
        }

    def native_tensors(self, model: MoEModelConfig) -> dict[str, tuple[int, ...]]:
        """Return global name and shape of every weight of a native checkpoint.

        Raises:
            ValueError: see `pieces`.
        """
        return {piece.key: piece.shape for piece in self.pieces(model, self.layouts[0])}

    def detect_layout(self, names: Collection[str]) -> ExpertLayout:
        """Return the layout of a checkpoint that holds tensors called `names`.

        Names that fit no layout give the first one; the comparison with `hf_tensors` then shows
        what is missing.
        """
        for layout in self.layouts:
            if self.expert_names[layout] in names:
                return layout
        return self.layouts[0]

    def is_rotary_buffer(self, name: str, model: MoEModelConfig) -> bool:
        """Return whether some checkpoints keep RoPE's frequencies, which are no weights, here."""
        return is_rotary_buffer(name, model, attention=self.attention)


def is_rotary_buffer(name: str, model: MoEModelConfig, *, attention: str = "self_attn") -> bool:
    """Return whether some checkpoints keep RoPE's frequencies under this name.

    Args:
        name: of a tensor.
        model: the architecture.
        attention: name of a layer's attention in names of tensors.
    """
    found = re.fullmatch(rf"model\.(?:layers\.(\d+)\.{attention}\.)?rotary_emb\.inv_freq", name)
    return found is not None and int(found[1] or 0) < model.num_layers
