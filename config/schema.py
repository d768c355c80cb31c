"""Everything that a run can choose, as typed dataclasses.

`model.feed_forward` and `objective` have one dataclass per `name`; the tables at the end of the
file say which. A field that is None here is filled in by `config.load` from other choices.
"""

from dataclasses import dataclass, field, make_dataclass
from typing import Literal

from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    MoEConfig,
    TokenChoiceConfig,
)
from config.model import ModelConfig
from config.objective import (
    OBJECTIVES,
    FlowConfig,
    ObjectiveConfig,
    SamplingConfig,
)
from config.promoe import ProMoEConfig
from config.race import RaceConfig


@dataclass
class DataConfig:
    """Training data.

    Attributes:
        source: `latents` reads what main_cache.py wrote, `npz` a published cache of one file for
            each image, `images` encodes images while training, or takes them as they are where
            vae_path is null.
        cached_path: folder of latents, or a list of folders that are taken as one.
        npz_contents: what the arrays of a published cache are; see data/published.py. The files
            do not say it.
        data_path: folder of images, for source `images`.
        val_cached_path: folder that main_cache.py wrote of held-out images, for validation losses.
        val_data_path: folder of held-out images themselves, for source `images`.
        text_source: `cached` reads what main_cache.py --captions wrote, `online` encodes captions
            while training.
        text_cached_path: folder of cached texts of the images in cached_path, one for each of its
            folders, for models of text.
        val_text_cached_path: the same of val_cached_path.
        caption_choice: which caption of an image an epoch takes: `random`, the `first`, or weights
            of the captions' sources, {source: weight}.
        captions: for text_source online, where captions come from: txt, metadata or template,
            below data_path, or a .jsonl or .csv file; see docs/data.md.
        path_key: key of an entry's image there.
        caption_key: keys of its captions, separated by commas; by default text or caption.
        caption_template: of template, with {} for the name of the class.
        text_encoder: Hugging Face text encoder, a hub id or a local folder.
        text_layer: whose output is taken, as an index of its hidden states; by default the last
            hidden state.
        text_prefix: put before every caption, such as an instruction.
        text_dtype: of the encoder.
        vae_path: VAE that decodes samples, a hub id or a local folder; null for models of pixels.
        image_size: side of the images, in pixels; the cache must have been made with it.
        horizontal_flip: take the mirror image's latent half of the time.
        order: `random` in the whole data set, or `shards`: shuffled files, and images shuffled
            within a window of them, for disks that are slow at random places.
        shuffle_window: files in that window.
        num_workers: loader processes for each training process.
    """

    source: Literal["latents", "npz", "images"] = "latents"
    cached_path: list[str] | str = "cache/imagenet256"
    npz_contents: Literal["posterior", "scaled_posterior", "latent", "scaled_latent"] | None = None
    data_path: str | None = None
    val_cached_path: str | None = None
    val_data_path: str | None = None
    text_source: Literal["cached", "online"] = "cached"
    text_cached_path: list[str] | str | None = None
    val_text_cached_path: str | None = None
    caption_choice: Literal["random", "first"] | dict[str, float] = "random"
    captions: str | None = None
    path_key: str = "file_name"
    caption_key: str | None = None
    caption_template: str = "a photo of a {}"
    text_encoder: str | None = None
    text_layer: int | None = None
    text_prefix: str = ""
    text_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vae_path: str | None = "stabilityai/sd-vae-ft-mse"
    image_size: int = 256
    horizontal_flip: bool = True
    order: Literal["random", "shards"] = "random"
    shuffle_window: int = 8
    num_workers: int = 4


@dataclass
class OptimConfig:
    """AdamW.

    Attributes:
        lr: learning rate, which the paper holds constant; by default what base_lr makes it, or
            1e-4.
        base_lr: learning rate for a batch of 256: lr is base_lr x train.global_batch_size / 256.
        lr_schedule: `constant`, or `cosine` down to 0 at train.max_steps.
        warmup_steps: steps over which the learning rate first rises from 0 to lr.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay.
        ema_decay: decay of the averaged weights, per step.
        ema_warmup: start with a shorter average: decay min(ema_decay, (1 + step) / (10 + step)).
        ema_every: steps between two updates of the averages, each with the decay to that power;
            they cost a pass over all weights.
        extra_ema_decays: further averages beside the one that is sampled from, kept as
            `ema_<decay>`.
        grad_clip: largest L2 norm of the gradient; by default it is not clipped.
    """

    lr: float | None = None
    base_lr: float | None = None
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    ema_every: int = 1
    extra_ema_decays: tuple[float, ...] = ()
    grad_clip: float | None = None

    def peak_lr(self, global_batch_size: int) -> float:
        """The learning rate after warm-up."""
        if self.lr is not None:
            return self.lr
        return 1e-4 if self.base_lr is None else self.base_lr * global_batch_size / 256


@dataclass
class TrainConfig:
    """Length of the run, batch, and what is written when.

    Attributes:
        max_steps: optimizer steps.
        global_batch_size: images per optimizer step over all processes.
        micro_batch_size: images per forward pass of one process. It sets the size of DiffMoE's
            token pool and belongs to the experiment; more processes mean fewer accumulation
            steps, never another pool.
        log_every: steps between log entries.
        ckpt_every: steps between checkpoints; one is always written at the end.
        keep_last: newest checkpoints that are kept; 0 keeps all.
        keep_every: checkpoints of steps that this number divides are kept besides; 0 for none.
        sample_every: steps between sample grids from the averaged weights; 0 turns them off.
        num_grid_samples: images in a grid.
        val_every: steps between validation losses on data.val_cached_path; 0 turns them off.
        num_val_samples: images of a validation loss.
        precision: `bf16` computes under autocast; weights, averages and routers stay float32.
        tf32: TF32 matrix products on GPUs: faster, less exact.
        compile: compile the blocks by torch.compile.
        activation_checkpointing: keep the inputs of blocks only, and compute the rest again in
            the backward pass: less memory, about a third more time.
        max_nonfinite_steps: steps with a non-finite loss or gradient are skipped; after so many
            in a row training stops.
        timeout: seconds to wait for data or for another process before training stops.
        async_checkpoint: copy the state to the CPU and write it while training goes on; without,
            training waits for the disk, and needs no memory for the copy.
        logger: where numbers are shown beside metrics.jsonl; wandb is an extra package.
        profile_steps: first and last step, from 0, whose trace the main process writes to
            run_dir/profile, on GPUs with every allocation; by default none.
    """

    max_steps: int = 700_000
    global_batch_size: int = 256
    micro_batch_size: int = 64
    log_every: int = 100
    ckpt_every: int = 50_000
    keep_last: int = 0
    keep_every: int = 0
    sample_every: int = 10_000
    num_grid_samples: int = 16
    val_every: int = 0
    num_val_samples: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    max_nonfinite_steps: int = 10
    timeout: int = 600
    async_checkpoint: bool = True
    logger: Literal["tensorboard", "wandb", "both"] = "tensorboard"
    profile_steps: tuple[int, int] | None = None


@dataclass
class ParallelConfig:
    """How several processes share the work.

    Attributes:
        strategy: `ddp` keeps everything on every process; `fsdp` shards weights, gradients,
            averages and optimizer state over them; `zero1` shards averages and optimizer state,
            and gathers the weights once for each step.
        shard_size: processes that hold one copy of a sharded model between them, such as the
            GPUs of a node (hybrid sharding); by default all.
        expert_parallel: every process keeps its share of the experts, and tokens travel to them,
            instead of weights to the tokens.
        param_dtype: numbers in which the weights of matrix products travel, where they are
            sharded: with `bf16` half as much does, and the products, which are in bf16 then too,
            stay what they are. Routers and all that sees the time keep float32.
        reduce_dtype: numbers in which gradients are added up over the processes; `bf16` rounds
            them. Where they are sharded, a step must have one micro-batch for it.
        prefetch: blocks whose weights are fetched while an earlier one computes, where they are
            sharded. By default the host runs ahead and asks for the next one by itself, which it
            cannot where a layer waits for the counts of its experts.
    """

    strategy: Literal["ddp", "fsdp", "zero1"] = "ddp"
    shard_size: int | None = None
    expert_parallel: bool = False
    param_dtype: Literal["fp32", "bf16"] = "fp32"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    prefetch: int = 0


@dataclass
class EvaluationConfig:
    """Scores of samples while training; too few samples to compare with a published FID.

    Attributes:
        every: steps between scores of the averaged weights; 0 turns them off.
        reference: `.npz` to compare with, see docs/evaluation.md.
        num_samples: images.
        batch_size: images in a block; routing over the batch depends on it.
        features: network whose features are compared.
        inception_weights: its weight file; downloaded by default.
        inception_sha256: that the file must have; by default that of the published one.
        classifier: weight file of features `digits`.
    """

    every: int = 0
    reference: str | None = None
    num_samples: int = 5000
    batch_size: int = 32
    features: Literal["inception", "digits"] = "inception"
    inception_weights: str | None = None
    inception_sha256: str | None = None
    classifier: str | None = None


@dataclass
class Config:
    """One run.

    Attributes:
        seed: of every random draw.
        device: `auto` takes the GPUs where there are any.
        run_dir: folder for checkpoints, logs and samples; by default runs/<name of the config>.
        resume: `auto` continues from the newest checkpoint of run_dir where there is one;
            `never` refuses to start in a run_dir that has checkpoints, unless torchrun restarted
            the processes after a failure.
        init_from: checkpoint whose averaged weights a new run starts from.
        init_fresh: what keeps its fresh weights then: nothing, the `labels` (another set of
            classes), the `head` (another output), `both`, or the `text` (a model of text from one
            of classes, or with another text encoder).
        init_upcycle: that checkpoint is of a dense model, of whose MLPs every expert is a copy, or
            a part where experts are narrower; routers and shared MLPs start fresh.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str | None = None
    resume: Literal["auto", "never"] = "never"
    init_from: str | None = None
    init_fresh: Literal["nothing", "labels", "head", "both", "text"] = "nothing"
    init_upcycle: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def moe_options(name: str, experts_per_token: float = 1.0) -> type[MoEConfig]:
    """The options of a layer that has none beside those of every MoE layer.

    Args:
        name: which feed-forward layer.
        experts_per_token: that compute a token in training, on average.
    """
    about = (
        "Mixture of experts with options of its own: none.\n\nAttributes:\n    name: which layer.\n"
    )
    members = {"__doc__": about, "experts_per_token": lambda self: experts_per_token}
    fields = [("name", Literal[name], field(default=name))]
    return make_dataclass("MoEOptions", fields, bases=(MoEConfig,), namespace=members)


FEED_FORWARDS = {
    "dense": DenseConfig,
    "token_choice": TokenChoiceConfig,
    "expert_choice": ExpertChoiceConfig,
    "diffmoe": DiffMoEConfig,
    "deepseek": DeepSeekConfig,
    "race": RaceConfig,
    "promoe": ProMoEConfig,
}

CHOICES = {"model.feed_forward": FEED_FORWARDS, "objective": OBJECTIVES}
"""Sections whose dataclass is picked by their `name` key."""
