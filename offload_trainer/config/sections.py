"""The sections of the config as frozen pydantic models: every key with its unit, default and rule.

A rule that spans keys names them all, dotted, with their values; `explaining` words the others.
"""

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Rule = Annotated[str, Field(pattern=r"^[^:]+:\d+(:\d+){0,2}$", examples=["tensor:axis[:block[:offset]]"])]


def shown(value: object) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # a folder may be called 2026
    )


class CausalLM(Section):
    kind: Literal["causal_lm"]
    """The kind of task; it decides which other keys there are."""
    model: dict[str, Any] | str
    """A Hugging Face config as a map, or a local model folder (config.json, weights if it has any)."""
    data: str | list[str] = "stdlib"
    """Text files or folders of them; stdlib: the source of the running Python's own standard library."""
    tokenizer: str | None = None
    """A local Hugging Face tokenizer folder; null: bytes, a vocabulary of 256."""
    sequence: Annotated[int, Field(gt=1)]
    """Tokens per sequence."""
    batch_size: Count
    """Sequences per optimizer step, over all processes."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the files that is held out for validation."""
    val_batches: Count = 20
    """Batches that one evaluation reads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.model, dict) and "model_type" not in self.model:
            raise ValueError(f"task.model ({self.model}) must name its model_type, such as model_type: llama")
        return self


class ImageClassification(Section):
    kind: Literal["image_classification"]
    """The kind of task; it decides which other keys there are."""
    model: Literal["vgg19_bn", "resnet32", "wrn28_10", "resnet50"]
    """The network."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Factor on every channel count of the network."""
    data: str
    """An imagefolder (train/CLASS and test/CLASS or val/CLASS) or a .tar.gz of one, a folder of idx files, or
    a data set on the Hugging Face hub."""
    image_size: Count = 32
    """Height and width of an image, in pixels."""
    batch_size: Count
    """Images per optimizer step, over all processes."""
    augment: bool = True
    """Random crops and flips of the training images."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""
    classes: Annotated[int, Field(gt=1)] | None = None
    """Number of classes; null: counted in the data."""
    limit: Count | None = None
    """Only the first so many images, for quick runs; null: all."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images; 0: none beside the training process."""


class Custom(Section):
    kind: Literal["custom"]
    """The kind of task; it decides which other keys there are."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["package.module:function"])]
    """The function that returns the model, its data, loss and metric."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of that function."""


class StructureConfig(Section):
    """Which units are kept, and how that is learned."""

    keep: Share = 0.25
    """Keep ratio: share of the units of a group that the subnet has."""
    groups: dict[str, Share | None] | None = None
    """Which groups are sampled: name pattern to keep ratio (null: structure.keep), the first match wins; a
    group of ratio 1 or without a match stays whole. null: every group, at structure.keep."""
    rules: dict[str, list[Rule]] | None = None
    """Groups written by hand, group name to its slots; null: found by tracing the model."""
    pin_unknown: bool = False
    """Leave unsliced what an op without a tracing rule touches, instead of stopping at it."""
    estimator: Literal["rloo", "vr_pge"] = "rloo"
    """Gradient of the probabilities s (rloo has half the variance of the paper's vr_pge)."""
    alpha: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """Exponent of the preconditioner (s(1-s))^alpha."""
    sampler: Literal["fixed", "bernoulli"] = "fixed"
    """fixed: exactly so many units of each group; bernoulli: each unit by itself, widths vary (the paper)."""
    budget: Literal["per_group", "global"] = "per_group"
    """Whether the keep ratio holds in each group or over all units."""
    min_units: Count = 1
    """Units that a group keeps at least."""
    lr: Annotated[float, Field(ge=0)] = 12e-3
    """Adam's learning rate for s; 0: s stays uniform."""
    paired_batches: Count = 4
    """Batches at the start of a round on which a second subnet is compared, at most sync_every (which is the paper)."""
    schedule: Literal["constant", "cubic"] = "constant"
    """Course of the keep ratio; cubic: from structure.start_keep down to the keep ratio."""
    start_keep: Share | None = None
    """Keep ratio at step 0, for the cubic schedule."""
    schedule_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps that the cubic schedule takes."""
    settle: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run, at its end, in which s is frozen and the subnet of the largest s is trained."""
    result: Literal["top", "best_of"] = "top"
    """The exported subnet: the units of the largest s, or the draw of least training loss."""
    samples: Count = 8
    """Subnets that best_of draws."""
    result_batches: Count = 8
    """Training batches that choose the result and recalibrate its BatchNorm statistics."""
    pin_unknown: bool = False
    """Leave whatever an op without a rule touches unsliced, instead of stopping with an error."""
    verify: bool = True
    """Prove before training that the sliced model computes what the gated one does."""

    @property
    def ratios(self) -> dict[str, float] | None:
        """`groups` with every null replaced by `keep`: name pattern → keep ratio."""
        if self.groups is None:
            return None
        return {pattern: ratio or self.keep for pattern, ratio in self.groups.items()}

    @property
    def uses_keep(self) -> bool:
        """Whether any group is sampled at `keep`."""
        return self.groups is None or None in self.groups.values()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups == {}:
            raise ValueError("structure.groups ({}) must have a pattern, or nothing would be sampled")
        if "keep" in self.model_fields_set and not self.uses_keep:
            raise ValueError(
                f"structure.keep ({self.keep}) has no effect: in structure.groups ({self.groups})"
                " every pattern has a ratio of its own; null would follow structure.keep"
            )
        if self.schedule == "cubic" and (self.start_keep is None or self.schedule_steps == 0):
            raise ValueError(
                f"structure.schedule (cubic) needs structure.start_keep ({shown(self.start_keep)}) in (0, 1]"
                f" and structure.schedule_steps ({self.schedule_steps}) > 0"
            )
        if self.schedule == "constant" and (self.start_keep is not None or self.schedule_steps > 0):
            raise ValueError(
                f"structure.start_keep ({shown(self.start_keep)}) and structure.schedule_steps"
                f" ({self.schedule_steps}) need structure.schedule (constant) to be cubic"
            )
        return self


class OptimizerConfig(Section):
    """How the weights are trained."""

    kind: Literal["sgd", "adamw"] = "adamw"
    """The optimizer of the subnet."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd, per step."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of adamw's two moments, per step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay; sgd: added to every gradient, adamw: decoupled, of matrices alone."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after the warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step, as a share of the peak."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the subnet's gradient; null: not clipped."""
    state: Literal["carry", "reset"] = "carry"
    """Optimizer state of units that leave the subnet: kept on the host, or forgotten at each round."""


class MemoryConfig(Section):
    """What the device holds and how it computes."""

    autocast: Literal["no", "bf16"] = "no"
    """bf16: forward and backward in bfloat16, weights stay in their own type."""
    compile: bool = False
    """torch.compile the subnet (once: fixed widths only)."""

    @field_validator("autocast", mode="before")
    @classmethod
    def _no(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of a bare `no`


class CheckpointConfig(Section):
    """What a stopped run can be resumed from."""

    every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two checkpoints, rounded to whole rounds; 0: only at the end."""
    keep_last: Count = 2
    """Checkpoints kept; older ones are removed."""


class TrackConfig(Section):
    """What is reported while training."""

    log_every: Count = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two evaluations, rounded to whole rounds; 0: only at the end."""
    trackers: list[str] = []
    """Accelerate's trackers to report to, such as tensorboard or wandb."""
    display: Literal["auto", "rich", "plain"] = "auto"
    """rich: a live view; plain: lines; auto: rich on a terminal."""


class Config(Section):
    """The run."""

    steps: Count
    """Optimizer steps."""
    sync_every: Count = 50
    """Optimizer steps between two samplings (K): the length of a round."""
    out: str = "runs/run"
    """Output folder; by default runs/ and the name of the config file."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of the data and the samples."""
    resume: str | None = None
    """A checkpoint folder, or auto: the newest complete checkpoint in the output folder, if there is one."""
    dry_run: bool = False
    """Print the groups and the memory they take, then stop."""
    task: Annotated[CausalLM | ImageClassification | Custom, Field(discriminator="kind")]
    structure: StructureConfig = StructureConfig()
    optimizer: OptimizerConfig
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    def to_yaml(self) -> str:
        """The whole config, defaults included, as a file from which `parse` makes the same config."""
        tree = self.model_dump(mode="json")
        if not self.structure.uses_keep:
            del tree["structure"]["keep"]
        return yaml.safe_dump(tree, sort_keys=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        paired, cubic_steps = self.structure.paired_batches, self.structure.schedule_steps
        if paired > self.sync_every and "paired_batches" in self.structure.model_fields_set:
            raise ValueError(f"structure.paired_batches ({paired}) must be <= sync_every ({self.sync_every})")
        if cubic_steps > self.steps:
            raise ValueError(f"structure.schedule_steps ({cubic_steps}) must be <= steps ({self.steps})")
        if self.structure.sampler == "bernoulli" and self.memory.compile:
            raise ValueError(
                "memory.compile (true) needs structure.sampler (bernoulli) to be fixed:"
                " a compiled subnet cannot change its widths"
            )
        return self
