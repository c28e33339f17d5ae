"""The training application that megatron-core's wheel lacks.

Read in this order: `config` (what can be set), `launch` (process groups, device, seed), `step` (one
forward-backward-update), `loop` (the run), `checkpoint` (what survives it).
"""

import warnings

# megatron-core says so at import, four times a process; this project does without both.
# torch 2.13 renamed collectives that megatron-core 0.16 calls by their old names; its checkpoint
# planner touches a class that it deprecates itself.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
warnings.filterwarnings(
    "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated"
)
warnings.filterwarnings("ignore", message="Please use DTensor instead")
# Advice for GPUs before Blackwell, given on CPUs too.
warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
