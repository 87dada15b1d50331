"""Tensors in safetensors files: where they lie, as the header says, and plain reads of them.

The files are read, not mapped: pages of a map count as memory of the process until its file is closed, so that a shard
of 5 GB would cost 5 GB more. Nothing here reads a pickle.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.files.format import DTYPES

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
                raise UserError(f"{self.file} has become shorter while it was read")
            room = room[count:]


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
            f"{file} is not a readable safetensors file, or not all of it ({reason}): copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    return [
        Stored(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]
