"""Redirects megatron-core's CUDA calls to the CPU, on a machine without CUDA.

megatron-core names CUDA outright in its schedules, optimizers, dispatchers and checkpoints.
`redirect_cuda` makes those names mean the CPU, so that the same training code runs on gloo. It is
called once, by `launch`, when the device is `cpu`; on a GPU this module is never entered. Each
redirection below says what in megatron-core needs it; drop one and `tests/distributed` fails.

`torch.cuda.is_available()` is left alone and stays truthful.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

_CPU = torch.device("cpu")

_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)

_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}

_state = {"redirected": False}


class _HostEvent:
    """Stands for an event that is always complete: work on the CPU is done when a call returns."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def record(self, *_args: object) -> None:
        pass

    def wait(self, *_args: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _HostStream:
    """Stands for a stream that runs everything at once, in program order."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def wait_stream(self, *_args: object) -> None:
        pass

    def wait_event(self, *_args: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, *_args: object) -> _HostEvent:
        return _HostEvent()

    def __enter__(self) -> "_HostStream":
        return self

    def __exit__(self, *_args: object) -> None:
        pass


class _HostGenerators:
    """`torch.cuda.default_generators` for any index."""

    def __getitem__(self, _index: object) -> torch.Generator:
        return torch.default_generator


class _HostProperties:
    """`torch.cuda.get_device_properties`: a device of no CUDA generation."""

    major = 0
    minor = 0
    name = "cpu"
    total_memory = 0
    multi_processor_count = 1


def redirect_cuda() -> None:
    """Make megatron-core's CUDA names mean the CPU, for the rest of the process.

    Calling it again changes nothing.
    """
    if _state["redirected"]:
        return
    _state["redirected"] = True
    _redirect_device_and_streams()
    _redirect_rng()
    _redirect_tensor_methods()
    _redirect_factories()
    _redirect_all_to_all()
    _redirect_uneven_collectives()


def _returns(value: object) -> Callable[..., Any]:
    """Return a function of any arguments that returns `value`."""

    def constant(*_args: object, **_kwargs: object) -> object:
        return value

    return constant


@contextlib.contextmanager
def _no_context(*_args: object, **_kwargs: object) -> Iterator[None]:
    yield


def _redirect_device_and_streams() -> None:
    cuda: Any = torch.cuda
    # Buffers in tensor_parallel/mappings, layers, p2p_communication, param_and_grad_buffer.
    cuda.current_device = _returns(_CPU)
    cuda.set_device = _returns(None)
    cuda.device_count = _returns(1)
    # parallel_state, schedules and filesystem_async wait for kernels; there are none.
    cuda.synchronize = _returns(None)
    cuda.empty_cache = _returns(None)
    # MoEAlltoAllTokenDispatcher copies split sizes on a side stream; DDP reduces on one.
    cuda.Stream = _HostStream
    cuda.Event = _HostEvent
    cuda.stream = _no_context
    stream = _HostStream()
    cuda.current_stream = _returns(stream)
    cuda.default_stream = _returns(stream)
    # utils.nvtx_range_push and DDP's hooks.
    cuda.nvtx.range_push = _returns(None)
    cuda.nvtx.range_pop = _returns(None)
    # layers and inference_layers ask for the architecture; DDP and the loggers for memory.
    cuda.get_device_properties = _returns(_HostProperties())
    cuda.get_device_capability = _returns((0, 0))
    cuda.memory_allocated = _returns(0)
    cuda.max_memory_allocated = _returns(0)
    cuda.memory_reserved = _returns(0)


def _redirect_rng() -> None:
    """Redirect the "CUDA" generator states that tensor_parallel/random keeps."""
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(*_args: object, **_kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
        torch.set_rng_state(new_state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = get_state
    cuda.set_rng_state = set_state
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = _HostGenerators()
    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state


def _redirect_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    # rope_utils and the distributed optimizer's gathers call .cuda() on what stays here.
    tensor.cuda = lambda self, *_args, **_kwargs: self
    module.cuda = lambda self, *_args, **_kwargs: self
    tensor.record_stream = lambda self, _stream: None

    # Float16Optimizer, DistributedOptimizer and clip_grad_by_total_norm_fp32 sort parameters by
    # the string 'torch.cuda.FloatTensor'. Only the question is answered so; conversions are not.
    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    tensor.type = type_


def _redirect_factories() -> None:
    """Redirect `device="cuda"`, written out in schedules, optimizer, clip_grads, checkpointing."""
    # torch remembers the factories by identity on first use, for `torch.device("meta")` contexts:
    # let it remember the originals, which ours call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_host(getattr(torch, name)))


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the factory with a CUDA `device` argument replaced by the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _redirect_all_to_all() -> None:
    """Pass split sizes to gloo as lists; the dispatcher passes tensors and NumPy arrays."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    original = mappings.all_to_all

    def all_to_all(
        group: torch.distributed.ProcessGroup,
        input_: torch.Tensor,
        output_split_sizes_: Any = None,
        input_split_sizes: Any = None,
        **others: Any,  # megatron-core 0.19: use_nccl_stream, False where there is no NCCL
    ) -> torch.Tensor:
        result: torch.Tensor = original(
            group, input_, _as_list(output_split_sizes_), _as_list(input_split_sizes), **others
        )
        return result

    mappings.all_to_all = all_to_all
    token_dispatcher.all_to_all = all_to_all


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _redirect_uneven_collectives() -> None:
    """Implement gather and reduce-scatter of unequal parts, which gloo's own calls refuse.

    The dispatchers use them under expert tensor parallelism, where ranks hold unequal numbers of
    tokens.
    """
    from megatron.core.tensor_parallel import mappings

    gather: Any = mappings._gather_along_first_dim
    reduce_scatter: Any = mappings._reduce_scatter_along_first_dim

    def gather_along_first_dim(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *rest, **named)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, *rest, **named)
        sizes = [int(size) for size in input_split_sizes]
        mine = sizes[group.rank()]
        received = input_.new_empty(len(sizes) * mine, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            received,
            input_.contiguous(),
            output_split_sizes=[mine] * len(sizes),
            input_split_sizes=sizes,
            group=group,
        )
        return received.view(len(sizes), mine, *input_.shape[1:]).sum(dim=0)

    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim
