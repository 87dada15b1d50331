"""One flat allocation that holds many tensors: what the master, the staging buffers and the subnet all are."""

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from offload_trainer import memory
from offload_trainer.errors import UserError

ALIGNMENT = 32
"""Elements: every view starts on a cache line in types of two bytes and more, so vectorised kernels and 16-byte device
loads apply; and slabs of the same shapes are laid out alike whatever their types."""


def slab_bytes(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> int:
    """Bytes of a slab of these shapes, alignment included."""
    return sum(_padded(shape.numel()) for shape in shapes.values()) * dtype.itemsize


def by_dtype(tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> dict[torch.dtype, dict[str, torch.Size]]:
    """dtype → name → shape: a slab holds one dtype."""
    table: dict[torch.dtype, dict[str, torch.Size]] = {}
    for name, (dtype, shape) in tensors.items():
        table.setdefault(dtype, {})[name] = shape
    return table


def _padded(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _mapped(folder: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file; the mapping lives as long as the tensor."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), numel * dtype.itemsize), dtype=dtype)


class Slab(Mapping[str, Tensor]):
    """Named views of one flat tensor.

    pin: fills it with zeros, which touches all its pages, then see `pin`.
    zeros: filled with zeros, whose pages take memory of a host only once they are touched.
    folder: mapped from a file there that has no name, so that it is gone with the process however that ends. The disk's
        room is taken at once. It begins as zeros.
    over: another slab on the same device, of the same type and pinned alike, that nobody needs any more: its memory is
        taken over if it is large enough, and freed if not.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        pin: bool = False,
        zeros: bool = False,
        folder: Path | None = None,
        over: "Slab | None" = None,
    ):
        numel = sum(_padded(shape.numel()) for shape in shapes.values())
        where = str(folder or device)
        self._pinned = False
        if over is not None and over._memory.numel() < numel:
            over.close()
            over = None
        try:
            if over is not None:
                self._memory, self._pinned, over._pinned = over._memory, over._pinned, False
            elif folder is not None and numel:
                self._memory = _mapped(folder, numel, dtype)
            else:
                self._memory = (torch.zeros if zeros else torch.empty)(numel, dtype=dtype, device=device)
        except (RuntimeError, OSError) as error:
            gib, why = numel * dtype.itemsize / 2**30, getattr(error, "strerror", None) or error
            raise UserError(f"cannot allocate a slab of {gib:.2f} GiB on {where}: {why}".splitlines()[0]) from error
        self.flat = self._memory[:numel]
        if pin and not self._pinned:
            self.flat.zero_()
            self.pin()
        self._views: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            self._views[name] = self.flat[start : start + shape.numel()].view(shape)
            end = start + _padded(shape.numel())
            self.flat[start + shape.numel() : end] = 0  # what arithmetic over all of `flat` finds there
            start = end

    def parts(self, nbytes: int) -> Iterator["Part"]:
        """All of it, as neighbours of at least so many bytes (but for the last)."""
        start = end = 0
        names: list[str] = []
        for name, view in self._views.items():
            names.append(name)
            end += _padded(view.numel())
            if (end - start) * self.flat.element_size() >= nbytes:
                yield Part(self, tuple(names), slice(start, end))
                start, names = end, []
        if names:
            yield Part(self, tuple(names), slice(start, end))

    def whole(self) -> "Part":
        return Part(self, tuple(self), slice(None))

    def pin(self) -> None:
        """Register exactly these bytes with CUDA (no rounding up); what is in them stays."""
        if self._memory.numel() and not self._pinned:
            memory.register(self._memory)
            self._pinned = True

    def close(self) -> None:
        """Unpin. The views stay valid for as long as somebody holds them."""
        if self._pinned:
            memory.unregister(self._memory)
            self._pinned = False

    def __del__(self) -> None:
        # Memory must not be freed while CUDA holds it pinned. (It is missing when allocating it failed.)
        if getattr(self, "_pinned", False):
            self.close()

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


@dataclass(frozen=True)
class Part:
    """Neighbours in a slab."""

    slab: Slab
    names: tuple[str, ...]
    place: slice
    """In the slab's flat tensor."""

    @property
    def flat(self) -> Tensor:
        return self.slab.flat[self.place]

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Of what this part holds, in another flat tensor of its size."""
        first, found = self.flat.storage_offset(), {}
        for name in self.names:
            view = self.slab[name]
            found[name] = flat.narrow(0, view.storage_offset() - first, view.numel()).view(view.shape)
        return found
