"""Defines the settings of a run as frozen dataclasses, one per concern, with Megatron's names.

A run config composes these groups and the application's model group. Field names are unique over
all groups, because flags and recipe keys are flat: `seq_length: 4096` in YAML is
`--seq-length 4096` on the command line. `cli` reads them from files and flags, `validate` checks
them against each other.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sets how the model and the batch are sharded over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each attention and embedding matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that the layers are split into (PP)."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks per pipeline rank; more than 1 is the interleaved schedule."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are distributed over (EP)."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP); None means the tensor parallel size."""
    sequence_parallel: bool | None = None
    """Split activations outside the matrices along the sequence; None means on when TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and master weights over the data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Gather the weights that the distributed optimizer updated under the next forward pass; needs
    use_distributed_optimizer and overlap_grad_reduce."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto means cuda when a GPU is visible. cpu uses gloo, cuda NCCL."""
    distributed_timeout_minutes: int = 10
    """Minutes a collective may wait for a lost rank before the job ends."""
    threads_per_rank: int | None = None
    """CPU threads per rank; None means OMP_NUM_THREADS if the user has set it, else the cores this
    job may use / local ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Sets batch, length, precision and activation recomputation of the run."""

    micro_batch_size: int = 1
    """Sequences in one forward pass of one data parallel rank (b)."""
    global_batch_size: int = 8
    """Sequences in one optimizer step, summed over all ranks."""
    rampup_batch_size: tuple[int, ...] = ()
    """START INCREMENT SAMPLES: the global batch begins with START sequences and grows by INCREMENT,
    each time after an equal share of SAMPLES, up to global_batch_size; empty means no ramp-up."""
    seq_length: int = 128
    """Tokens per sequence (s)."""
    train_iters: int = 100
    """Optimizer steps at which the run ends; phases and branches imply their own."""
    train_tokens: int | None = None
    """The same in tokens: the run ends with the first step at or past them, whatever its batches
    were; None leaves it to train_iters."""
    seed: int = 1234
    """Seeds initial weights, data order and dropout."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; off means fp32 throughout."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers full recomputation covers; see recompute_num_layers."""
    recompute_num_layers: int = 1
    """uniform: layers per recomputed unit; block: layers per pipeline stage to recompute."""
    recompute_modules: tuple[str, ...] = ("moe",)
    """Modules that selective recomputation covers: any of core_attn, moe, moe_act (whose
    activations the expert backends grouped and triton never keep, and the others always do)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Sets the optimizer, the learning-rate schedule and gradient clipping."""

    optimizer: Literal["adam", "rmsprop"] = "adam"
    """adam: AdamW; rmsprop: torch's RMSprop without momentum (OLMoE's KTO), whose weight decay is
    added to the gradient."""

    lr: float = 4.0e-4
    """Peak learning rate."""
    min_lr: float = 4.0e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "cosine"
    """Shape of the decay after warm-up: cosine, linear, constant, exponential, minus_sqrt,
    geometric or a registered name; WSD stays at the peak until its own tail."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached; None means the end of the run. A schedule with any length in
    tokens is a function of the tokens consumed: there, N steps count as the tokens of N steps with
    this run's batch."""
    lr_decay_tokens: int | None = None
    """The same in tokens; None leaves it to lr_decay_iters."""
    lr_wsd_decay_style: str | None = None
    """Shape of the tail of WSD and of a branch: any of the above but WSD. JetMoE's is geometric."""
    lr_wsd_decay_iters: int | None = None
    """Steps of that tail."""
    lr_wsd_decay_tokens: int | None = None
    """The same in tokens; None leaves it to lr_wsd_decay_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_tokens: int | None = None
    """The same in tokens; None leaves it to lr_warmup_iters."""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of lr_decay_iters or of what stands for it, rounded to whole steps or
    tokens; None leaves it to lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Learning rate of the first step of the warm-up (OLMoE: a tenth of the peak, not 0)."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """all: every parameter, norms and embeddings too (OLMoE); matrices: nothing one-dimensional."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_eps: float = 1.0e-8
    """Epsilon of AdamW or RMSprop."""
    rmsprop_alpha: float = 0.99
    """RMSprop's decay of squared gradients."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Describes a phase of the run with its own data mixture."""

    name: str
    """Name in tables and metrics."""
    train_tokens: int
    """Length in tokens, rounded up to whole sequences; a phase may begin within a global batch."""
    data_path: tuple[str, ...]
    """Data mixture, in the format of DataConfig.data_path."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sets the token sources, their blend, and the tokenizer."""

    data_path: tuple[str, ...] = ()
    """One PREFIX, or WEIGHT PREFIX pairs; PREFIX.bin and PREFIX.idx are Megatron's format. A source
    is named after its file, or NAME where NAME=PREFIX is given."""
    phases: tuple[PhaseConfig, ...] = ()
    """Consecutive phases, in a recipe only: name, train_tokens and data_path each."""
    split: str = "1,0"
    """Weights of training and validation in each source's tokens, for example 99,1."""
    valid_data_path: tuple[str, ...] = ()
    """Named validation sets, each NAME=PREFIX, used in full; added to what split holds out."""
    mock_data: bool = False
    """Train and validate on random tokens; data_path and valid_data_path are not read."""
    num_workers: int = 1
    """Global batches that a thread of each rank reads before they are needed; 0 reads each in the
    step that takes it."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HFTokenizer", "HuggingFaceTokenizer"] = (
        "SentencePieceTokenizer"
    )
    """Format of tokenizer_model: a SentencePiece .model, or a tokenizers .json, for which
    HuggingFaceTokenizer is another name."""
    tokenizer_model: str | None = None
    """Tokenizer file, or a directory that holds one; copied into the checkpoints, with the files
    beside it that say what its tokens are for."""
    eod_token: str | None = None
    """Text of the token that ends a document; None takes the one that the files beside the
    tokenizer name."""
    mask_repetitions: bool = False
    """Train on no label of a sequence in which an n-gram of up to 13 tokens repeats 32 times in a
    row (OLMoE); the other sequences weigh as before. Validation counts every label."""
    reset_position_ids: bool = False
    """Restart position ids at each document of a sequence; a file's index says where they end."""
    reset_attention_mask: bool = False
    """Restrict attention to within each document of a sequence, by the same index."""
    packed_attention: Literal["auto", "mask", "varlen"] = "auto"
    """How attention keeps the documents or texts of a sequence apart: by a mask of s x s, or by
    variable-length attention, which computes each on its own; auto is varlen."""
    eod_token_id: int | None = None
    """Id that must end every document under the two resets, and is where random tokens end one;
    None means the tokenizer's, which token files need not hold."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Sets evaluation during training."""

    eval_interval: int = 0
    """Steps between evaluations on every validation set; 0 means at the end only."""
    eval_iters: int = 10
    """Global batches per validation set and evaluation."""
    eval_tasks: tuple[str, ...] = ()
    """Questions to score at every evaluation, cloze or multiple choice: JSON Lines files, NAME=FILE
    or directories of files; docs/evaluation.md has their form."""
    eval_tasks_limit: int | None = None
    """First items of each task to score; None scores all."""
    eval_documents: int = 0
    """First documents of each validation set to score whole at every evaluation, for perplexity and
    bits per byte over documents; 0 scores windows alone. Needs a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Sets what a run saves, and what it starts from."""

    save: str | None = None
    """Run directory: checkpoints, metrics.jsonl, tensorboard, plots. None writes nothing."""
    load: str | None = None
    """Directory whose newest valid checkpoint the run continues from."""
    ckpt_step: int | None = None
    """Iteration to load instead of the newest."""
    save_interval: int = 0
    """Steps between checkpoints; 0 means at the end only."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy of the state in host memory."""
    keep_last: int | None = None
    """Newest checkpoints to keep; None keeps all."""
    keep_every: int | None = None
    """Also keep checkpoints whose iteration is a multiple of this; None keeps only keep_last."""
    finetune: bool = False
    """Take only the weights from load; iteration, optimizer, data and RNG start afresh."""
    anneal_from: int | None = None
    """Branch off load's checkpoint of this iteration with a learning-rate tail of lr_wsd_decay_*;
    the run ends with the tail. On a restart the branch in save is resumed."""
    override_schedule: bool = False
    """Use this run's learning-rate schedule where the checkpoint has a different one."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Sets what is reported, and where."""

    log_interval: int = 10
    """Steps between records in metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write event files under SAVE/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; None means off. WANDB_MODE=offline works."""
    wandb_name: str | None = None
    """Name of the run in wandb; None lets wandb choose."""
    progress: bool = True
    """Show a progress bar on rank 0 when the output is a terminal."""
    log_straggler: bool = False
    """Record the slowest rank of each log_interval: the one that waits least for the others."""
    log_router_saturation: str | None = None
    """Checkpoint of this architecture, a run directory or an iter_... in one: at each evaluation
    record how many of a fixed batch's experts are the same as its own. None means never."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Sets when a run ends early, and how it handles bad steps and lost ranks."""

    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 save after the current step and stop; off leaves the default action."""
    exit_duration_in_mins: float | None = None
    """Save and stop after the first step to end this many minutes after the start; None: never."""
    exit_interval: int | None = None
    """Save and stop after a step whose number is a multiple of this; None means never."""
    requeue_exit_code: int = 0
    """Exit status of a run that stopped early for one of these reasons and should be restarted."""
    max_skipped: int = 0
    """Consecutive steps that may be skipped for a non-finite loss or gradient norm, or a spike; one
    more ends the run."""
    spike_sigma: float | None = None
    """Skip a step as a spike if its loss or gradient norm is this many standard deviations above
    the mean of the last spike_window steps; None means never."""
    spike_window: int = 128
    """Steps that the mean and the standard deviation are computed over."""
    rewind_on_spike: bool = False
    """Instead of ending after max_skipped, reload the newest checkpoint and skip the samples read
    since."""
    max_rewinds: int = 3
    """Rewinds to the same checkpoint; one more ends the run."""
    preflight: bool = False
    """First check that every rank responds, computes and can write to save."""
    preflight_timeout: float = 60.0
    """Seconds that a rank may take to respond to this check before it is reported."""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Sets the steps and ranks that torch.profiler profiles."""

    profile: bool = False
    """Profile some steps, and write a trace and a table of operations to save/profile."""
    profile_step_start: int = 10
    """Completed steps at which profiling starts; the next step is the first in the profile."""
    profile_step_end: int = 12
    """Completed steps at which profiling ends: the last step in the profile."""
    profile_ranks: tuple[int, ...] = (0,)
    """Global ranks to profile, each in its own directory."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Holds every group but the model's; an application subclasses it with a `model` field."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def own_problems(self) -> list[str]:
        """Return what is wrong with an application's own groups, one message each."""
        return []
