"""Reading labelled images: folders, tar files, idx files and hub datasets, as encoded items with a class each."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from offload_trainer.errors import UserError

Item = str | bytes | np.ndarray
"""A file's path, an encoded image, or pixels: (H, W) or (H, W, C) uint8."""

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_VAL_NAMES = ("test", "val", "valid", "validation")
"""What the validation part may be called, the first that exists is read."""


@dataclass(frozen=True)
class LabelledImages:
    """One part of a dataset; nothing is decoded yet."""

    items: Sequence[Item]
    labels: np.ndarray  # (images,) int64

    def first(self, count: int | None) -> "LabelledImages":
        """The first `count` of a fixed random order: files lie class by class, and a few shall hold them all."""
        if count is None or count >= len(self.items):
            return self
        chosen = np.random.default_rng(0).permutation(len(self.items))[:count]
        return LabelledImages([self.items[index] for index in chosen.tolist()], self.labels[chosen])


def read_images(data: str) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """(training, validation, class names) of a folder with train/CLASS and test/CLASS or val/CLASS, a tar file of one,
    a folder of idx files (MNIST's format), or a dataset on the Hugging Face hub.

    Raises UserError if there is no such thing, or a part of it is missing, empty or broken.
    """
    path = Path(data).expanduser()
    if path.is_file():
        train, val, classes = _from_classes(data, _read_tar(path))
    elif path.is_dir() and list(path.glob("train-images*")):
        train, val, classes = _read_idx(path)
    elif path.is_dir():
        train, val, classes = _from_classes(data, _read_folder(path))
    else:
        train, val, classes = _read_hub(data)
    for part, found in (("training", train), ("validation", val)):
        if not len(found.items):
            raise UserError(f"task.data ({data}) holds no {part} images")
    return train, val, classes


Parts = dict[str, list[tuple[str, Item]]]
"""Part (train, test, …) → (class name, item) of each of its images."""


def _from_classes(data: str, parts: Parts) -> tuple[LabelledImages, LabelledImages, list[str]]:
    val_name = next((name for name in _VAL_NAMES if name in parts), None)
    if "train" not in parts or val_name is None:
        found = ", ".join(sorted(parts)) or "nothing of the kind"
        raise UserError(
            f"task.data ({data}) must hold train/CLASS/ and test/CLASS/ or val/CLASS/ with images; it holds {found}"
        )
    classes = sorted({name for name, _ in parts["train"]})
    index = {name: number for number, name in enumerate(classes)}
    if unknown := sorted({name for name, _ in parts[val_name]} - set(classes)):
        raise UserError(f"task.data ({data}): {val_name}/{unknown[0]} is a class that train/ does not have")

    def labelled(part: str) -> LabelledImages:
        labels = np.array([index[name] for name, _ in parts[part]], dtype=np.int64)
        return LabelledImages([item for _, item in parts[part]], labels)

    return labelled("train"), labelled(val_name), classes


def _read_folder(root: Path) -> Parts:
    parts: Parts = {}
    for part in ("train", *_VAL_NAMES):
        for folder in sorted((root / part).glob("*/")):
            # Plain strings from scandir: a million Path objects take half a gigabyte.
            names = sorted(entry.name for entry in os.scandir(folder) if _is_image(entry.name))
            if names:
                parts.setdefault(part, []).extend((folder.name, f"{folder}/{name}") for name in names)
            elif part == "train" and not folder.name.startswith((".", "@", "__")):  # what file systems leave
                raise UserError(f"task.data ({root}): {part}/{folder.name} holds no images: add some, or remove it")
    return parts


def _read_tar(path: Path) -> Parts:
    """Reads the archive once, front to back, and keeps its encoded images in memory: nothing is unpacked to disk."""
    parts: Parts = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                names = PurePosixPath(member.name).parts
                if not (member.isfile() and len(names) >= 3 and _is_image(names[-1])):
                    continue
                if names[-3] in ("train", *_VAL_NAMES) and (stream := archive.extractfile(member)):
                    parts.setdefault(names[-3], []).append((names[-2], stream.read()))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"task.data ({path}) is not a whole tar archive ({error})") from error
    return parts


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _read_idx(folder: Path) -> tuple[LabelledImages, LabelledImages, list[str]]:
    def part(prefix: str) -> LabelledImages:
        images, labels = _idx_array(folder, f"{prefix}-images*", 3), _idx_array(folder, f"{prefix}-labels*", 1)
        if len(images) != len(labels):
            raise UserError(f"task.data ({folder}): {prefix} has {len(images)} images but {len(labels)} labels")
        return LabelledImages(images, labels.astype(np.int64))  # type: ignore[arg-type]  # a sequence of (H, W)

    train, val = part("train"), part("t10k")
    count = 1 + int(max(train.labels.max(initial=0), val.labels.max(initial=0)))
    return train, val, [str(number) for number in range(count)]


def _idx_array(folder: Path, pattern: str, axes: int) -> np.ndarray:
    """One idx file: two zero bytes, type (8: unsigned bytes), number of axes, each axis's size as 4 bytes, the data."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"task.data ({folder}) has no {pattern}, the idx file with that part")
    try:
        content = gzip.decompress(files[0].read_bytes()) if files[0].suffix == ".gz" else files[0].read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"task.data: {files[0]} cannot be read ({error})") from error
    sizes = np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").tolist()
    body = len(content) - 4 - 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or body != int(np.prod(sizes)):
        raise UserError(f"task.data: {files[0]} is not a whole idx file of bytes with {axes} axes")
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(sizes)


class _HubItems(Sequence[Item]):
    """The encoded images of a column of a `datasets` dataset, read when asked for."""

    def __init__(self, column: Any):
        self.column = column  # of {"bytes": …, "path": …}

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        value = self.column[int(index)]
        return value["bytes"] if value["bytes"] is not None else value["path"]


def _read_hub(name: str) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """A dataset by its hub name, or from the local cache of `datasets` when the hub is out of reach."""
    problem = f"task.data ({name}) does not exist"
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or ".tar" in name:
        raise UserError(f"{problem}: give a folder of images, a tar file of one, a folder of idx files, or a hub name")
    import datasets.config  # takes a second to import, which only hub data needs
    import huggingface_hub

    # One question, since `datasets` repeats its own for half a minute before it says that the hub is out of reach.
    offline, reason = datasets.config.HF_HUB_OFFLINE, None
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except Exception as error:  # of huggingface_hub and httpx: no connection, no such dataset
        reason = error
        datasets.config.HF_HUB_OFFLINE = True  # from here on only its cache is asked
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # of datasets, huggingface_hub, httpx and pyarrow
        why = str(reason or error).strip().splitlines()[0]
        raise UserError(f"{problem} here, and cannot be had from the hub either ({why})") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return from_datasets(name, found)


def from_datasets(name: str, found: Any) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The parts of a `datasets.DatasetDict` whose columns are one Image and one ClassLabel."""
    import datasets

    val_name = next((part for part in _VAL_NAMES if part in found), None)
    if "train" not in found or val_name is None:
        raise UserError(
            f"task.data ({name}) must have the splits train and test or validation; it has {', '.join(found)}"
        )
    features = found["train"].features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise UserError(f"task.data ({name}) must have an Image and a ClassLabel column; it has {', '.join(features)}")

    def part(split: str) -> LabelledImages:
        encoded = found[split].cast_column(images[0], datasets.Image(decode=False))
        return LabelledImages(_HubItems(encoded[images[0]]), np.array(encoded[labels[0]], dtype=np.int64))

    return part("train"), part(val_name), list(features[labels[0]].names)
