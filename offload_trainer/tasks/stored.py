"""Tensors in safetensors files: where they lie, as headers and index say, and plain reads of them.

The files are read, not mapped: pages of a map count as memory of the process until its file is closed, so that a shard
of 5 GB would cost 5 GB more. Nothing here reads a pickle.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_trainer.errors import UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in safetensors of the dtypes that are read; others (8 bits and less) store quantized weights."""

_PIECE = 2**20
"""Elements that are converted at a time: a few MiB, which stay in the cache between reading and writing."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    def read_into(self, handle: FileIO, target: Tensor) -> None:
        """Copy the values into a host tensor of the same shape, converted to its dtype.

        `handle` is the file, opened without a buffer. Beyond the target this takes a few MiB, or one more tensor if
        the target is not contiguous.
        """
        if not target.is_contiguous():
            whole = torch.empty(self.shape, dtype=DTYPES[self.dtype])
            self.read_into(handle, whole)
            target.copy_(whole)
        elif target.dtype == DTYPES[self.dtype]:
            handle.seek(self.start)
            self._fill(handle, target.view(-1))
        else:
            flat = target.view(-1)
            for start, values in self.pieces(handle):
                flat[start : start + len(values)].copy_(values)

    def equals(self, handle: FileIO, target: Tensor) -> bool:
        """Whether `read_into` would leave the target, a contiguous tensor, as it is."""
        flat = target.view(-1)
        pieces = self.pieces(handle)
        return all(torch.equal(flat[start : start + len(v)], v.to(flat.dtype)) for start, v in pieces)

    def pieces(self, handle: FileIO) -> Iterator[tuple[int, Tensor]]:
        """(first element, values) of the flattened tensor, a piece at a time; a piece is overwritten by the next."""
        numel = math.prod(self.shape)
        buffer = torch.empty(min(_PIECE, numel), dtype=DTYPES[self.dtype])
        handle.seek(self.start)
        for start in range(0, numel, _PIECE):
            values = buffer[: min(_PIECE, numel - start)]
            self._fill(handle, values)
            yield start, values

    def _fill(self, handle: FileIO, values: Tensor) -> None:
        room = values.view(torch.uint8).numpy().data  # the same bytes: numpy has no bfloat16
        while room:
            count = handle.readinto(room)  # less than asked for beyond 2 GiB
            if not count:
                raise UserError(f"task.model: {self.file} has become shorter while it was read")
            room = room[count:]


def stored_tensors(folder: Path) -> list[Stored]:
    """Every tensor of a model folder, from the headers of its safetensors files alone.

    Raises UserError if there are none, only a pickle, a file that is missing, damaged or truncated, or an index that
    does not say what the files hold.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if files := sorted(folder.glob("*.safetensors")):
        return [stored for file in files for stored in read_header(file)]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"task.model ({folder}) has its weights in {some(pickles)} only, a format that can run code when it is "
            "read: convert them to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"task.model ({folder}) has no weights: no *.safetensors in it (for a new model give its config)")


def _indexed(folder: Path) -> list[Stored]:
    """The tensors of all shards, which must be exactly those that the index assigns to each."""
    where = f"task.model ({folder}): {INDEX}"
    try:
        assigned: Mapping[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in assigned.items():
            by_file.setdefault(file, set()).add(name)
        outside = [file for file in by_file if Path(file).name != file]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{where} is not a safetensors index ({type(error).__name__})") from error
    if not by_file:
        raise UserError(f"{where} lists no tensor")
    if outside:
        raise UserError(f"{where} names a file outside the folder, {outside[0]!r}: shards must lie beside their index")
    if missing := sorted(file for file in by_file if not (folder / file).is_file()):
        raise UserError(f"task.model ({folder}) lacks {some(missing)}, listed in {INDEX}: copy or download it again")
    found: list[Stored] = []
    for file, names in sorted(by_file.items()):
        tensors = read_header(folder / file)
        if absent := sorted(names - {stored.name for stored in tensors}):
            raise UserError(f"{where} says that {file} holds {some(absent)}; it does not")
        for stored in tensors:
            if stored.name not in names:
                place = assigned.get(stored.name)
                raise UserError(f"{where} assigns {stored.name} to {place or 'no file'}; {file} holds it")
        found += tensors
    return found


def read_header(file: Path) -> list[Stored]:
    """The tensors of one file. Raises UserError for one that is no safetensors file, or not all of it."""
    try:
        with safe_open(file, framework="pt"):
            pass  # checked by the library: the header is whole, and the values are as long as it says
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"task.model: {file} is not a readable safetensors file, or not all of it ({reason}): copy or download it "
            "again"
        ) from error
    header.pop("__metadata__", None)
    return [
        Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
