"""The task's section of the config: one model for each kind."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from offload_trainer.config.base import Count, Section


class CausalLM(Section):
    kind: Literal["causal_lm"]
    """The kind of task; it decides which other keys there are."""
    model: dict[str, Any] | str
    """A Hugging Face config as a map: a new model; or a local model folder (config.json, safetensors, tokenizer)."""
    data: str | list[str] = "stdlib"
    """Text files or folders of them; stdlib: the source of the running Python's own standard library."""
    tokenizer: str | None = None
    """A local Hugging Face tokenizer folder, or bytes: a vocabulary of 256. null: the one in the model's folder, and
    bytes for a new model."""
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
    """Threads that decode images; 0: none beside the training thread. Every rank decodes the whole batch of a step."""


class Custom(Section):
    kind: Literal["custom"]
    """The kind of task; it decides which other keys there are."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", examples=["package.module:function"])]
    """The function that returns the model, its data, loss and metric."""
    arguments: dict[str, Any] = Field(default={})
    """Keyword arguments of that function."""
