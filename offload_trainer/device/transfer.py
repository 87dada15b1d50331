"""Gather (master → subnet) and write-back (subnet → master) of the elements a plan keeps.

On the host a chosen row is copied whole into a small buffer, and its columns are taken from there: both stay in cache.
When the device is not the host, everything passes through staging slabs laid out as the device's, so each direction
is one copy per dtype.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from offload_trainer.groups.plan import Plan
from offload_trainer.master.slab import Slab

CHUNK = 2**21
"""Bytes of whole rows gathered at a time before their columns are taken."""

Index = tuple[Tensor | None, ...]


def gather_into(out: Tensor, full: Tensor, index: Index) -> None:
    """out ← the elements of `full` at the kept indices of every axis (None: all)."""
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    if not axes:
        out.copy_(full)
    elif len(axes) == 1:
        torch.index_select(full, axes[0], index[axes[0]], out=out)  # type: ignore[arg-type]
    else:
        for rows, part in _row_chunks(full, index, axes[0]):
            block = full.index_select(axes[0], rows)
            for axis in axes[1:-1]:
                block = block.index_select(axis, index[axis])  # type: ignore[arg-type]
            columns = _expanded(index[axes[-1]], axes[-1], block)
            target = out.narrow(axes[0], part, len(rows))
            if target.is_contiguous():
                torch.gather(block, axes[-1], columns, out=target)
            else:
                target.copy_(torch.gather(block, axes[-1], columns))


def scatter_from(values: Tensor, full: Tensor, index: Index, *, delta: bool = False) -> float:
    """The elements of `full` at the kept indices ← values; all others stay bit for bit as they are.

    With `delta`, returns Σ (new − old)² over a floating-point tensor's kept elements; 0 otherwise.
    """
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    delta = delta and full.dtype.is_floating_point
    squared = 0.0
    if not axes:
        squared = _distance(values, full) if delta else 0.0
        full.copy_(values)
    elif len(axes) == 1:
        kept = index[axes[0]]
        assert kept is not None
        squared = _distance(values, full.index_select(axes[0], kept)) if delta else 0.0
        full.index_copy_(axes[0], kept, values)
    elif len(axes) > 2:
        places = torch.meshgrid(*[_all(k, n) for k, n in zip(index, full.shape, strict=True)], indexing="ij")
        squared = _distance(values, full[places]) if delta else 0.0
        full[places] = values
    else:
        for rows, part in _row_chunks(full, index, axes[0]):
            block = full.index_select(axes[0], rows)
            new = values.narrow(axes[0], part, len(rows))
            columns = _expanded(index[axes[1]], axes[1], new)
            if delta:
                squared += _distance(new, torch.gather(block, axes[1], columns))
            block.scatter_(axes[1], columns, new)
            full.index_copy_(axes[0], rows, block)
    return squared


def _distance(new: Tensor, old: Tensor) -> float:
    return float(torch.linalg.vector_norm(new - old)) ** 2


def _all(kept: Tensor | None, size: int) -> Tensor:
    return torch.arange(size) if kept is None else kept


def _row_chunks(full: Tensor, index: Index, axis: int):
    rows = index[axis]
    assert rows is not None
    row_bytes = max(1, full.numel() // max(1, full.shape[axis]) * full.element_size())
    step = max(1, CHUNK // row_bytes)
    for start in range(0, len(rows), step):
        yield rows[start : start + step], start


def _expanded(columns: Tensor | None, axis: int, block: Tensor) -> Tensor:
    """Column indices seen as an index of the block's shape (stride 0: no memory)."""
    assert columns is not None
    shape = [1] * block.ndim
    shape[axis] = -1
    size = list(block.shape)
    size[axis] = len(columns)
    return columns.view(shape).expand(size)


class Transfer:
    """Moves whole slabs' worth of tensors between the master and one device."""

    def __init__(self, device: torch.device):
        self._staged = device.type != "cpu"
        self._staging: dict[tuple, Slab] = {}
        self.bytes_moved = 0
        """Over the link (or, on a CPU, in and out of the master) since the start."""

    @property
    def staging_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._staging.values())

    def gather(self, master: Mapping[str, Tensor], slab: Slab, plan: Plan) -> None:
        """Fill a slab on the device with what the plan keeps of the master."""
        target = self._staging_for(slab) if self._staged else slab
        for name in slab:
            gather_into(target[name], master[name], plan.indices(name))
        if target is not slab:
            slab.flat.copy_(target.flat)  # the host waits here for the link: staging is reused at once
        self.bytes_moved += slab.nbytes

    def write_back(self, slab: Slab, master: Mapping[str, Tensor], plan: Plan, *, delta: bool = False) -> float:
        """Put a device slab's values into the master. With `delta`, returns Σ (value now − value at gather)²."""
        source = slab
        if self._staged:
            source = self._staging_for(slab)
            source.flat.copy_(slab.flat)  # the host waits here for the round's last kernels
        squared = 0.0
        for name in slab:
            squared += scatter_from(source[name], master[name], plan.indices(name), delta=delta)
        self.bytes_moved += slab.nbytes
        return squared

    def _staging_for(self, slab: Slab) -> Slab:
        """A pinned slab laid out as `slab`; kept while shapes stay the same."""
        key = (slab.flat.dtype, tuple((name, view.shape) for name, view in slab.items()))
        if key not in self._staging:
            for old in [k for k in self._staging if k[0] == slab.flat.dtype and [n for n, _ in k[1]] == list(slab)]:
                self._staging.pop(old).close()
            shapes = {name: view.shape for name, view in slab.items()}
            self._staging[key] = Slab(shapes, slab.flat.dtype, pin=True)
        return self._staging[key]

    def close(self) -> None:
        for slab in self._staging.values():
            slab.close()
        self._staging.clear()
