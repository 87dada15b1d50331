"""From encoded images to batches of pixels: small images decoded once, large ones each time; crops and flips."""

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.tasks.labelled import Item, LabelledImages

SMALL = 64
"""Pixels a side up to which a dataset is decoded once and kept in memory."""
_PADDING = 4
"""Black pixels on each side of a small image before its random crop."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's red, green and blue, in [0, 1]."""
_VAL_SHARE = 224 / 256
"""Side of the validation crop of a large image, as a share of the shorter side."""
_CROP_ATTEMPTS = 10

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels."""


def decode(item: Item) -> Image.Image:
    """The image of an item. Raises UserError, naming the file, if it is broken."""
    if isinstance(item, np.ndarray):
        return Image.fromarray(item)
    try:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
        image.load()
        return _in_bytes(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        name = item if isinstance(item, str) else f"of {len(item)} bytes"
        raise UserError(f"task.data: the image {name} cannot be decoded ({error})") from error


def _in_bytes(image: Image.Image) -> Image.Image:
    """Of 16 bits a pixel the upper 8, as Pillow itself reads colours of 16: its conversions would clip them to white.

    Raises ValueError for pixels whose range is not known, such as those of 16 bits that use only the lower 8.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen and (pixels.max() > 255 or not pixels.any()):
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "I" and not sixteen and pixels.min() >= 0 and pixels.max() <= 255:
        return Image.fromarray(pixels.astype(np.uint8))
    kind = "floating-point numbers" if image.mode == "F" else "16-bit numbers" if sixteen else "32-bit numbers"
    raise ValueError(f"its pixels are {kind} of no known range: save it with 8 bits a channel, or all 16 of them used")


def channels_of(item: Item) -> int:
    """1 for a grey image, 3 for any other: what all images of its dataset are converted to."""
    return 1 if decode(item).mode in ("1", "L", "LA") else 3


def centre_box(width: int, height: int, share: float = 1.0) -> Box:
    """The square in the middle whose side is `share` of the shorter side."""
    side = share * min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(width: int, height: int, draws: np.ndarray) -> Box:
    """A crop of 8–100% of the area and an aspect ratio of 3/4–4/3 (Szegedy et al. 2015), from uniform numbers.

    draws: (attempts, 4) in [0, 1); the first attempt that fits inside is taken, else the centre square.
    """
    for area, ratio, x, y in draws.tolist():
        pixels, aspect = (0.08 + 0.92 * area) * width * height, 0.75 * (16 / 9) ** ratio
        crop_width, crop_height = (pixels * aspect) ** 0.5, (pixels / aspect) ** 0.5
        if crop_width <= width and crop_height <= height:
            left, upper = x * (width - crop_width), y * (height - crop_height)
            return left, upper, left + crop_width, upper + crop_height
    return centre_box(width, height)


def crop_and_flip(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Random crops after padding by 4 and horizontal flips, for the whole batch at once.

    pixels: (batch, size, size, channels) uint8, and so the result.
    """
    batch, size, _, channels = pixels.shape
    padded_size = size + 2 * _PADDING
    shifts = torch.from_numpy(random.integers(0, 2 * _PADDING + 1, (2, batch, 1)))
    flip = torch.from_numpy(random.random((batch, 1)) < 0.5)
    line = torch.arange(size)
    rows = shifts[0] + line  # (batch, size): where each row and column of the result lies in the padded image
    columns = shifts[1] + torch.where(flip, size - 1 - line, line)
    first = torch.arange(batch).view(-1, 1, 1) * padded_size
    places = (first + rows[:, :, None]) * padded_size + columns[:, None, :]  # (batch, size, size)
    padded = F.pad(pixels, (0, 0, _PADDING, _PADDING, _PADDING, _PADDING))
    # One gather of whole pixels: three times as fast as indexing with three index tensors.
    return padded.view(-1, channels).index_select(0, places.flatten()).view(pixels.shape)


class _Decoder:
    """Turns items into arrays, in `workers` threads (Pillow decodes outside the interpreter's lock), in order."""

    def __init__(self, size: int, channels: int, workers: int):
        self.size, self.channels = size, channels
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def map(self, function: Callable[[Any], np.ndarray], values: Iterable[Any]) -> Iterator[np.ndarray]:
        return self._pool.map(function, values) if self._pool else map(function, values)

    def array(self, item: Item, box: Callable[[int, int], Box], flip: bool = False) -> np.ndarray:
        """(size, size, channels) uint8: the part of the image in `box(width, height)`, resized."""
        image = decode(item).convert("L" if self.channels == 1 else "RGB")
        part, target = box(*image.size), (self.size, self.size)
        if part != (0, 0, *target):
            image = image.resize(target, Image.Resampling.BILINEAR, box=part)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image).reshape(self.size, self.size, self.channels)


class InMemory:
    """A dataset of small images, decoded once: one byte a channel and pixel."""

    def __init__(self, part: LabelledImages, size: int, channels: int, workers: int):
        decoder = _Decoder(size, channels, workers)
        self.labels = torch.from_numpy(part.labels)  # (images,) int64
        self.data = torch.empty(len(part.labels), size, size, channels, dtype=torch.uint8)
        view = self.data.numpy()
        for index, array in enumerate(decoder.map(lambda item: decoder.array(item, centre_box), part.items)):
            view[index] = array

    def statistics(self) -> tuple[Tensor, Tensor]:  # (channels,) each, in [0, 1]
        """Mean and standard deviation of each channel, over some 5,000 images spread through the set."""
        sample = self.data[:: max(1, len(self.data) // 5000)].float() / 255
        return sample.mean((0, 1, 2)), sample.std((0, 1, 2)).clamp(min=1e-3)

    def pixels(self, indices: Tensor, random: np.random.Generator | None) -> Tensor:
        """(batch, size, size, channels) uint8, augmented if a random stream is given."""
        chosen = self.data.index_select(0, indices)
        return chosen if random is None else crop_and_flip(chosen, random)


class OnDisk:
    """A dataset of large images, decoded each time they are wanted."""

    def __init__(self, part: LabelledImages, size: int, channels: int, workers: int):
        self.items, self.labels = part.items, torch.from_numpy(part.labels)
        self._decoder = _Decoder(size, channels, workers)

    def statistics(self) -> tuple[Tensor, Tensor]:  # (channels,) each, in [0, 1]
        """ImageNet's mean and standard deviation; of a grey image the mean of its three channels'."""
        mean, std = torch.tensor(_IMAGENET)
        return (mean, std) if self._decoder.channels == 3 else (mean.mean(0, True), std.mean(0, True))

    def pixels(self, indices: Tensor, random: np.random.Generator | None) -> Tensor:
        """(batch, size, size, channels) uint8: random crops and flips if a random stream is given, else the centre."""
        if random is None:
            arrays = self._decoder.map(self._centre, indices.tolist())
        else:
            # Drawn for the whole batch before any thread starts, so that their order cannot matter.
            draws = random.random((len(indices), _CROP_ATTEMPTS, 4))
            flips = (random.random(len(indices)) < 0.5).tolist()
            arrays = self._decoder.map(self._cropped, zip(indices.tolist(), draws, flips, strict=True))
        return torch.from_numpy(np.stack(list(arrays)))

    def _centre(self, index: int) -> np.ndarray:
        return self._decoder.array(self.items[index], lambda width, height: centre_box(width, height, _VAL_SHARE))

    def _cropped(self, chosen: tuple[int, np.ndarray, bool]) -> np.ndarray:
        index, draws, flip = chosen
        return self._decoder.array(self.items[index], lambda width, height: random_box(width, height, draws), flip)
