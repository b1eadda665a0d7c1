"""One typed configuration tree: YAML file + dotted overrides -> frozen `Config`. Unknown keys fail.

Read once at the entry point, then passed down; a constructor takes only its own part. The resolved tree is stored in every
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ssacl.changes import Change, ascending, changed_trees
from ssacl.dotted import apply_override
from ssacl.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AugmentConfig(_Section):
    """Augmentation of training images; laterality stays true unless `flip` is "naive"."""

    rotate_deg: float = Field(10.0, ge=0, le=45, description="Rotation is uniform in +- this many degrees.")
    scale: tuple[float, float] = Field((0.9, 1.1), description="Scale is uniform in this range.")
    shift: Fraction = Field(0.05, description="Shift is uniform in +- this share of the image side.")
    brightness: Fraction = Field(0.1, description="Brightness and contrast jitter, uniform in +- this share.")
    flip: Literal["none", "laterality_swap", "naive"] = Field(
        "none", description='"laterality_swap" mirrors image, labels and words together; "naive" is the release\'s bug, for ablation.'
    )


class DataConfig(_Section):
    """Where the shards are and how a sample becomes a training row."""

    url: str = Field("", description="Data set root: a folder, or s3://bucket/prefix (endpoint and keys from AWS_* variables).")
    tokenizer_url: str = Field(
        "", description="Folder or s3:// prefix with wordpiece.json and language_model/; empty: beside the data set."
    )
    text_max_tokens: Count = Field(100, description="Longest text-encoder input, in tokens.")
    lm_max_tokens: Count = Field(100, description="Longest prompt, and longest report, for the language model in training, in tokens.")
    entity_prompt_share: Fraction = Field(0.5, description="Probability that the entities are put before the report in training.")
    entity_prompt_sides: bool = Field(
        False, description="Entities on one side are named with it, 'left Pleural Effusion'; not so in the release."
    )
    entity_prompt_coin: Literal["sample", "batch"] = Field("sample", description="What the coin is tossed for; per batch, as released.")
    shuffle_sentences: bool = Field(True, description="Shuffle and randomly truncate the sentences of the contrastive text.")
    uncertain: Literal["present", "absent", "ignore"] = Field("present", description="What an uncertain finding counts as.")
    sections: Literal["findings", "impression", "both"] = Field("both", description="Which report sections are the training text.")
    augment: AugmentConfig = AugmentConfig()
    warp_rotate_deg: float = Field(15.0, ge=0, le=90, description="Warp of the masked pass: rotation in +- degrees.")
    warp_log_scale: float = Field(0.25, ge=0, le=1, description="Warp of the masked pass: scale e^(+- this).")
    warp_shift: Fraction = Field(0.3, description="Warp of the masked pass: shift in +- half-widths.")
    num_loader_threads: int = Field(2, ge=0, description="Threads (or processes) per rank that decode ahead; 0: in the training thread.")
    loader_kind: Literal["threads", "processes"] = Field(
        "threads", description="What decodes; processes do not wait for the interpreter, and start in some seconds."
    )
    prefetch_batches: Count = Field(4, description="Micro batches per rank that are read, decoded or waiting, at most.")
    num_reader_threads: Count = Field(8, description="Range reads at a time, per rank.")
    read_ahead_mb: float = Field(384.0, ge=0, description="Encoded samples per rank that are read beside others and not yet due, in MiB.")
    cache_mb: float = Field(256.0, ge=0, description="Encoded samples per rank kept for later epochs, in MiB; 0: none.")
    shuffle_lanes: Count = Field(256, description="Blocks that batches are dealt from at a time, over all ranks; see ssacl/data/order.py.")
    shuffle_block: Count = Field(16, description="Neighbours in a shard that are read together; 1: every sample by itself, any order.")
    last_batch: Literal["drop", "wrap"] = Field(
        "drop", description="The last partial global batch of an epoch: dropped, or filled from its start."
    )
    max_bad_samples: int = Field(100, ge=0, description="Different damaged samples that a rank skips before the run stops.")


def _require_divisible(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} heads")


class VisionConfig(_Section):
    """Patch encoder and pixel decoder (METHOD section 2). Defaults: the released base size."""

    image_size_px: Count = Field(224, description="Side of the square input, in pixels.")
    patch_size_px: Count = Field(16, description="Side of a patch, in pixels.")
    width: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    mlp_ratio: float = 4.0
    decoder_width: Count = Field(768, description="`official` needs it equal to `width`.")
    decoder_depth: Count = 4
    decoder_num_heads: Count = 6
    target_scale: Literal[1, 2] = Field(1, description="2: reconstruct a target of twice the side (the release's super-resolution).")
    position_table: Literal["mae", "official"] = Field(
        "mae", description="Exponents of the fixed sin-cos table: MAE's 2i/d, or the release's i/(2d)."
    )

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.image_size_px % self.patch_size_px:
            raise ValueError(f"image_size_px {self.image_size_px} is not a multiple of patch_size_px {self.patch_size_px}")
        for width, heads in ((self.width, self.num_heads), (self.decoder_width, self.decoder_num_heads)):
            _require_divisible(width, heads)
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size_px // self.patch_size_px

    @property
    def num_patches(self) -> int:
        return self.grid**2


class TextConfig(_Section):
    """Text encoder: a BERT. Defaults: the released base size."""

    width: Count = 384
    depth: Count = 6
    num_heads: Count = 6
    ffn_width: Count = 1536
    vocab_size: Count = Field(30000, description="Upper bound; the tokenizer's own size is used when it is smaller.")
    max_tokens: Count = 100
    dropout: Fraction = 0.1

    @model_validator(mode="after")
    def _divides(self) -> TextConfig:
        _require_divisible(self.width, self.num_heads)
        return self


class LanguageConfig(_Section):
    """Report decoder: a causal LM that takes `inputs_embeds`."""

    name_or_path: str = Field(
        "", description="Hugging Face folder or name (weights + config + tokenizer); empty: a GPT-2 of the sizes below, from scratch."
    )
    width: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    vocab_size: Count = Field(50257, description="Upper bound; the tokenizer's own size is used when it is smaller.")
    max_positions: Count = Field(1024, description="Longest prefix + prompt + report, in slots.")
    dropout: Fraction = 0.1
    lora_rank: int = Field(0, ge=0, description="LoRA rank; 0 trains the whole language model.")

    @model_validator(mode="after")
    def _divides(self) -> LanguageConfig:
        _require_divisible(self.width, self.num_heads)
        return self


class ModelConfig(_Section):
    wiring: Literal["paper", "official"] = Field(
        "paper", description="Passes and normalisations of METHOD section 4; `official` reproduces the release."
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    language: LanguageConfig = LanguageConfig()
    findings_in_prefix: bool = Field(
        False,
        description="`paper` wiring: leaf slots of the report's prefix also say which findings show there, so that words get their side. "
        "The stage `findings` then comes before `generation`, and the encoder is frozen in it.",
    )
    findings_from_pooled: bool = Field(
        False,
        description="The findings head reads the encoder's pooled features too, as in the paper's test stage (`official`: always); where "
        "films are few, they remember films.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute the blocks of encoder and language model in the backward pass to save memory."
    )


class GroundingConfig(_Section):
    """The extension of METHOD section 8; one weight per term, 0 turns it off."""

    enabled: bool = Field(True, description="Off in the `official` recipe.")
    equivariance: Weight = Field(2.0, description="The masked pass' attention follows the warp of its picture.")
    centroid: Weight = Field(4.0, description="The same for the attention's centroids.")
    slots: Weight = Field(1.0, description="Leaves that do not overlap attend to different patches.")
    compactness: Weight = Field(0.0, description="Variance of the attention; `shape` knows better how wide a map should be.")
    order: Weight = Field(1.0, description="Left-of, above, medial-of, level-with, as the names say.")
    layout_chart: Weight = Field(3.0, description="Centroids are an affine image of the atlas' chart.")
    pose_range: Weight = Field(3.0, description="That affine image is neither flattened nor mirrored.")
    mean_layout: Weight = Field(1.0, description="The average patient is in the middle, at the chart's size.")
    shape: Weight = Field(0.5, description="Maps have the extent of the atlas' drawing, laid where the centroids say.")
    hierarchy: Weight = Field(0.1, description="Inner nodes attend where their leaves do.")
    region_text: Weight = Field(0.1, description="Regions beside the sentences that speak of them.")
    entities: Weight = Field(0.5, description="Findings of the leaves, from the report.")
    ramp_share: Fraction = Field(0.1, description="Geometric terms rise from 0 to their weight over this share of the stage.")


class LossConfig(_Section):
    """The five weights and what shapes the losses (METHOD section 4)."""

    image_reconstruction: Weight = 1.0
    global_contrastive: Weight = 0.15
    language_model: Weight = 1.0
    anatomy_reconstruction: Weight = 1.0
    anatomical_consistency: Weight = 1.0
    initial_tau: float = Field(1 / 0.03, gt=0, description="Initial logit scale, shared by both contrastive losses.")
    soft_target_share: Fraction = Field(0.1, description="Share of the text similarity in the target of the anatomical consistency.")
    soft_target_temperature: float | None = Field(None, description="Own logit scale of the soft target; none: the shared tau.")
    soft_target: Literal["official", "across_samples", "identity"] = Field(
        "official", description="Target of the anatomical consistency; see docs/DECISIONS.md."
    )
    mask_ratio: float = Field(0.5, gt=0, lt=1, description="Share of patches removed in the masked pass.")
    normalised_pixels: bool = Field(False, description="Per-patch normalised reconstruction target.")
    recursive_anatomy: bool = Field(True, description="`paper` wiring: restored inner nodes stand for themselves one level up.")
    balance: Literal["fixed", "uncertainty"] = "fixed"
    grounding: GroundingConfig = GroundingConfig()


class OptimConfig(_Section):
    """AdamW, warm-up and cosine."""

    lr: float = Field(2.5e-4, gt=0)
    lm_lr_scale: float = Field(0.25, gt=0, description="Language-model learning rate, as a share of `lr`.")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Weight = Field(0.05, description="Not applied to 1-D tensors.")
    warmup_share: Fraction = Field(0.04, description="Share of a stage's steps spent warming up from 1e-6.")
    clip_norm: float = Field(1.0, ge=0, description="Global gradient norm; 0: no clipping.")


class EngineConfig(_Section):
    kind: Literal["torch", "deepspeed"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Arithmetic of matrix products; auto: bf16 where every rank's hardware multiplies it, else fp32."
    )
    offload: Literal["none", "cpu"] = "none"
    global_batch_size: int = Field(
        0,
        ge=0,
        description="Samples per optimizer step over all ranks, kept at any number of train workers: micro_batch_size follows from it; "
        "0: micro_batch_size x train workers x accumulation_steps.",
    )
    micro_batch_size: Count = Field(32, description="Samples per rank and forward pass.")
    accumulation_steps: Count = Field(1, description="Forward passes per optimizer step.")
    compile: bool = Field(False, description="torch.compile the blocks of encoder and pixel decoder.")

    @model_validator(mode="after")
    def _runs(self) -> EngineConfig:
        sharded = self.kind == "deepspeed" and self.zero_stage > 0
        if self.offload == "cpu" and not sharded:
            raise ValueError("offload=cpu moves ZeRO's shards of the optimizer: it needs kind=deepspeed and zero_stage 1, 2 or 3")
        if self.precision == "fp16" and self.kind == "deepspeed":
            raise ValueError("precision=fp16 needs a loss scale, which only kind=torch sets: use that, or bf16")
        return self


class StageConfig(_Section):
    """One training stage (METHOD section 4, last paragraph)."""

    kind: Literal["contrastive", "text", "generation", "findings", "joint"]
    num_steps: int = Field(0, ge=0, description="Optimizer steps; 0: use num_epochs.")
    num_epochs: float = Field(0, ge=0)
    lr: float | None = Field(None, gt=0, description="Overrides optim.lr in this stage.")
    freeze_encoder: bool = Field(False, description="`generation`: train the language side only.")

    @model_validator(mode="after")
    def _has_length(self) -> StageConfig:
        if (self.num_steps > 0) == (self.num_epochs > 0):
            raise ValueError(f"stage '{self.kind}' needs either num_steps or num_epochs")
        return self


class RunConfig(_Section):
    name: str = Field("ssacl", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="The same name on the same storage resumes.")
    storage_url: str = Field("runs", description="Folder or s3:// prefix for checkpoints and metrics.")
    seed: int = 0
    init_from: str = Field(
        "", description="Model folder (or s3:// prefix of one) whose weights and tokenizers the run starts from; empty: from scratch."
    )
    init_encoder_from: str = Field(
        "", description="MAE ViT checkpoint (.pth file) whose encoder the run starts from; empty: from scratch, or init_from's."
    )
    num_train_workers: Count | tuple[Count, Count] = Field(
        1, description="Ray Train workers; a pair is an elastic (min, max): as many as the cluster has room for, which may change."
    )
    resize_check_s: float = Field(
        60.0, gt=0, description="An elastic group looks for more room this often, in seconds; to grow, it starts again at its checkpoint."
    )
    node_wait_s: float = Field(0.0, ge=0, description="Seconds that a growing cluster may take to make room; 0: refuse at once.")
    cpus_per_train_worker: float = 1.0
    use_gpu: bool = False
    gpus_per_train_worker: float = Field(1.0, gt=0, le=1, description="A share: runs of a sweep side by side on one GPU.")
    stages: tuple[StageConfig, ...] = (
        StageConfig(kind="contrastive", num_epochs=30),
        StageConfig(kind="generation", num_epochs=20),
        StageConfig(kind="findings", num_epochs=5),
    )
    changes: Annotated[tuple[Change, ...], AfterValidator(ascending)] = Field(
        (), description="Half way, other values: [{after_steps: 500, values: {optim.lr: 1.0e-4}}]; docs/SWEEPS.md says which keys can."
    )
    checkpoint_every_steps: Count = 500
    asynchronous_checkpoints: bool = Field(
        True,
        description="Training goes on while a checkpoint is uploaded; costs each rank's machine the memory of its part of the state.",
    )
    validate_every_steps: Count = Field(500, description="Validation is the only thing that chooses a checkpoint.")
    num_figure_films: int = Field(
        0, ge=0, description="First validation films whose reports and maps are scored at each validation, beside its losses; 0: none."
    )
    keep_last: Count = 2
    log_every_steps: Count = 10
    hang_limit_s: float = Field(
        1800.0, ge=0, description="Longest time of one step, validation or checkpoint, in seconds, before the process ends; 0: no limit."
    )
    max_restarts: int = Field(3, ge=0, description="Times a failed worker group, or Ray Train's controller, is started again.")
    storage_patience_s: float = Field(
        300.0, ge=0, description="Longest time that object storage which is away is waited for in the middle of a run, in seconds."
    )

    @model_validator(mode="after")
    def _ascends(self) -> RunConfig:
        workers = self.num_train_workers
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"num_train_workers {list(workers)} is (min, max): give the smaller number first")
        if self.gpus_per_train_worker < 1 and workers != 1:
            raise ValueError("gpus_per_train_worker below 1 needs num_train_workers: 1, as NCCL takes no two ranks of a run on one GPU")
        return self


class Config(_Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    losses: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _changes_fit(self) -> Config:
        if self.run.changes:
            for _, tree in changed_trees(self.model_dump(mode="json")):
                parse_config(tree)
        return self

    def to_yaml(self) -> str:
        """The resolved tree as YAML, readable by `load_config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or the defaults) and apply `key.sub=value` overrides; values are parsed as YAML.

    Raises
    ------
    ConfigError
        The file cannot be read, a key is unknown, or a value has the wrong type or range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}. Presets are in configs/.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections (data, model, losses, optim, engine, run).")
        tree = loaded
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a plain tree; see `load_config` for the errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from error


def _explain(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg']} (got {item['input']!r})"
    section: Any = Config
    for part in item["loc"][:-1]:
        section = section.model_fields[part].annotation if isinstance(part, str) and hasattr(section, "model_fields") else None
    known = f" Known keys there: {', '.join(section.model_fields)}." if hasattr(section, "model_fields") else ""
    return f"unknown key '{where}'.{known}"
