"""Gather (master → subnet) and write-back (subnet → master) of the elements a plan keeps.

On the host a chosen row is copied whole into a small buffer, and its columns are taken from there: both stay in cache.
When the device is not the host, everything passes through staging slabs laid out as the device's, so each direction
is one copy per dtype.

Where the master is narrower than what the device computes in, gather widens and write-back rounds at random
(master/precision.py), piece by piece. Staging is then of the master's type, and types change on the device: half the
bytes cross the link and are pinned, and the host, which has the columns to pick, does not round as well.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from offload_trainer.groups.plan import Plan
from offload_trainer.master.precision import Rounding
from offload_trainer.master.slab import Slab

CHUNK = 2**21
"""Bytes of whole rows gathered at a time before their columns are taken; also of a piece whose type changes."""
LINK_CHUNK = 2**21
"""Elements whose type changes on the device at a time: up to 20 bytes of scratch each, there."""

Index = tuple[Tensor | None, ...]


def gather_into(out: Tensor, full: Tensor, index: Index) -> None:
    """out ← the elements of `full` at the kept indices of every axis (None: all)."""
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    if not axes:
        out.copy_(full)
    elif out.dtype != full.dtype:
        for piece, part, places in _pieces(out, full, index):
            narrow = torch.empty_like(piece, dtype=full.dtype)
            gather_into(narrow, part, places)
            piece.copy_(narrow)
    elif axes == [full.ndim - 1] and full.ndim > 1 and full.element_size() < 4:
        # Columns of numbers this short: index_select is 2½ times slower than a gather that stays in cache.
        step = max(1, CHUNK // (full[0].numel() * full.element_size()))
        for part, rows in zip(out.split(step), full.split(step), strict=True):
            torch.gather(rows, axes[0], _expanded(index[axes[0]], axes[0], rows), out=part)
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


def scatter_from(
    values: Tensor, full: Tensor, index: Index, *, delta: bool = False, rounding: Rounding | None = None
) -> float:
    """The elements of `full` at the kept indices ← values; all others stay bit for bit as they are.

    With `delta`, returns Σ (new − old)² over a floating-point tensor's kept elements; 0 otherwise. `rounding` is how
    float32 values (a contiguous view of a slab) become those of a narrower `full`; new are the values before it.
    """
    delta = delta and full.dtype.is_floating_point
    if values.dtype == full.dtype:
        return _scatter(values, full, index, values if delta else None)
    assert rounding is not None
    squared = 0.0
    for piece, part, places in _pieces(values, full, index):
        rounded = rounding.narrow(piece, int(piece.storage_offset()))  # its place in the slab
        squared += _scatter(rounded, part, places, piece if delta else None)
    return squared


def _scatter(values: Tensor, full: Tensor, index: Index, exact: Tensor | None) -> float:
    """`scatter_from` within one type; returns the squared distance of `exact`, where given, from the old values."""
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    squared = 0.0
    if not axes:
        squared = 0.0 if exact is None else _distance(exact, full)
        full.copy_(values)
    elif len(axes) == 1:
        kept = index[axes[0]]
        assert kept is not None
        squared = 0.0 if exact is None else _distance(exact, full.index_select(axes[0], kept))
        full.index_copy_(axes[0], kept, values)
    elif len(axes) > 2:
        places = torch.meshgrid(*[_all(k, n) for k, n in zip(index, full.shape, strict=True)], indexing="ij")
        squared = 0.0 if exact is None else _distance(exact, full[places])
        full[places] = values
    else:
        for rows, part in _row_chunks(full, index, axes[0]):
            block = full.index_select(axes[0], rows)
            new = values.narrow(axes[0], part, len(rows))
            columns = _expanded(index[axes[1]], axes[1], new)
            if exact is not None:
                old = torch.gather(block, axes[1], columns)
                squared += _distance(exact.narrow(axes[0], part, len(rows)), old)
            block.scatter_(axes[1], columns, new)
            full.index_copy_(axes[0], rows, block)
    return squared


def _pieces(small: Tensor, full: Tensor, index: Index) -> Iterator[tuple[Tensor, Tensor, Index]]:
    """Contiguous pieces of at most CHUNK bytes of a contiguous `small`, each with what it is indexed from and how."""
    first, *others = index
    row = max(1, small[0].numel()) * small.element_size()
    if row > CHUNK and others:
        for i in range(len(small)):
            yield from _pieces(small[i], full[i if first is None else int(first[i])], tuple(others))
        return
    step = max(1, CHUNK // row)
    for start in range(0, len(small), step):
        rows = slice(start, start + step)
        if first is None:
            yield small[rows], full[rows], index
        else:
            yield small[rows], full, (first[rows], *others)


def _distance(new: Tensor, old: Tensor) -> float:
    """Σ (new − old)², in float32 at least."""
    wide = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return float(torch.linalg.vector_norm(new.to(wide) - old.to(wide))) ** 2


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
        """Fill a slab on the device with what the plan keeps of the master, which is of one type for all its names."""
        stored = _stored_type(master, slab)
        target = self._staging_for(slab, stored) if self._staged else slab
        for name in slab:
            gather_into(target[name], master[name], plan.indices(name))
        # The host waits here for the link: staging is reused at once.
        if target is not slab and stored == slab.flat.dtype:
            slab.flat.copy_(target.flat)
        elif target is not slab:
            for there, here in zip(slab.flat.split(LINK_CHUNK), target.flat.split(LINK_CHUNK), strict=True):
                there.copy_(here.to(there.device))
        self.bytes_moved += slab.flat.numel() * stored.itemsize

    def write_back(
        self,
        slab: Slab,
        master: Mapping[str, Tensor],
        plan: Plan,
        *,
        delta: bool = False,
        rounding: Rounding | None = None,
    ) -> float:
        """Put a device slab's values into the master. With `delta`, returns Σ (value now − value at gather)².

        `rounding` is needed where the master is narrower. What crossed the link then is rounded, and the sum an
        unbiased estimate: that of the rounded values, less what rounding adds to it in expectation.
        """
        stored, source, squared = _stored_type(master, slab), slab, 0.0
        if self._staged:
            source = self._staging_for(slab, stored)
            # The host waits here for the round's last kernels.
            if stored == slab.flat.dtype:
                source.flat.copy_(slab.flat)
            else:
                assert rounding is not None
                for here, there in zip(source.flat.split(LINK_CHUNK), slab.flat.split(LINK_CHUNK), strict=True):
                    rounded = rounding.narrow(there, int(there.storage_offset()))
                    squared -= _distance(there, rounded) if delta else 0.0
                    here.copy_(rounded)
        for name in slab:
            squared += scatter_from(source[name], master[name], plan.indices(name), delta=delta, rounding=rounding)
        self.bytes_moved += slab.flat.numel() * stored.itemsize
        return max(0.0, squared)

    def _staging_for(self, slab: Slab, dtype: torch.dtype) -> Slab:
        """A pinned slab of the same layout; kept while shapes stay the same."""
        key = (dtype, tuple((name, view.shape) for name, view in slab.items()))
        if key not in self._staging:
            for old in [k for k in self._staging if k[0] == dtype and [n for n, _ in k[1]] == list(slab)]:
                self._staging.pop(old).close()
            shapes = {name: view.shape for name, view in slab.items()}
            self._staging[key] = Slab(shapes, dtype, pin=True)
        return self._staging[key]

    def close(self) -> None:
        for slab in self._staging.values():
            slab.close()
        self._staging.clear()


def _stored_type(master: Mapping[str, Tensor], slab: Slab) -> torch.dtype:
    return master[next(iter(slab))].dtype
