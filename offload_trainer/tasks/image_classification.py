"""Task `image_classification`: the paper's convolutional networks on labelled images."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from offload_trainer.errors import UserError
from offload_trainer.tasks.images import SMALL, InMemory, OnDisk, channels_of
from offload_trainer.tasks.labelled import read_images
from offload_trainer.tasks.task import Shuffle, Task, random_stream
from offload_trainer.tasks.vision_models import SMALLEST_IMAGE, build_model, initialise

if TYPE_CHECKING:
    from offload_trainer.config import ImageClassification

ImageBatch = tuple[Tensor, Tensor]
"""Images (batch, channels, size, size) float32, normalised; labels (batch,) int64."""


def build(config: "ImageClassification", seed: int) -> Task:
    """The model on meta, with the data's number of channels; small images in memory, larger ones decoded as needed.

    Raises UserError for data that is missing, broken or does not fit the model.
    """
    smallest = SMALLEST_IMAGE.get(config.model, 1)
    if config.image_size < smallest:
        raise UserError(f"task.image_size ({config.image_size}) must be at least {smallest} for {config.model}")
    train, val, names = read_images(config.data)
    if config.classes is not None and config.classes < len(names):
        raise UserError(
            f"task.classes ({config.classes}) must be at least the {len(names)} classes in task.data ({config.data})"
        )
    train, val = train.first(config.limit), val.first(config.limit)
    channels = channels_of(train.items[0])
    source = InMemory if config.image_size <= SMALL else OnDisk
    train_images = source(train, config.image_size, channels, config.workers)
    val_images = source(val, config.image_size, channels, config.workers)
    mean, std = train_images.statistics()

    with torch.device("meta"):
        model = build_model(config.model, config.classes or len(names), channels, config.width)
    batches = TrainBatches(train_images, mean, std, config.batch_size, config.augment, seed)
    example = torch.linspace(-1, 1, 3 * channels * config.image_size**2)

    def loss(module: nn.Module, batch: ImageBatch) -> Tensor:
        """Mean cross-entropy in nats, with label smoothing, in float32."""
        return F.cross_entropy(module(batch[0]).float(), batch[1], label_smoothing=config.label_smoothing)

    return Task(
        model=model,
        example_inputs=(example.view(3, channels, config.image_size, config.image_size),),
        loss_fn=loss,
        metrics_fn=metrics,
        train=OneAhead(batches) if config.workers else batches,
        val=ValBatches(val_images, mean, std, config.batch_size),
        unit="images",
        count=lambda batch: len(batch[1]),
        parted=True,
        materialise=initialise,
        initialise=initialise,
    )


def metrics(module: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
    """`loss`: mean cross-entropy in nats, without smoothing; `accuracy`: the share of images classified right."""
    logits = module(batch[0]).float()
    return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": (logits.argmax(-1) == batch[1]).float().mean()}


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(batch, size, size, channels) uint8 → (batch, channels, size, size) float32, (pixels/255 − mean) / std.

    In memory the channels stay last, which convolutions then keep to: they are the faster for it, on CPU and GPU.
    """
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32)
    scale, shift = 1 / (255 * std), -mean / std
    return torch.addcmul(shift.view(-1, 1, 1), planes, scale.view(-1, 1, 1))


class TrainBatches(Dataset[ImageBatch]):
    """`train[step]`, every image once an epoch in a new order, augmented from a random stream of that step alone."""

    def __init__(self, source: InMemory | OnDisk, mean: Tensor, std: Tensor, batch_size: int, augment: bool, seed: int):
        self.source, self.mean, self.std = source, mean, std
        self.order = Shuffle(len(source.labels), batch_size, seed)
        self.augment, self.seed = augment, seed

    def __getitem__(self, step: int) -> ImageBatch:
        indices = self.order.indices(step)
        random = random_stream(self.seed, 1, step) if self.augment else None
        pixels = self.source.pixels(indices, random)
        return normalised(pixels, self.mean, self.std), self.source.labels[indices]


class ValBatches(Sequence[Any]):
    """All images in their order, centre-cropped; the last batch may be smaller."""

    def __init__(self, source: InMemory | OnDisk, mean: Tensor, std: Tensor, batch_size: int):
        self.source, self.mean, self.std = source, mean, std
        self.parts = torch.arange(len(source.labels)).split(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        indices = self.parts[index]
        pixels = self.source.pixels(indices, None)
        return normalised(pixels, self.mean, self.std), self.source.labels[indices]


class OneAhead(Dataset[ImageBatch]):
    """Makes the batch of the next step in a thread while this one is trained on; the batches are the same."""

    def __init__(self, batches: TrainBatches):
        self.batches = batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-ahead")
        self._futures: dict[int, Future[ImageBatch]] = {}

    def __getitem__(self, step: int) -> ImageBatch:
        self._futures = {
            wanted: self._futures.get(wanted) or self._thread.submit(self.batches.__getitem__, wanted)
            for wanted in (step, step + 1)
        }
        return self._futures[step].result()
