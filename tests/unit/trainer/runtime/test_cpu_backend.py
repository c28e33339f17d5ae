"""What `redirect_cuda` makes of megatron-core's CUDA names, each seen by its effect.

Everything is probed in one redirected process and one untouched one: a redirection lasts for the
process, and starting one takes seconds. Collectives: tests/distributed/test_host_collectives.py.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron.trainer.runtime import cpu_backend
from tests.distributed.launcher import alone

WORKER = Path(__file__).with_name("cpu_backend_worker.py")

EFFECTS: dict[str, tuple[str, Any]] = {
    "current_device": ("str(torch.cuda.current_device())", "cpu"),
    "set_device": ("torch.cuda.set_device(0)", None),
    "device_count": ("torch.cuda.device_count()", 1),
    "synchronize": ("torch.cuda.synchronize()", None),
    "get_device_properties": ("torch.cuda.get_device_properties(0).major", 0),
    "get_device_capability": ("list(torch.cuda.get_device_capability())", [0, 0]),
    "nvtx": ("torch.cuda.nvtx.range_push('x')", None),
    "nvtx_pop": ("torch.cuda.nvtx.range_pop()", None),
    "cuda": ("str(torch.ones(1).cuda().device)", "cpu"),
    "module_cuda": ("str(torch.nn.Linear(1, 1).cuda().weight.device)", "cpu"),
    "record_stream": ("torch.ones(1).record_stream(torch.cuda.current_stream())", None),
    "type_float": ("torch.ones(1).type()", "torch.cuda.FloatTensor"),
    "type_half": ("torch.ones(1).half().type()", "torch.cuda.HalfTensor"),
    "type_bf16": ("torch.ones(1).bfloat16().type()", "torch.cuda.BFloat16Tensor"),
    "type_parameter": ("torch.nn.Parameter(torch.ones(1)).type()", "torch.cuda.FloatTensor"),
    "default_generator": ("torch.cuda.default_generators[3] is torch.default_generator", True),
}
"""Expression and its value once redirected; untouched, each raises or has another value."""

FACTORIES = {
    "arange": "torch.arange(3, device='cuda')",
    "empty": "torch.empty(2, device='cuda')",
    "empty_like": "torch.empty_like(torch.ones(2), device='cuda')",
    "full": "torch.full((2,), 1.0, device='cuda')",
    "full_like": "torch.full_like(torch.ones(2), 1.0, device='cuda')",
    "ones": "torch.ones(2, device='cuda')",
    "ones_like": "torch.ones_like(torch.ones(2), device='cuda')",
    "rand": "torch.rand(2, device='cuda')",
    "randn": "torch.randn(2, device='cuda')",
    "tensor": "torch.tensor([1.0], device='cuda')",
    "zeros": "torch.zeros(2, device='cuda')",
    "zeros_like": "torch.zeros_like(torch.ones(2), device='cuda')",
    "device object": "torch.zeros(2, device=torch.device('cuda', 1))",
}

# First the meta device: torch looks its factories up once, and nothing may have asked before.
STORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "meta device still builds without storage": (
        """
        with torch.device("meta"):
            found["context"] = str(torch.empty(2).device)
            found["module"] = str(torch.nn.Linear(2, 2).weight.device)
            found["cuda"] = str(torch.empty(2, device="cuda").device)
        found["argument"] = str(torch.empty(2, device="meta").device)
        """,
        {"context": "meta", "module": "meta", "cuda": "cpu", "argument": "meta"},
    ),
    "factories compute what they did": (
        """
        found["arange"] = torch.arange(2, 8, 3, device="cuda").tolist()
        found["full"] = torch.full((2, 1), 3, dtype=torch.int64, device="cuda").tolist()
        found["tensor"] = torch.tensor([[1, 2]], dtype=torch.float64, device="cuda").tolist()
        found["gradient"] = torch.ones(1, requires_grad=True, device="cuda").requires_grad
        """,
        {"arange": [2, 5], "full": [[3], [3]], "tensor": [[1, 2]], "gradient": True},
    ),
    "questions about the truth are answered with it": (
        """
        found["available"] = torch.cuda.is_available()
        found["converted"] = torch.ones(1).type(torch.float64).dtype == torch.float64
        found["integer"] = torch.ones(1, dtype=torch.int64).type()
        """,
        {"available": False, "converted": True, "integer": "torch.LongTensor"},
    ),
    "streams and events are usable": (
        """
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=False)
        event.record(stream)
        stream.wait_event(event)
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            y = torch.ones(1) + 1
        with stream:
            y = y + 1
        stream.record_event().wait()
        event.synchronize()
        stream.synchronize()
        found.update(value=y.item(), done=event.query())
        """,
        {"value": 3.0, "done": True},
    ),
    "random states are those of the CPU generator": (
        """
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        again = torch.rand(3)
        torch.manual_seed(5)
        found.update(repeats=torch.equal(first, again), is_cpu=torch.equal(first, torch.rand(3)))
        """,
        {"repeats": True, "is_cpu": True},
    ),
    "megatron-core's random tracker forks and returns": (
        """
        from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
        tracker = CudaRNGStatesTracker()
        tracker.add("mine", 11)
        torch.manual_seed(1)
        outside, inside = [], []
        for _ in range(2):
            outside.append(torch.rand(2))
            with tracker.fork("mine"):
                inside.append(torch.rand(2))
        torch.manual_seed(1)
        found["outside"] = torch.equal(torch.stack(outside).flatten(), torch.rand(4))
        torch.manual_seed(11)
        found["inside"] = torch.equal(torch.stack(inside).flatten(), torch.rand(4))
        """,
        {"outside": True, "inside": True},
    ),
    "calling it again changes nothing": (
        """
        names = ["ones", "cuda.current_stream", "cuda.Stream", "Tensor.type", "nn.Module.cuda"]
        read = lambda: [operator.attrgetter(name)(torch) for name in names]
        before = read()
        cpu_backend.redirect_cuda()
        found["same"] = all(old is new for old, new in zip(before, read()))
        """,
        {"same": True},
    ),
}


def probe(*, is_redirected: bool) -> dict[str, Any]:
    """Ask everything in a process of its own; the stories only of a redirected one."""
    stories = {name: textwrap.dedent(code) for name, (code, _) in STORIES.items()}
    questions = {
        "is_redirected": is_redirected,
        "stories": stories if is_redirected else {},
        "effects": {name: expression for name, (expression, _) in EFFECTS.items()},
        "factories": {**FACTORIES, "default": "torch.ones(2)"},
    }
    done = alone(WORKER, json.dumps(questions), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def answers() -> dict[bool, dict[str, Any]]:
    return {flag: probe(is_redirected=flag) for flag in (False, True)}


@pytest.mark.parametrize("name", EFFECTS)
def test_redirection_has_its_effect(name: str, answers: dict[bool, dict[str, Any]]) -> None:
    expected = EFFECTS[name][1]
    assert answers[True][name] == expected
    # Importing the module changes nothing, and the original would not do on a CPU.
    assert answers[False][name] != expected


@pytest.mark.parametrize("name", FACTORIES)
def test_factory_takes_cuda_for_the_cpu(name: str, answers: dict[bool, dict[str, Any]]) -> None:
    assert answers[True][f"factory {name}"] == "cpu"
    assert answers[False][f"factory {name}"] != "cpu"


def test_default_device_is_the_cpu_with_and_without(answers: dict[bool, dict[str, Any]]) -> None:
    assert [answers[flag]["factory default"] for flag in (False, True)] == ["cpu", "cpu"]


def test_every_redirected_factory_is_probed() -> None:
    assert set(cpu_backend._FACTORIES) == FACTORIES.keys() - {"device object"}


@pytest.mark.parametrize("name", STORIES)
def test_redirected_process(name: str, answers: dict[bool, dict[str, Any]]) -> None:
    assert answers[True][name] == STORIES[name][1]
