"""The sections of the config as frozen pydantic models: every key with its unit, default and rule.

A rule that spans keys names them all, dotted, with their values; `explaining` words the others.
"""

import math
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from offload_trainer.config.base import Count, Section, Share, Size, shown
from offload_trainer.config.task_sections import CausalLM, Custom, ImageClassification

Rule = Annotated[str, Field(pattern=r"^[^:]+:\d+(:\d+){0,2}$", examples=["tensor:axis[:block[:offset]]"])]


class StructureConfig(Section):
    """Which units are kept, and how that is learned."""

    keep: Share | None = None
    """Keep ratio: share of the units of a group that the subnet has; null: the largest that fits memory.device, or
    0.25 where that is null too."""
    groups: dict[str, Share | None] | None = None
    """Which groups are sampled: name pattern to keep ratio (null: structure.keep), the first match wins; a
    group of ratio 1 or without a match stays whole. null: every group, at structure.keep."""
    rules: dict[str, list[Rule]] | None = None
    """Groups written by hand, group name to its slots; null: found by tracing the model."""
    pin_unknown: bool = False
    """Leave unsliced what an op without a tracing rule touches, instead of stopping at it."""
    estimator: Literal["rloo", "vr_pge", "disarm", "credit", "magnitude"] = "rloo"
    """Gradient of the probabilities s, from the losses of two subnets (rloo has half the variance of the paper's
    vr_pge; disarm compares subnets as different as can be). credit: no second subnet; s follows what the backward
    passes say of each unit, which is cheap and biased; magnitude: s follows the size of the weights that read it."""
    control: Literal["none", "linear"] = "none"
    """linear: less variance: what earlier pairs and backward passes predict of the difference of the two losses is
    taken out of it, as far as they were right lately, and its known mean added to the gradient."""
    alpha: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """Exponent of the preconditioner (s(1-s))^alpha."""
    sampler: Literal["fixed", "bernoulli"] = "fixed"
    """fixed: exactly so many units of each group; bernoulli: each unit by itself, widths vary (the paper)."""
    budget: Literal["per_group", "global"] = "per_group"
    """Whether the keep ratio holds in each group or over all units."""
    min_units: Count = 1
    """Units that a group keeps at least."""
    multiple_of: Count = 1
    """Every sliced axis of a matrix is a multiple of so many elements, such as 64; heads count whole."""
    start: Literal["uniform", "importance", "random"] = "uniform"
    """s at the start: uniform: the keep ratio everywhere; importance: by how much each unit of the (pretrained) model
    contributes on calibration batches; random: as importance, with the units in random order."""
    explore: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """For a start that is not uniform, and for estimators credit and magnitude: expected share of a subnet's units that
    are not among the most important. With those two it falls to next to nothing until the run settles, if it does."""
    calibration_batches: Count = 4
    """Training batches on which importance is measured."""
    stand_in: bool = True
    """With start importance and settle 1, where one subnet is trained throughout: the weights by which linear layers
    read it change, so that what it keeps stands in for what it leaves out (by least squares on the calibration
    batches). The full master is not the pretrained model any more then."""
    rescale: bool = True
    """Scale random initial weights as a network as narrow as the subnet would have them, not one as wide as the master;
    by the first subnet's widths."""
    lr: Annotated[float, Field(ge=0)] = 12e-3
    """Adam's learning rate for s; 0: s stays as it starts. Not for estimators credit and magnitude."""
    reference: Literal["next", "fresh"] = "next"
    """What a subnet is compared with: the one that is trained next (drawn two rounds ahead), or one drawn for this
    alone, so that rounds cannot overlap."""
    paired_batches: Count = 1
    """Batches at the start of a round on which a second subnet is compared, at most sync_every (which is the paper).
    The first finds both equally fresh, and more of them tell little more: the noise is of the masks."""
    schedule: Literal["constant", "cubic"] = "constant"
    """Course of the keep ratio; cubic: from structure.start_keep down to the keep ratio."""
    start_keep: Share | None = None
    """Keep ratio at step 0, for the cubic schedule."""
    schedule_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps that the cubic schedule takes."""
    settle: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the run, in whole rounds at its end, in which s is frozen and the subnet of the largest s is trained; 1:
    all of it."""
    result: Literal["top", "best_of"] = "top"
    """The exported subnet: the units of the largest s, or the draw of least training loss."""
    samples: Count = 8
    """Subnets that best_of draws."""
    result_batches: Count = 8
    """Training batches that choose the result and recalibrate its BatchNorm statistics."""
    verify: bool = True
    """Prove before training that the sliced model computes what the gated one does."""

    @property
    def share(self) -> float:
        """`keep`, or its default."""
        return self.keep or 0.25

    @property
    def ratios(self) -> dict[str, float] | None:
        """`groups` with every null replaced by `keep`: name pattern → keep ratio."""
        if self.groups is None:
            return None
        return {pattern: ratio or self.share for pattern, ratio in self.groups.items()}

    @property
    def uses_keep(self) -> bool:
        """Whether any group is sampled at `keep`."""
        return self.groups is None or None in self.groups.values()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups == {}:
            raise ValueError("structure.groups ({}) must have a pattern, or nothing would be sampled")
        if self.keep is not None and not self.uses_keep:
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
    """What host and device hold, and how the device computes."""

    device: Size | Literal["auto"] | None = None
    """Device memory that the run may take, such as 8GiB, or auto: what is free at the start; null: whatever it needs.
    Decides structure.keep where that is null."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Type of the master's weights. With bf16 the device still trains in fp32, and write-back rounds at random so that
    the expected value is exact."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Type of the master's moments, in the same way."""
    autocast: Literal["no", "bf16"] = "no"
    """bf16: forward and backward in bfloat16, weights stay in their own type."""
    master: Literal["ram", "file"] = "ram"
    """Where the master lies; file: in files mapped from memory.folder, so that it may be larger than the memory."""
    folder: str | None = None
    """A folder on a fast local disk, for memory.master: file; null: the output folder."""
    transfer: Literal["auto", "plain", "native"] = "auto"
    """Who moves elements between master and staging: torch (plain), kernels that are compiled on first use (native), or
    the faster of both, tried at the start."""
    overlap: bool = True
    """Write back and gather in the background while a round trains, with the same results; widths must be fixed and
    structure.reference next. Takes host memory for two subnets with their moments."""
    recompute: bool = False
    """Activation checkpointing, of transformers' models: layers are computed again in the backward pass, which takes
    longer, instead of keeping what they computed."""
    compile: bool = False
    """torch.compile the subnet (once: fixed widths only)."""
    cuda_graphs: bool = False
    """Replay what was compiled as CUDA graphs, which spares the host launching each kernel; needs memory.compile."""

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


class ExportConfig(Section):
    """What a finished run leaves beside its checkpoints."""

    shard_size: Size = "5GB"
    """Largest size of one safetensors file; beyond it there are several, and an index."""
    full: bool = False
    """Save the full master too, as a model folder named full."""


class TrackConfig(Section):
    """What is reported while training."""

    log_every: Count = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between two evaluations, rounded to whole rounds; 0: only at the end."""
    structure_every: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps between two pictures of s, widths and coverage in metrics.jsonl, rounded to whole rounds; 0: none
    but the last."""
    trackers: list[str] = Field(default=[])
    """Accelerate's trackers to report to, such as tensorboard or wandb."""
    display: Literal["auto", "rich", "plain"] = "auto"
    """rich: a live view; plain: lines; auto: rich on a terminal."""


class Config(Section):
    """The run."""

    steps: Count
    """Optimizer steps."""
    sync_every: Count = 50
    """Optimizer steps between two samplings (K): the length of a round."""
    micro_batches: Count = 1
    """Parts in which each process takes its share of a step's batch, one after the other: less device memory."""
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
    export: ExportConfig = ExportConfig()
    track: TrackConfig = TrackConfig()

    @property
    def exploring_steps(self) -> int:
        """Optimizer steps before the run settles, in whole rounds."""
        steps = self.steps - math.floor(self.steps * self.structure.settle + 1e-9)
        return -(-steps // self.sync_every) * self.sync_every

    def to_yaml(self) -> str:
        """The whole config, defaults included, as a file from which `parse` makes the same config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        paired, cubic_steps = self.structure.paired_batches, self.structure.schedule_steps
        if paired > self.sync_every:
            raise ValueError(f"structure.paired_batches ({paired}) must be <= sync_every ({self.sync_every})")
        if cubic_steps > self.steps:
            raise ValueError(f"structure.schedule_steps ({cubic_steps}) must be <= steps ({self.steps})")
        if self.memory.folder is not None and self.memory.master == "ram":
            raise ValueError(f"memory.folder ({self.memory.folder}) needs memory.master (ram) to be file")
        if self.memory.cuda_graphs and not self.memory.compile:
            raise ValueError("memory.cuda_graphs (true) needs memory.compile (false) to be true")
        if self.memory.cuda_graphs and self.micro_batches > 1:
            raise ValueError(
                f"memory.cuda_graphs (true) needs micro_batches ({self.micro_batches}) to be 1: a second backward pass"
                " would overwrite the gradients of the first"
            )
        for key, value, other in (
            ("sampler", "bernoulli", "fixed"),
            ("budget", "global", "per_group"),
            ("schedule", "cubic", "constant"),
        ):
            if getattr(self.structure, key) == value and self.memory.compile:
                raise ValueError(
                    f"memory.compile (true) needs structure.{key} ({value}) to be {other}:"
                    " a compiled subnet cannot change its widths"
                )
        return self
