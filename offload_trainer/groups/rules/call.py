"""One executed op as a rule sees it, and the table of rules."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis

RULES: dict[str, Callable[["Call"], None]] = {}


class Axes:
    """The axes of every tensor seen so far; of one that holds positions (a `topk`'s), the axis they point into."""

    def __init__(self, *, open_constants: bool = True):
        self._open_constants = open_constants
        self._axes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._targets: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __getitem__(self, tensor: Tensor) -> list[Axis]:
        if tensor not in self._axes:
            self._axes[tensor] = [ax.fresh(n, "a constant") for n in tensor.shape]
        return self._axes[tensor]

    def __setitem__(self, tensor: Tensor, axes: list[Axis]) -> None:
        self._axes[tensor] = axes

    def open(self, size: int) -> Axis:
        """An axis along which all entries are the same.

        Its size may have been read off another axis, with which it becomes one when they meet; or it is a number in
        the code, which no slicing changes: without `open_constants` it is pinned.
        """
        return ax.fresh(size, None if self._open_constants else "its size may be a number in the code")

    def target(self, tensor: Tensor) -> Axis | None:
        return self._targets.get(tensor)

    def point(self, tensor: Tensor, axis: Axis) -> None:
        """The entries of `tensor` are positions in `axis`."""
        self._targets[tensor] = axis


class Call:
    """One executed op: arguments by schema name, output, and the axes of every tensor seen so far."""

    def __init__(self, func: Any, args: tuple, kwargs: dict, out: Any, axes: Axes):
        schema = func._schema.arguments
        self.arguments = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.arguments |= {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        self.func = func
        self.out = out
        self.axes = axes
        self.name: str = func._overloadpacket._qualified_op_name

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def input(self) -> Tensor:
        return next(v for v in self.arguments.values() if isinstance(v, Tensor))

    def tensors(self) -> list[Tensor]:
        leaves = tree_leaves(self.arguments)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def outputs(self) -> list[Tensor]:
        leaves = tree_leaves(self.out)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def dims(self, value: int | list[int] | None, ndim: int) -> list[int]:
        """Dimensions as non-negative ints; None or [] means all."""
        if value is None or value == []:
            return list(range(ndim))
        return [d % ndim for d in ([value] if isinstance(value, int) else value)]

    def axes_of(self, tensor: Tensor) -> list[Axis]:
        return self.axes[tensor]

    def assign(self, tensor: Tensor, axes: list[Axis]) -> None:
        self.axes[tensor] = axes

    def address(self, axis: Axis, index: Tensor | None, reason: str) -> None:
        """`axis` is read or written at the positions that `index` holds: it is the axis they point into, or pinned."""
        target = None if index is None else self.axes.target(index)
        if target is not None and ax.size_of(target) == ax.size_of(axis):
            ax.unify(target, axis)
            ax.mark_chosen(axis)
        else:
            ax.pin([*axis, *(target or [])], reason)

    def keep(self, axes: list[Axis], reason: str) -> None:
        """Assign `axes` to every output, wherever an output's size agrees; a new size is a new, pinned axis."""
        for out in self.outputs():
            padded = axes + [[]] * (out.ndim - len(axes))
            self.assign(
                out,
                [a if ax.size_of(a) == n else ax.fresh(n, reason) for a, n in zip(padded, out.shape, strict=False)],
            )


def rule(*names: str) -> Callable[[Callable[[Call], None]], Callable[[Call], None]]:
    """Register a rule for ops by name: "mm" means "aten::mm"; another library's op is written in full."""

    def register(function: Callable[[Call], None]) -> Callable[[Call], None]:
        for name in names:
            RULES[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


def pin_all(call: Call, reason: str) -> None:
    for tensor in call.tensors():
        for axis in call.axes_of(tensor):
            ax.pin(axis, reason)
    for out in call.outputs():
        call.assign(out, [ax.fresh(n, reason) for n in out.shape])
