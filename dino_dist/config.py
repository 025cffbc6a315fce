"""Every setting of a run: the typed schema, and the only home of defaults.

Sizes of the paper's recipes live in `configs/`; defaults here are those of the published code (arXiv:2104.14294 and its
public implementation) for a ViT-S/16, except where a comment says otherwise. `config_file.py` reads and merges files,
`config_checks.py` refuses what cannot work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal


def _number(default: float, **limits: float) -> Any:
    """A number; `limits`: at_least, above, at_most, below."""
    return field(default=default, metadata=limits)


def _duration(default: str | None) -> Any:
    return field(default=default, metadata={"duration": True})


def _interval(low: float, high: float) -> Any:
    return field(default=(low, high), metadata={"interval": True})


_PROBABILITY = {"at_least": 0.0, "at_most": 1.0}


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run lives and what makes it repeatable."""

    dir: str = "runs/dino"
    """Run folder; starting again on the same folder resumes."""
    seed: int = _number(0, at_least=0, at_most=2**32 - 1)
    """Initial weights, order, crops and drop path are pure functions of it."""
    requeue: bool = True
    """In a Slurm job: ask for another run when a signal or the time limit stops this one."""
    max_idle_restarts: int = _number(3, at_least=0)
    """Restarts in a row after a crash, none of which reached a new checkpoint, before a launched job gives up."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """WebDataset tar shards and how they are read."""

    train: str = ""
    """A folder of .tar shards, a brace or glob pattern, a manifest, a URL of these, or a mixture file (.yaml);
    indexed on first use, which reads it once (or before, by `dino-dist shards index`)."""
    index_dir: str | None = None
    """For the indexes of shards whose own folder cannot be written (a URL, say); null: `run.dir/index`."""
    eval_train: str | None = None
    """Labelled shards whose features vote in k-NN; null: no k-NN."""
    eval_test: str | None = None
    """Labelled shards that k-NN classifies; null: no k-NN."""
    num_workers: int = _number(4, at_least=0)
    """Decoding threads of a rank, in a process beside it; 0 decodes in the training process."""
    buffer_mib: int = _number(512, at_least=1)
    """Decoded images a rank holds ready; reading waits while it is full. An evaluation takes as much again; a
    micro-batch that does not fit travels alone, beside it."""
    shards_per_block: int = _number(16, at_least=1)
    """Samples are shuffled within blocks of this many shuffled shards; larger is more random, smaller seeks less."""
    max_bad_fraction: float = _number(0.001, **_PROBABILITY)
    """The run stops once more than this share of an epoch (or of all samples so far, if more) could not be decoded."""
    max_member_mib: float = _number(64.0, above=0)
    """Larger files in a shard are refused before they are read."""
    max_image_mpx: float = _number(100.0, above=0)
    """Larger images (megapixels) are refused before they are decoded."""
    dct_scale_min_px: int | None = field(default=None, metadata={"at_least": 1})
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, as long as the short side keeps this many px. It saves time
    and memory and changes pixels; null: never."""
    cache_dir: str | None = None
    """Folder on a disk of the node that keeps shards from a URL, for all ranks and jobs there; null: no copy, each
    sample is a request."""
    cache_gib: float = _number(200.0, above=0)
    """The cache's size, best above two blocks of shards; those not used for longest go first."""
    cache_ahead_shards: int = _number(16, at_least=0)
    """Shards fetched into the cache before they are needed; a block is read from all its shards at once, so fewer than
    `shards_per_block` make each block begin with a wait."""
    store_attempts: int = _number(8, at_least=1)
    """Times a request to a store is made, with growing pauses, before the run stops."""
    store_timeout_s: float = _number(30.0, above=0, at_most=3600)
    """Longest time of one request; with `store_attempts` it should stay below `parallel.timeout_s`."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in [0, 1] (ImageNet's)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides after the mean is subtracted (ImageNet's)."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The backbone."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large"] = "vit_small"
    """Width, depth and heads; the next three fields override them one by one."""
    embed_dim: int | None = None
    """Width of a token; null: the architecture's."""
    depth: int | None = None
    """Number of blocks; null: the architecture's."""
    num_heads: int | None = None
    """Attention heads; null: the architecture's."""
    patch_size: int = _number(16, at_least=1)
    """Side of a patch in px; divides every crop's side."""
    drop_path: float = _number(0.1, at_least=0.0, at_most=0.9)
    """Probability that the student's last block skips a branch; grows linearly from 0 at the first. Student only."""
    init_std: float = _number(0.02, above=0)
    """Standard deviation of initial linear weights, positions and class token, in backbone and head. The published 0.02
    suits a width of 768 (1 / sqrt(3 width)); a much narrower network needs more to start learning."""
    attention: Literal["auto", "xformers", "sdpa", "explicit"] = "auto"
    """auto: xformers where it works (CUDA), else torch's scaled_dot_product_attention."""
    init_from: str | None = None
    """What a new run starts from instead of `run.seed`: a run folder, one of its checkpoints, or weights of DINO, timm
    or Hugging Face. A resumed run does not look at it."""
    init_from_strict: bool = True
    """Refuse a backbone that does not fit as a whole; false takes over what fits and says what does not."""


@dataclass(frozen=True, kw_only=True)
class HeadSection:
    """The projection head."""

    num_prototypes: int = _number(65536, at_least=2)
    """K, the output dimension."""
    hidden_dim: int = _number(2048, at_least=1)
    """Width of the hidden layers."""
    bottleneck_dim: int = _number(256, at_least=1)
    """Width of the normalised layer before the prototypes."""
    num_layers: int = _number(3, at_least=1)
    """Linear layers before the prototypes."""
    batch_norm: bool = False
    """Batch norm after each hidden layer, with statistics over all ranks."""
    norm_last_layer: bool = True
    """Keep the prototypes' norms (weight_g) at 1; false trains the student's."""


@dataclass(frozen=True, kw_only=True)
class AugmentSection:
    """Multi-crop (arXiv:2104.14294, appendix E; order and ranges of the published code).

    Defaults are those of `preset: dino_v1`; another preset (`augment_presets.py`) replaces them, and whatever is given
    beside it replaces the preset's.
    """

    preset: Literal["dino_v1", "dinov2_as_trained", "dinov2_as_intended", "dinov3"] = "dino_v1"
    """The published pipeline whose probabilities and ranges the fields below start from."""
    global_px: int = _number(224, at_least=1)
    """Side of the two global crops."""
    local_px: int = _number(96, at_least=1)
    """Side of the local crops."""
    local_crops: int = _number(8, at_least=0, at_most=254)
    """Number of local crops."""
    global_scale: tuple[float, float] = _interval(0.4, 1.0)
    """Share of the image's area a global crop covers."""
    local_scale: tuple[float, float] = _interval(0.05, 0.4)
    """Share of the image's area a local crop covers."""
    aspect_ratio: tuple[float, float] = _interval(3 / 4, 4 / 3)
    """Width over height of a crop (torchvision's default, which all published code keeps)."""
    flip_p: float = _number(0.5, **_PROBABILITY)
    """Horizontal flip."""
    jitter_p: float = _number(0.8, **_PROBABILITY)
    """Colour jitter of the four strengths below, in a random order."""
    brightness: float = _number(0.4, **_PROBABILITY)
    """Factor from [1 - x, 1 + x]."""
    contrast: float = _number(0.4, **_PROBABILITY)
    """Factor from [1 - x, 1 + x]."""
    saturation: float = _number(0.2, **_PROBABILITY)
    """Factor from [1 - x, 1 + x]."""
    hue: float = _number(0.1, at_least=0.0, at_most=0.5)
    """Shift from [-x, x] of a full turn."""
    gray_p: float = _number(0.2, **_PROBABILITY)
    """Grayscale."""
    blur_filter: Literal["box3", "taps9"] = "box3"
    """box3: PIL's GaussianBlur, three boxes, as DINO; taps9: torchvision's, 9 taps, as DINOv2 and DINOv3 (weaker)."""
    blur_global_1_p: float = _number(1.0, **_PROBABILITY)
    """Gaussian blur of the first global crop."""
    blur_global_2_p: float = _number(0.1, **_PROBABILITY)
    """Gaussian blur of the second global crop."""
    blur_local_p: float = _number(0.5, **_PROBABILITY)
    """Gaussian blur of a local crop."""
    blur_sigma_px: tuple[float, float] = _interval(0.1, 2.0)
    """Range of the blur's radius (PIL's word for sigma)."""
    solarize_global_2_p: float = _number(0.2, **_PROBABILITY)
    """Invert bright pixels of the second global crop."""
    share_jitter: bool = False
    """Jitter and grayscale once on the whole image instead of on each crop (DINOv3's share_color_jitter)."""
    teacher_sees_colors: bool = True
    """false: the teacher's global crops are only cut (from the jittered image with `share_jitter`) and mirrored, with
    no jitter, grayscale, blur or solarization of their own (DINOv3's teacher_no_color_jitter)."""
    quantize: Literal["none", "uint8"] = "none"
    """uint8: round after each operation, as torchvision does on uint8 pictures on this device; none: round nowhere."""


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """Temperatures and center."""

    student_temp: float = _number(0.1, above=0)
    """Sharpens the student's prediction."""
    teacher_temp: float = _number(0.04, above=0)
    """Sharpens the teacher's target after the warm-up."""
    warmup_teacher_temp: float = _number(0.04, above=0)
    """Sharpens the teacher's target at the start."""
    warmup_teacher_temp_length: str = _duration("0ep")
    """Linear warm-up; given in epochs it moves once an epoch, as published, else every step."""
    center_momentum: float = _number(0.9, **_PROBABILITY)
    """Share of the old center that a step keeps."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, how much at once, in which precision."""

    length: str = _duration("100ep")
    """Length of the run."""
    batch_size: int = _number(1024, at_least=1)
    """Images a step over all ranks; the result does not depend on how many ranks share them."""
    accumulate: int = _number(1, at_least=1)
    """Parts in which a rank works through its share of a step; center and EMA still move once a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Of the compute; master weights stay fp32. auto: bf16 on GPUs that have it, else fp32. fp64 is for proofs."""
    compile: bool = False
    """torch.compile, block by block; on CUDA the rendering of crops too."""
    deterministic: bool = False
    """Refuse operations that are not repeatable to the last bit (on CPU nothing needs refusing)."""
    non_finite_patience: int = _number(5, at_least=1)
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops."""


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """Optimizer, schedules and clipping."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """The update rule."""
    lr: float = _number(5e-4, at_least=0)
    """Peak learning rate of 256 images a step; scaled by batch_size / lr_reference_batch."""
    lr_reference_batch: int = _number(256, at_least=1)
    """Batch for which `lr` is given (linear scaling rule)."""
    lr_final: float = _number(1e-6, at_least=0)
    """Where the cosine ends; not scaled with the batch."""
    warmup: str = _duration("10ep")
    """Linear warm-up of the learning rate from 0."""
    weight_decay: float = _number(0.04, at_least=0)
    """At the start; biases and norms have none."""
    weight_decay_final: float = _number(0.4, at_least=0)
    """Where the cosine ends."""
    beta1: float = _number(0.9, at_least=0, below=1)
    """AdamW."""
    beta2: float = _number(0.999, at_least=0, below=1)
    """AdamW."""
    eps: float = _number(1e-8, above=0)
    """AdamW."""
    momentum: float = _number(0.9, **_PROBABILITY)
    """SGD and LARS."""
    trust_coefficient: float = _number(0.001, above=0)
    """LARS."""
    clip: float = _number(3.0, at_least=0)
    """Largest gradient norm; 0: no clipping."""
    clip_scope: Literal["parameter", "global"] = "parameter"
    """parameter: each tensor on its own, as published; global: all as one vector."""
    freeze_last_layer: str = _duration("1ep")
    """The prototypes do not move for this long (whole epochs, as published, if given in epochs)."""


@dataclass(frozen=True, kw_only=True)
class EmaSection:
    """The teacher."""

    momentum: float = _number(0.996, **_PROBABILITY)
    """Share of the old teacher that a step keeps, at the start."""
    momentum_final: float = _number(1.0, **_PROBABILITY)
    """Where the cosine ends."""
    all_reduce_every: str = _duration("100st")
    """How often replicas compare their teachers; 0 in a healthy run, else all take replica 0's."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """What a run can come back to."""

    every: str = _duration("1000st")
    """Between saves; one more at the end and on a stop signal."""
    keep: int = _number(2, at_least=1)
    """Newest checkpoints kept."""
    keep_every: str | None = _duration(None)
    """Besides, keep the first at or after each multiple of this; null: none."""
    async_save: bool = True
    """Write in the background; the step waits only for a copy to CPU memory."""


@dataclass(frozen=True, kw_only=True)
class MetricsSection:
    """What a run says about itself."""

    every: str = _duration("10st")
    """Between rows of metrics.jsonl and TensorBoard; the only steps that wait for the device."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    pictures_every: str = _duration("1000st")
    """Between attention maps and histograms in TensorBoard; they come with rows, so on steps of `every` only."""
    profile_at: str | None = _duration(None)
    """Trace a window of steps from here with torch.profiler; null: never."""
    profile_steps: int = _number(3, at_least=1)
    """Length of the profiler's window."""


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Judging features: k-NN while training (protocol of the published eval_knn), and `dino-dist eval`."""

    knn_every: str | None = _duration(None)
    """Between k-NN evaluations during training; null: only at the end."""
    knn_k: tuple[int, ...] = (10, 20)
    """Numbers of neighbours."""
    knn_temperature: float = _number(0.07, above=0)
    """A neighbour votes with exp(cosine / temperature)."""
    knn_temperatures: tuple[float, ...] = ()
    """Further temperatures that `dino-dist eval knn` tries on the same neighbours."""
    linear_lr: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    """Peak learning rates of 256 images a step, scaled with the batch; a linear classifier is trained with each."""
    linear_blocks: tuple[int, ...] = (1, 4)
    """How many last blocks' class tokens a classifier sees; each is tried (published: 4 for ViT-S, 1 for ViT-B)."""
    linear_avgpool: tuple[bool, ...] = (False, True)
    """Whether it sees the last block's mean patch too; each is tried (published: false for ViT-S, true for ViT-B)."""
    linear_epochs: int | None = field(default=None, metadata={"at_least": 1})
    """Passes over the labelled images; null: 100, as published, or as many as make half a million images, if more."""
    linear_batch_size: int | None = field(default=None, metadata={"at_least": 1})
    """Images a step; null: 1024, as published, or a tenth of the labelled images, if that is fewer."""
    linear_augment: bool = False
    """true: random crops and flips, new in each epoch, as published; false: features of center crops, computed once."""
    logreg_C: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    """Inverse strengths of regularisation; the best on a tenth of the labelled images is taken."""
    resize_px: int = _number(256, at_least=1)
    """Short side after resizing."""
    crop_px: int = _number(224, at_least=1)
    """Side of the center crop."""
    batch_size: int = _number(64, at_least=1)
    """Images a rank puts through the network at once."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How ranks share the work; none of it changes the result beyond rounding."""

    strategy: Literal["fsdp", "hsdp", "ddp", "oss", "none"] = "fsdp"
    """fsdp: shard over all ranks; hsdp: shard within, replicate across groups; ddp: replicate; oss: replicate, with
    fairscale's optimizer state sharding; none: one rank, no wrapping."""
    replicate: int = _number(0, at_least=0)
    """hsdp: number of replicas; 0: one a node."""
    blocks_per_group: int = _number(1, at_least=1)
    """Transformer blocks gathered together; per-block groups halve the speed of a very small model."""
    activation_checkpointing: Literal["none", "torch", "fairscale", "fairscale_offload"] = "none"
    """Recompute each block in the backward pass; fairscale_offload keeps the blocks' inputs in CPU memory."""
    threads_per_rank: int = _number(1, at_least=1)
    """CPU threads of a rank; changes the last bits of a CPU result."""
    timeout_join_s: float = _number(300.0, above=0)
    """Longest wait for all ranks to appear."""
    timeout_start_s: float = _number(1800.0, above=0)
    """Longest wait for another rank before the first step is done (indexing, compiling)."""
    timeout_s: float = _number(300.0, above=0)
    """Longest silence or standstill of a rank afterwards: then it is named, and all ranks end."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    head: HeadSection = field(default_factory=HeadSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    loss: LossSection = field(default_factory=LossSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    ema: EmaSection = field(default_factory=EmaSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    eval: EvalSection = field(default_factory=EvalSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)


MAY_CHANGE_ON_RESUME = (
    *("run.dir", "run.requeue", "run.max_idle_restarts", "data.num_workers", "data.buffer_mib", "data.index_dir"),
    *("data.max_bad_fraction", "data.cache_", "data.store_", "data.eval_"),
    *("train.accumulate", "checkpoint.", "metrics.", "eval.", "parallel."),
)
"""Prefixes of the keys that a resumed run may set otherwise: they change no result beyond rounding."""


def leaves(config: Config) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every setting as (`section.field`, value, its limits)."""
    for section in fields(config):
        values = getattr(config, section.name)
        for item in fields(values):
            yield f"{section.name}.{item.name}", getattr(values, item.name), dict(item.metadata)
