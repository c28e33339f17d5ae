"""What a run can set: frozen dataclasses, one group a concern, flags named as Megatron names them.

A run config composes these groups and one model group of the application's choice. Field names are
unique over all groups, because flags and recipe keys are flat: `seq_length: 4096` in YAML is
`--seq-length 4096` on the command line. Nothing here reads a file or checks another field; see
`load` for the first and `validate` for the second.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each attention and embedding matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages the layers are cut into (PP)."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Model chunks per pipeline rank; more than 1 is the interleaved schedule."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks the experts of a layer are spread over (EP)."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP); None means the tensor parallel size."""
    sequence_parallel: bool | None = None
    """Split activations outside the matrices along the sequence; None means on when TP > 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and master weights over the data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live; auto means cuda when a GPU is visible. cpu uses gloo, cuda NCCL."""
    distributed_timeout_minutes: int = 10
    """Minutes a collective may wait for a lost rank before the job ends."""
    threads_per_rank: int | None = None
    """CPU threads a rank computes with; None means OMP_NUM_THREADS if the user has set it, or the
    cores this job may use / local ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, length, precision and memory of the run."""

    micro_batch_size: int = 1
    """Sequences in one forward pass of one data parallel rank (b)."""
    global_batch_size: int = 8
    """Sequences in one optimizer step over all ranks."""
    seq_length: int = 128
    """Tokens per sequence (s)."""
    train_iters: int = 100
    """Optimizer steps to have done when the run ends; phases and branches bring their own."""
    train_tokens: int | None = None
    """The same in tokens, rounded up to whole steps; None leaves it to train_iters."""
    seed: int = 1234
    """Seeds initial weights, data order and dropout."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; off means fp32 throughout."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers full recompute takes; see recompute_num_layers."""
    recompute_num_layers: int = 1
    """uniform: layers per recomputed unit; block: layers per pipeline stage to recompute."""
    recompute_modules: tuple[str, ...] = ("moe",)
    """What selective recompute drops: any of core_attn, moe, moe_act (which the
    expert backends grouped and triton never keep, and others always)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, the learning-rate schedule and gradient clipping."""

    lr: float = 4.0e-4
    """Peak learning rate."""
    min_lr: float = 4.0e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "cosine"
    """Shape of the decay after warm-up: cosine, linear, constant, exponential, minus_sqrt,
    geometric or a registered name; WSD stays at the peak until its own tail."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached; None means train_iters."""
    lr_decay_tokens: int | None = None
    """The same in tokens, rounded up to whole steps; None leaves it to lr_decay_iters."""
    lr_wsd_decay_style: str | None = None
    """Shape of the tail of WSD and of a branch: any of the above but WSD. JetMoE's is geometric."""
    lr_wsd_decay_iters: int | None = None
    """Steps of that tail."""
    lr_wsd_decay_tokens: int | None = None
    """The same in tokens, rounded up to whole steps; None leaves it to lr_wsd_decay_iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_tokens: int | None = None
    """The same in tokens, rounded up to whole steps; None leaves it to lr_warmup_iters."""
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
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 means no clipping."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A stretch of the run with a mixture of its own."""

    name: str
    """Name in tables and metrics."""
    train_tokens: int
    """Length in tokens, rounded up to whole steps."""
    data_path: tuple[str, ...]
    """Its mixture, written as data_path is."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token sources, their blend, and the tokenizer."""

    data_path: tuple[str, ...] = ()
    """One PREFIX, or WEIGHT PREFIX pairs; PREFIX.bin and PREFIX.idx are Megatron's format. A source
    is known by its file's name, or by NAME where NAME=PREFIX is given."""
    phases: tuple[PhaseConfig, ...] = ()
    """Mixtures that follow each other, in a recipe only: name, train_tokens and data_path each."""
    split: str = "1,0"
    """Shares of each source's tokens for training and validation, as in 99,1."""
    valid_data_path: tuple[str, ...] = ()
    """Named validation sets, each NAME=PREFIX, used whole; beside what split holds back."""
    mock_data: bool = False
    """Train and validate on random tokens; data_path and valid_data_path are not read."""
    num_workers: int = 1
    """Global batches that a thread of each rank reads before they are needed; 0 reads each in the
    step that takes it."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HFTokenizer"] = "SentencePieceTokenizer"
    """What wrote tokenizer_model: a SentencePiece .model, or a tokenizers .json."""
    tokenizer_model: str | None = None
    """Tokenizer file; carried into the checkpoints."""
    reset_position_ids: bool = False
    """Count positions anew in each document of a sequence."""
    reset_attention_mask: bool = False
    """Keep attention within each document of a sequence."""
    eod_token_id: int | None = None
    """Id that ends a document, for the two resets; None means the tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training."""

    eval_interval: int = 0
    """Steps between evaluations on every validation set; 0 means at the end only."""
    eval_iters: int = 10
    """Global batches per validation set and evaluation."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is written, and what a run starts from."""

    save: str | None = None
    """Run directory: checkpoints, metrics.jsonl, tensorboard, plots. None writes nothing."""
    load: str | None = None
    """Directory whose newest whole checkpoint the run continues from."""
    ckpt_step: int | None = None
    """Iteration to load instead of the newest."""
    save_interval: int = 0
    """Steps between checkpoints; 0 means at the end only."""
    keep_last: int | None = None
    """Newest checkpoints to keep; None keeps all."""
    keep_every: int | None = None
    """Checkpoints of these iterations (multiples) stay beside the newest keep_last."""
    finetune: bool = False
    """Take only the weights from load; iteration, optimizer, data and RNG start anew."""
    anneal_from: int | None = None
    """Branch off load's checkpoint of this iteration with a learning-rate tail of lr_wsd_decay_*;
    the run ends with the tail. Started again, the branch in save goes on."""
    override_schedule: bool = False
    """Continue under this run's learning-rate schedule where the checkpoint has another."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, and where."""

    log_interval: int = 10
    """Steps between records in metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write event files under SAVE/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; None means off. WANDB_MODE=offline works."""
    wandb_name: str | None = None
    """Name of the run there; None lets wandb choose."""
    progress: bool = True
    """A progress bar on rank 0 when the output is a terminal."""
    log_straggler: bool = False
    """Record the slowest rank of each log_interval: the one that waits least for the others."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """When a run ends early, and what it does about bad steps and lost ranks."""

    exit_signal_handler: bool = True
    """On SIGTERM or SIGUSR1 save at the next step's end, and stop; off means to die of them."""
    exit_duration_in_mins: float | None = None
    """Save and stop at the first step's end so many minutes after the start; None means never."""
    exit_interval: int | None = None
    """Save and stop after a step whose number is a multiple of it; None means never."""
    requeue_exit_code: int = 0
    """Exit status of a run that stopped early for one of these and should be started again."""
    max_skipped: int = 0
    """Steps in a row that may be skipped for a loss or gradient norm that is not finite, or a
    spike; one more ends the run."""
    spike_sigma: float | None = None
    """A step is a spike, and skipped, when its loss or gradient norm is so many standard deviations
    above the mean of the last spike_window steps; None means never."""
    spike_window: int = 128
    """Steps whose loss and gradient norm say what is usual."""
    rewind_on_spike: bool = False
    """Instead of ending after max_skipped, reload the newest checkpoint and leave out the samples
    read since."""
    max_rewinds: int = 3
    """Rewinds to the same checkpoint; one more ends the run."""
    preflight: bool = False
    """Before anything else see that every rank answers, computes and can write to save."""
    preflight_timeout: float = 60.0
    """Seconds that a rank may take to answer there before it is named."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every group but the model's; an application subclasses it with a `model` field."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
