"""Read config.json strictly: every field is interpreted, known to be harmless, or refused."""

import sys
from collections.abc import Mapping
from typing import Any

_IGNORED_FIELDS = frozenset(
    {
        # Who wrote the file, and which class reads it.
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "model_type",
        "name_or_path",
        "tokenizer_class",
        "transformers_version",
        # Storage and implementation; these do not change what is computed.
        "_attn_implementation_autoset",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "experts_implementation",
        "torch_dtype",
        "torchscript",
        "use_cache",
        "use_bfloat16",
        # Extra outputs of a forward call.
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_return_dict",
        # Token ids and maximum length; the tokenizer and the run config have their own.
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "max_position_embeddings",
        "n_positions",
        "pad_token_id",
        "sep_token_id",
        # Sampling of text.
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        # Other tasks than language modelling.
        "classifier_dropout",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
    }
)
"""Fields of any config.json that do not change the logits of these models."""

_ANY = "anything"
_FULL_ATTENTION = "full_attention"
_HARMLESS_VALUES: dict[str, tuple[Any, ...] | str] = {
    # Of tools that wrote or will read the file.
    "auto_map": _ANY,
    "max_seq_length": _ANY,
    "max_sequence_length": _ANY,
    "model_max_length": _ANY,
    "tokenizer_model_max_length": _ANY,
    "tokenizer_padding_side": _ANY,
    "transformers.js_config": _ANY,
    "unsloth_fixed": _ANY,
    "unsloth_version": _ANY,
    # Attention over a part of the sequence; sliding_window itself is refused unless null.
    "layer_types": f"a list of {_FULL_ATTENTION!r}, one a layer",
    "max_window_layers": _ANY,
    "use_sliding_window": (False,),
    # The order of sums of tensor parallel training, in LLaMA's.
    "pretraining_tp": (1,),
    # Biases that these models do not have.
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    # Dropout.
    "attention_probs_dropout_prob": (0,),
    "attn_pdrop": (0,),
    "embd_pdrop": (0,),
    "hidden_dropout": (0,),
    "hidden_dropout_prob": (0,),
    "resid_pdrop": (0,),
    # Layers without experts, experts that all tokens use, noise on routing.
    "decoder_sparse_step": (1,),
    "first_k_dense_replace": (0,),
    "mlp_only_layers": ([],),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "router_jitter_noise": (0,),
    # Encoders and decoders.
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "tf_legacy_loss": (False,),
    "tie_encoder_decoder": (False,),
}
"""Fields that other models have, or that tools add -> values with which nothing depends on them."""


def harmless_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an accepted config.json that are left out, as nothing depends on them.

    Null stands for a field that is not there.
    """
    return {
        name: value
        for name, value in config.items()
        if name in _HARMLESS_VALUES and value is not None
    }


class Fields:
    """Reads the fields of one config.json; a missing or null field has transformers' default.

    Args:
        config: the parsed file.
        family: the family's name, for messages.
    """

    def __init__(self, config: Mapping[str, Any], *, family: str) -> None:
        self._config = {name: value for name, value in config.items() if value is not None}
        self._family = family
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether the field is present and not null."""
        return name in self._config

    def take(self, name: str) -> Any:
        """Return the field as it is, None when it is missing, and mark it as read."""
        self._read.add(name)
        return self._config.get(name)

    def positive_int(self, name: str, default: int) -> int:
        """Return an integer of at least 1.

        Raises:
            ValueError: it is not.
        """
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        return value

    def non_negative(self, name: str, default: float) -> float:
        """Return a finite number of at least 0.

        Raises:
            ValueError: it is not.
        """
        value = self.take(name)
        if value is None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= sys.float_info.max:
            raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean.

        Raises:
            ValueError: it is not.
        """
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        return value

    def must_be(self, name: str, *allowed: Any, why: str) -> None:
        """Accept the field only when it is missing, null, or one of `allowed`.

        Raises:
            ValueError: it has another value; `why` names what is not supported.
        """
        value = self.take(name)
        if value is not None and value not in allowed:
            choice = " or ".join(repr(one) for one in allowed) or "null"
            raise ValueError(
                f"{name} is {value!r}; it must be {choice}: {why}; such a model cannot be converted"
            )

    def must_agree(self, name: str, value: float, *, with_: str) -> None:
        """Accept the field only when it is missing, null, or the value another field gives.

        Raises:
            ValueError: it has another value.
        """
        given = self.take(name)
        if given is not None and given != value:
            raise ValueError(
                f"{name} is {given!r}, but {with_} is {value!r}; transformers reads the second;"
                f" correct the wrong one, or remove {name}"
            )

    def rope_theta(self, default: float) -> float:
        """Return RoPE's base, spelled as in transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
            ValueError: the frequencies are scaled, or the spellings disagree.
        """
        theta: float | None = None
        old, new = self._config.get("rope_scaling"), self._config.get("rope_parameters")
        if old is not None and new is not None and old != new:
            raise ValueError(
                f"rope_parameters is {new!r} and rope_scaling is {old!r}; they are two spellings of"
                " one setting and must be the same; remove one"
            )
        for name in ("rope_parameters", "rope_scaling"):
            given = self.take(name)
            if given is None:
                continue
            if not isinstance(given, dict):
                raise ValueError(f"{name} is {given!r}; it must be null or an object")
            self._check_rope(name, given)
            inner = Fields(given, family=self._family)
            if inner.has("rope_theta"):
                theta = inner.non_negative("rope_theta", default)
        self.must_be("partial_rotary_factor", 1.0, why="partial RoPE is not supported")
        if theta is not None:
            self.must_agree("rope_theta", theta, with_="rope_theta in rope_parameters")
            return theta
        return self.non_negative("rope_theta", default)

    def _check_rope(self, name: str, given: Mapping[str, Any]) -> None:
        """Refuse every kind of RoPE but the default."""
        plain: dict[str, Any] = {
            "type": "default",
            "rope_type": "default",
            "partial_rotary_factor": 1.0,
        }
        for key, value in given.items():
            if key == "rope_theta" or value is None:
                continue
            if key not in plain or value != plain[key]:
                raise ValueError(
                    f"{name} has {key} {value!r}; rope_type must be 'default', with rope_theta and"
                    " nothing else: RoPE scaling is not supported; such a model cannot be"
                    " converted"
                )

    def _check_harmless(self, name: str) -> None:
        """Refuse a field of another model unless it has the value that changes nothing."""
        value, allowed = self._config[name], _HARMLESS_VALUES[name]
        if name == "layer_types":
            num_layers = self._config.get("num_hidden_layers")
            is_harmless = (
                isinstance(value, list)
                and all(each == _FULL_ATTENTION for each in value)
                and num_layers in (None, len(value))
            )
        elif isinstance(allowed, tuple):
            is_harmless = any(_is_same(value, each) for each in allowed)
        else:
            is_harmless = True
        if not is_harmless:
            needed = repr(allowed[0]) if isinstance(allowed, tuple) else allowed
            raise ValueError(
                f"{name} is {value!r}; it must be {needed}, or not there: {self._family} models"
                " have nothing of the kind; such a model cannot be converted"
            )

    def finish(self) -> None:
        """Refuse fields that were not read.

        Raises:
            ValueError: a field is neither read nor known to be harmless, or a special token is
                not an id.
        """
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given = self._config.get(name, [])
            ids = given if isinstance(given, list) else [given]
            if not all(type(each) is int for each in ids):
                raise ValueError(
                    f"{name} is {given!r}; it must be null, a number or a list of them"
                )
        unread = self._config.keys() - self._read
        for name in sorted(unread & _HARMLESS_VALUES.keys()):
            self._check_harmless(name)
        left = sorted(unread - _IGNORED_FIELDS - _HARMLESS_VALUES.keys())
        if left:
            raise ValueError(
                f"config.json has fields that {self._family} models are not known to have:"
                f" {', '.join(left)}; each may change what the model computes; remove those that"
                " do not"
            )


def _is_same(value: Any, expected: Any) -> bool:
    """Compare as JSON does: false is not 0, but 0.0 is."""
    return value == expected and isinstance(value, bool) is isinstance(expected, bool)
