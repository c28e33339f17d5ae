"""Define what configures a model: its fields, and what is wrong with them."""

from dataclasses import dataclass

from moe_ext import config_checks
from moe_ext.model_fields import ModelFields


@dataclass(frozen=True, kw_only=True)
class MoEModelConfig(ModelFields):
    """Configures a decoder-only language model with mixture-of-experts feed-forward layers."""

    problems = config_checks.architecture_problems
    layout_problems = config_checks.layout_problems
