"""Expert backends by name."""

from collections.abc import Callable

from torch import Tensor

from moe_ext import registry
from moe_ext.experts.grouped import grouped_experts
from moe_ext.experts.loop import loop_experts

ExpertBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden [t, h], weight1 [el, 2, f, h], weight2 [el, h, f], tokens_per_expert [el], probs [t])
to [t, h]; the contract is `loop_experts`'s."""

EXPERT_BACKENDS: dict[str, ExpertBackend] = {
    "grouped": grouped_experts,
    "loop": loop_experts,
}
"""What `MoEModelConfig.expert_backend` can name."""


def get_expert_backend(name: str) -> ExpertBackend:
    """The backend called `name`.

    Raises:
        ValueError: no such backend; the message names the nearest one.
    """
    return registry.look_up(EXPERT_BACKENDS, name, kind="expert backend")


def register_expert_backend(name: str, backend: ExpertBackend) -> None:
    """Make `backend` available under `name`.

    Raises:
        ValueError: the name is taken, or the backend cannot be called.
    """
    if not callable(backend):
        raise ValueError(f"expert backend '{name}' is {backend!r}; give a function")
    registry.add(EXPERT_BACKENDS, name, backend, kind="expert backend")
