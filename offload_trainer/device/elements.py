"""Elements of one tensor that a plan keeps: taken out of it, put back into it.

A chosen row is copied whole into a small buffer, and its columns are taken from there: both stay in cache.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CHUNK = 2**21
"""Bytes of whole rows gathered at a time before their columns are taken."""

PATCH = 2**25
"""Bytes of a tensor that a device copies from at a time: it takes up to three times as much scratch."""

Index = tuple[Tensor | None, ...]
"""Kept indices of every axis (None: all)."""
Pair = tuple[Tensor, Tensor, Index]
"""A dense tensor, the full one, and what the dense one holds of it."""


def gather_into(out: Tensor, full: Tensor, index: Index) -> None:
    """out ← the elements of `full` at the kept indices of every axis (None: all)."""
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    if not axes:
        out.copy_(full)
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


def scatter_from(values: Tensor, full: Tensor, index: Index, *, delta: bool = False) -> float:
    """The elements of `full` at the kept indices ← values; all others stay bit for bit as they are.

    With `delta`, returns Σ (new − old)² over a floating-point tensor's kept elements; 0 otherwise.
    """
    delta = delta and full.dtype.is_floating_point
    axes = [axis for axis, kept in enumerate(index) if kept is not None]
    squared = 0.0
    if not axes:
        squared = distance(values, full) if delta else 0.0
        full.copy_(values)
    elif len(axes) == 1:
        kept = index[axes[0]]
        assert kept is not None
        squared = distance(values, full.index_select(axes[0], kept)) if delta else 0.0
        full.index_copy_(axes[0], kept, values)
    elif len(axes) > 2:
        places = torch.meshgrid(*[_all(k, n) for k, n in zip(index, full.shape, strict=True)], indexing="ij")
        squared = distance(values, full[places]) if delta else 0.0
        full[places] = values
    else:
        for rows, part in _row_chunks(full, index, axes[0]):
            block = full.index_select(axes[0], rows)
            new = values.narrow(axes[0], part, len(rows))
            columns = _expanded(index[axes[1]], axes[1], new)
            if delta:
                squared += distance(new, torch.gather(block, axes[1], columns))
            block.scatter_(axes[1], columns, new)
            full.index_copy_(axes[0], rows, block)
    return squared


def patch(target: Tensor, source: Tensor, places: tuple[Index, Index]) -> None:
    """Entries of `target` ← those of `source`; places: where each lies in the source, and where in the target."""
    here, there = ([None if kept is None else kept.to(target.device) for kept in index] for index in places)
    if target.device.type != "cpu":
        _patch_at_once(target, source, here, there)
        return
    if any(kept is not None for kept in here):
        shape = [size if kept is None else len(kept) for size, kept in zip(source.shape, here, strict=True)]
        part = source.new_empty(shape)
        gather_into(part, source, tuple(here))
        source = part
    scatter_from(source, target, tuple(there))


def copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Each target ← the source of its name: on a device, a kernel for many."""
    if sources:
        torch._foreach_copy_([targets[name] for name in sources], list(sources.values()))


def on_device(places: Mapping[str, tuple[Index, Index]], device: torch.device) -> dict[str, tuple[Index, Index]]:
    """The same indices there, sent as one: a copy of each on its own would wait for all kernels before it."""
    every = {id(kept): kept for pair in places.values() for index in pair for kept in index if kept is not None}
    if not every:
        return dict(places)
    arrived = torch.cat(list(every.values())).to(device).split([len(kept) for kept in every.values()])
    there = dict(zip(every, arrived, strict=True))

    def moved(index: Index) -> Index:
        return tuple(None if kept is None else there[id(kept)] for kept in index)

    return {name: (moved(here), moved(other)) for name, (here, other) in places.items()}


def _patch_at_once(
    target: Tensor, source: Tensor, here: Sequence[Tensor | None], there: Sequence[Tensor | None]
) -> None:
    """In few kernels: a device has no use for rows that stay in a cache, and each launch costs it microseconds.

    Axis by axis: indices of two at once would be made as large as what is copied, four times its bytes.
    """
    if not source.ndim:
        target.copy_(source)
        return
    rows = source.shape[0] if here[0] is None else len(here[0])
    step = max(1, PATCH * source.shape[0] // max(1, source.nbytes))
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        shared = source[part] if here[0] is None else source.index_select(0, here[0][part])
        for axis, kept in enumerate(here[1:], 1):
            if kept is not None:
                shared = shared.index_select(axis, kept)
        columns = {axis: kept for axis, kept in enumerate(there[1:], 1) if kept is not None}
        if there[0] is None:
            _put(target[part], shared, columns)
        else:
            _put(target, shared, {0: there[0][part], **columns})


def _put(target: Tensor, source: Tensor, index: Mapping[int, Tensor]) -> None:
    if not index:
        target.copy_(source)
        return
    (axis, kept), *rest = index.items()
    if rest:
        block = target.index_select(axis, kept)
        _put(block, source, dict(rest))
        source = block
    target.index_copy_(axis, kept, source)


def distance(new: Tensor, old: Tensor) -> float:
    """Σ (new − old)², in float32 at least."""
    return float(norm(new, old)) ** 2


def norm(new: Tensor, old: Tensor) -> Tensor:
    """Euclidean norm of new − old, in float32 at least; of no axes, where the tensors are."""
    wide = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return torch.linalg.vector_norm(new.to(wide) - old.to(wide))


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
