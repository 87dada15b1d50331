"""Batches of any make-up, as long as axis 0 of their tensors is the batch: their length, and parts of them."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError


def batch_rows(batch: Any) -> int:
    """Length of the batch axis: axis 0 of the first tensor found. Raises UserError if there is none."""
    pending = [batch]
    while pending:
        item = pending.pop(0)
        if isinstance(item, Tensor) and item.ndim:
            return len(item)
        if isinstance(item, Mapping):
            pending = [*item.values(), *pending]
        elif isinstance(item, (tuple, list)):
            pending = [*item, *pending]
    raise UserError(f"a batch ({type(batch).__name__}) holds no tensor with a batch axis")


def shallow_copy(batch: Any) -> Any:
    """The batch for one use of several: what a loss takes out of a dict or a list is there for the next. The tensors
    are the same, so a loss must not write into them."""
    return copy(batch) if isinstance(batch, (dict, list)) else batch


def shard(batch: Any, rank: int, world: int, among: str = "the number of processes") -> Any:
    """The rows of a global batch that belong to one of `world` processes: equal, contiguous parts in rank order.

    Tuples, lists and mappings are walked (a mapping comes back as a dict); None stays None.
    Raises UserError if the batch does not divide, or holds something that has no batch axis.
    """

    def part(tensor: Tensor) -> Tensor:
        if len(tensor) % world:
            raise UserError(f"task.batch_size ({len(tensor)}) must be divisible by {among} ({world})")
        rows = len(tensor) // world
        return tensor[rank * rows : (rank + 1) * rows]

    return _each(batch, part)


def pieces(batch: Any, rows: int | None) -> list[Any]:
    """A batch in as few parts as have at most so many rows each (None: one), of equal length to within a row.

    One that is not made of tensors of the same number of rows stays whole.
    """
    if rows is None:
        return [batch]
    try:
        length = batch_rows(batch)
        count = max(1, -(-length // rows))

        def part(tensor: Tensor, number: int) -> Tensor:
            if len(tensor) != length:
                raise UserError(f"a batch holds tensors of {length} and of {len(tensor)} rows")
            return tensor.tensor_split(count)[number]

        return [_each(batch, partial(part, number=i)) for i in range(count)]
    except UserError:
        return [batch]


def pinned(batch: Any) -> Any:
    """The batch in pinned memory, from which a copy to a GPU goes on by itself. What is not a dense tensor on the host
    stays as it is."""

    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if tensor.device.type == "cpu" and tensor.layout == torch.strided else tensor

    return _each(batch, pin)


def _each(batch: Any, part: Callable[[Tensor], Tensor]) -> Any:
    """The batch with a part of each of its tensors. Raises UserError if it holds something that has no batch axis."""
    if batch is None:
        return None
    if isinstance(batch, Mapping):
        return {key: _each(value, part) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_each(value, part) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_each(value, part) for value in batch)
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        what = "a scalar tensor" if isinstance(batch, Tensor) else type(batch).__name__
        raise UserError(f"a batch holds {what}: it must be made of tensors whose axis 0 is the batch")
    return part(batch)
