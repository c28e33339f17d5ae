"""Checks what one process can see of this machine: versions, processors, kernels, SLURM."""

import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.trainer.config.parallel_layout import resolved_expert_tensor_parallel_size
from moe_app.doctor.page import Row, RowState, Section
from moe_app.pretrain.config import PretrainConfig
from moe_ext.compat import check_versions, installed_version, is_version, nearest_combination
from moe_ext.experts import AUTO, EXPERT_BACKENDS, choose_backend, use_of_model

_OPTIONAL = {
    "triton": "the expert backend triton: pip install 'megatron-moe[triton]'",
    "quack-kernels": "the expert backend cute: pip install 'megatron-moe[cute]'",
    "transformers": "Hugging Face checkpoints: pip install 'megatron-moe[hf]'",
    "transformer-engine": "the expert backend te: pip install 'megatron-moe[te]'",
    "megablocks": "the expert backend megablocks, which docs/performance.md says how to install",
    "datatrove": "filtering documents: pip install 'megatron-moe[data]'",
    "wandb": "--wandb-project: pip install 'megatron-moe[wandb]'",
}
_REQUIRED = (
    "python",
    "torch",
    "megatron-core",
    "numpy",
    "tokenizers",
    "safetensors",
    "sentencepiece",
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_LEAST_SHARED_MEMORY = 1 << 30
_SLURM = {
    "SLURM_JOB_ID": "job",
    "SLURM_JOB_NAME": "name",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_JOB_NODELIST": "nodes",
    "SLURM_NTASKS": "tasks",
    "SLURM_CPUS_PER_TASK": "cores per task",
    "SLURM_GPUS_ON_NODE": "GPUs on this node",
    "SLURM_RESTART_COUNT": "times requeued",
}


def versions_section() -> Section:
    """Compare installed packages with the combination that the tests run with."""
    installed = {name: installed_version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    tested = nearest_combination(installed)
    rows = [_version_row(name, version, tested.get(name)) for name, version in installed.items()]
    odd = [row.name for row in rows if row.state == "warn"]
    rows.append(
        Row(
            name="combination",
            value="untested" if odd else "tested, on CPUs",
            state="note" if odd else "ok",
            detail=f"because of {', '.join(odd)}" if odd else "",
        )
    )
    return Section(key="versions", title="Versions", rows=tuple(rows))


def _version_row(name: str, version: str | None, tested: str | None) -> Row:
    if version is None:
        if name in _OPTIONAL:
            return Row(name=name, value="not installed", state="note", detail=_OPTIONAL[name])
        return Row(
            name=name,
            value="not installed",
            state="bad",
            detail=f"required: pip install {name}",
        )
    if name == "megatron-core":
        try:
            check_versions()
        except ValueError as error:
            return Row(name=name, value=version, state="bad", detail=str(error))
    if tested is None:
        return Row(name=name, value=version, state="note", detail="not part of the tests")
    if is_version(version, tested):
        return Row(
            name=name,
            value=version,
            detail=f"tested with {tested}" + (".*" if tested != version else ""),
        )
    return Row(
        name=name,
        value=version,
        state="warn",
        detail=f"{version} is installed, the tests run with {tested}.*",
    )


def machine_section() -> Section:
    """Report processors, memory and GPUs; call it before anything redirects torch.cuda."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        Row(
            name="host",
            value=os.uname().nodename,
            detail=f"{os.uname().sysname} {os.uname().release}",
        ),
        Row(
            name="cores",
            value=f"{cores} of {os.cpu_count()} usable",
            detail=f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        ),
        Row(
            name="memory",
            value=f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            detail=_memory_limit(),
        ),
        *_gpu_rows(),
    ]
    return Section(key="machine", title="Machine", rows=tuple(rows))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return os.uname().machine
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else os.uname().machine


def _memory_limit() -> str:
    """Describe the memory limit of the container's control group, if it has one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return ""
    return f"this container may use {int(limit) / 2**30:.1f} GiB" if limit.isdigit() else ""


def _gpu_rows() -> list[Row]:
    if not torch.cuda.is_available():
        has_cuda = torch.version.cuda is not None
        reason = (
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU: check nvidia-smi and"
            " CUDA_VISIBLE_DEVICES"
            if has_cuda
            else "this torch is built without CUDA; runs go to the CPU, over gloo"
        )
        return [Row(name="GPU", value="none", state="warn" if has_cuda else "note", detail=reason)]
    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        rows.append(
            Row(
                name=f"GPU {index}",
                value=torch.cuda.get_device_name(index),
                detail=f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, sm_{major}{minor}",
            )
        )
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    rows.append(Row(name="CUDA", value=str(torch.version.cuda), detail=f"NCCL {nccl}"))
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    rows.append(
        Row(
            name="/dev/shm",
            value=f"{shared / 2**30:.2f} GiB",
            state="ok" if shared >= _LEAST_SHARED_MEMORY else "warn",
            detail=""
            if shared >= _LEAST_SHARED_MEMORY
            else "NCCL may need more between the GPUs of a node; docker run --shm-size=8g",
        )
    )
    return rows


def experts_section(cfg: PretrainConfig, device_type: str) -> Section:
    """List the backends that can compute this model's experts here, and why others cannot."""
    parallel = cfg.parallel
    uses = {
        name: use_of_model(
            cfg.model,
            device_type=device_type,
            dtype=dtype,
            tensor=parallel.tensor_model_parallel_size,
            expert_tensor=resolved_expert_tensor_parallel_size(parallel),
        )
        for name, dtype in _DTYPES.items()
    }
    precision = _precision(cfg)
    rows = [
        _kernel_row(name, {each: backend.problem(use) for each, use in uses.items()}, precision)
        for name, backend in EXPERT_BACKENDS.items()
    ]
    try:
        choice = choose_backend(cfg.model.expert_backend, uses[precision])
        wanted = Row(
            name="the run takes", value=f"{choice.name}, in {precision}", detail=choice.reason
        )
    except ValueError as error:
        wanted = Row(name="the run takes", value="none", state="bad", detail=str(error))
    is_auto = cfg.model.expert_backend == AUTO
    title = f"Expert backends on {device_type}{' (auto)' if is_auto else ''}"
    return Section(key="experts", title=title, rows=(*rows, wanted))


def _precision(cfg: PretrainConfig) -> str:
    return "bf16" if cfg.training.bf16 else "fp32"


def _kernel_row(name: str, problems: Mapping[str, str | None], precision: str) -> Row:
    """Report in which precisions a kernel can be used, and why not in others.

    Args:
        name: name of the kernel.
        problems: what prevents each precision; None where nothing does.
        precision: precision of the run.
    """
    able = [each for each, problem in problems.items() if problem is None]
    if able:
        reasons = [f"{each}: {problem}" for each, problem in problems.items() if problem]
    else:
        reasons = [problems[precision] or ""]
    return Row(
        name=name,
        value=", ".join(able) or "no",
        state="ok" if precision in able else "note",
        detail="; ".join(reasons),
    )


def attention_section(cfg: PretrainConfig, device_type: str) -> Section:
    """List the torch kernels that can run this model's attention, tried forward and backward."""
    model = cfg.model
    head_size = model.head_size
    heads = (model.num_attention_heads, model.num_query_groups or model.num_attention_heads)
    precision = _precision(cfg)
    rows = []
    for name, kernel in _KERNELS.items():
        problems = {}
        for each, dtype in _DTYPES.items():
            inputs = _attention_inputs(device_type, dtype, heads, head_size)
            problems[each] = _attention_problem(kernel, inputs)
            if problems[each] is not None and device_type == "cpu":
                problems[each] = f"not one of torch's CPU kernels ({problems[each]})"
        rows.append(_kernel_row(name, problems, precision))
    query, key, value = _attention_inputs(device_type, _DTYPES[precision], heads, head_size)
    chosen = SDPBackend(
        torch._fused_sdp_choice(query, key, value, is_causal=True, enable_gqa=heads[0] != heads[1])
    )
    names = {kernel: name for name, kernel in _KERNELS.items()}
    rows.append(
        Row(
            name="the run takes",
            value=f"{names.get(chosen, chosen.name.lower())}, in {precision}",
            detail=f"torch's choice for {heads[0]} heads of size {head_size}, {heads[1]} key heads",
        )
    )
    return Section(key="attention", title=f"Attention kernels on {device_type}", rows=tuple(rows))


def _attention_inputs(
    device_type: str, dtype: torch.dtype, heads: tuple[int, int], head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make query [1, np, s, hn], key and value [1, ng, s, hn] for s = 16 positions."""
    query_heads, key_heads = heads
    shapes = [(1, each, 16, head_size) for each in (query_heads, key_heads, key_heads)]
    query, key, value = (
        torch.ones(shape, dtype=dtype, device=device_type, requires_grad=True) for shape in shapes
    )
    return query, key, value


def _attention_problem(
    kernel: SDPBackend, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> str | None:
    """Return torch's reason why a kernel cannot run causal attention forward and backward."""
    query, key, value = inputs
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel([kernel]):
        warnings.simplefilter("always")
        try:
            output = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )
            output.sum().backward()
        except RuntimeError as error:
            reasons = [_first_sentence(str(each.message)) for each in caught]
            return "; ".join(dict.fromkeys(reasons)) or _first_sentence(str(error))
    return None


def _first_sentence(text: str) -> str:
    """Return the first sentence of a torch message, without its source location."""
    return re.split(r"\(Triggered internally|\. |\n", text)[0].strip().rstrip(".")


def slurm_section(variables: Mapping[str, str], *, num_hosts: int | None) -> Section:
    """Report the SLURM job of this process, and whether its ranks use all nodes.

    Args:
        variables: environment variables that SLURM sets.
        num_hosts: number of hosts with ranks of this run; None if unknown.
    """
    has_sbatch = shutil.which("sbatch") is not None
    if "SLURM_JOB_ID" not in variables:
        row = Row(
            name="job",
            value="none",
            state="note",
            detail="sbatch is installed" if has_sbatch else "sbatch is not installed",
        )
        return Section(key="slurm", title="SLURM", rows=(row,))
    rows = [
        Row(name=text, value=variables[key]) for key, text in _SLURM.items() if key in variables
    ]
    if variables.get("SLURM_JOB_END_TIME", "").isdigit():
        left = int(variables["SLURM_JOB_END_TIME"]) - time.time()
        rows.append(Row(name="time left", value=f"{left / 60:.0f} min"))
    num_nodes = variables.get("SLURM_JOB_NUM_NODES", "")
    if num_hosts is not None and num_nodes.isdigit() and int(num_nodes) != num_hosts:
        state: RowState = "warn"
        rows.append(
            Row(
                name="nodes used",
                value=f"{num_hosts} of {num_nodes}",
                state=state,
                detail=f"the job has {num_nodes} nodes, but ranks run on {num_hosts}: start"
                " torchrun on each node, with srun",
            )
        )
    return Section(key="slurm", title="SLURM", rows=tuple(rows))
