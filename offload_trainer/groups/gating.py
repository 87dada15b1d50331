"""The full-size model with a plan's dropped units gated to zero, run op by op: what a sliced model must equal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload_trainer.errors import UserError
from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis, Symbol
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.rules import Axes, Call, follow
from offload_trainer.groups.rules.elementwise import POSITIONS
from offload_trainer.groups.running import Watch, is_floating
from offload_trainer.groups.slicing import named_tensors

_REDUCTIONS = ("mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "norm", "prod")
_REDUCTIONS += ("linalg_vector_norm", "logsumexp", "argmax", "argmin", "topk")
REDUCTIONS = {f"aten::{name}" for name in _REDUCTIONS}
SOFTMAXES = {f"aten::{name}" for name in ("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")}


class Gate(TorchDispatchMode):
    """Context: dropped units are zero in every parameter, buffer and activation, and what reduces over a sliced axis (a
    norm over the residual stream) does so over the kept units alone. Axes are followed as in tracing, but start from
    the groups, and no module is sliced."""

    def __init__(self, model: nn.Module, plan: Plan, groups: Groups):
        super().__init__()
        self._axes = Axes()
        self._plan = plan
        self._watch = Watch(model)
        self._leaves: dict[str, Symbol] = {group.name: Symbol(group.units) for group in groups}
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        for name, tensor in named_tensors(model).items():
            self._axes[tensor] = [self._axis_of(groups, name, axis) for axis in range(tensor.ndim)]

    def __enter__(self) -> "Gate":
        self._watch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__()
        super().__exit__(*error)

    def _axis_of(self, groups: Groups, name: str, axis: int) -> Axis:
        """The axis as its slots describe it: runs of (group, block), what lies between them fixed."""
        size = groups.shapes[name][axis]
        slots = sorted(groups.by_tensor.get(name, {}).get(axis, ()), key=lambda entry: entry[1].offset)
        parts: list[Axis] = []
        position = 0
        for group, slot in slots:
            if slot.offset < position:
                return ax.fresh(size, "fixed")  # slots within slots: no run of units describes it
            parts.append(ax.fresh(slot.offset - position, "fixed") if slot.offset > position else [Symbol(0)])
            parts.append([self._leaves[group.name], *ax.fresh(slot.block, "inside a unit")])
            position = slot.offset + group.units * slot.block
        parts.append(ax.fresh(size - position, "fixed") if size > position else [Symbol(0)])
        return ax.concat(parts)

    def kept(self, axis: Axis) -> Tensor | None:
        """Kept elements of an axis; None when all of it is."""
        units = {self._leaves[name].root: name for name in self._leaves}
        runs = [(units[leaf], leaf.size, *place) for leaf, *place in ax.occurrences(axis) if leaf in units]
        if not runs:
            return None
        keep = torch.ones(ax.size_of(axis), dtype=torch.bool)
        for name, size, block, offset in runs:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[self._plan[name]] = True
            keep[offset : offset + size * block] &= mask.repeat_interleave(block)
        return None if bool(keep.all()) else keep.nonzero().flatten()

    def kept_part(self, tensor: Tensor) -> Tensor:
        for axis, factors in enumerate(self._axes[tensor]):
            index = self.kept(factors)
            if index is not None:
                tensor = tensor.index_select(axis, index)
        return tensor

    def _gated(self, tensor: Tensor) -> Tensor:
        if not self._plan.slices(self._names[id(tensor)]):
            return tensor  # itself: what is written into it in place stays
        gated = tensor.clone()
        self._axes[gated] = self._axes[tensor]
        return _zero_outside(gated, self._plan.indices(self._names[id(tensor)]))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, named = tree_map(
            lambda x: self._gated(x) if isinstance(x, Tensor) and id(x) in self._names else x, (args, kwargs or {})
        )
        kwargs = dict(named)
        call = Call(func, args, kwargs, None, self._axes)
        indices = {d: index for d in _reduced(call) if (index := self.kept(self._axes[call.input][d])) is not None}
        if not indices:
            call.out = func(*args, **kwargs)
        elif call.name in REDUCTIONS:
            call.out = func(_select(call.input, indices), *args[1:], **kwargs)
            if call.name in POSITIONS and call["dim"] is not None:
                call.out = _positions_in_full(call.out, *indices.values())
        elif call.name in SOFTMAXES:
            call.out = _put_back(func(_select(call.input, indices), *args[1:], **kwargs), call.input, indices)
        else:
            call.out = _norm_over(call, indices)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(call.out)):
            follow(call)
            self._require_whole_units()
        if not func.is_view:
            for out in filter(is_floating, call.outputs()):  # a function of zero need not be zero: exp, 0 / 0
                _zero_outside(out, [self.kept(axis) for axis in self._axes[out]])
        return call.out

    def _require_whole_units(self) -> None:
        """Raise if the last op took units apart, or made units of two groups one: then their slots are wrong."""
        owner: dict[Symbol, str] = {}
        for name, leaf in self._leaves.items():
            root = leaf.root
            if root.factors is not None or root.segments is not None:
                raise UserError(f"{self._watch.where} takes units of group {name!r} apart: a slot of it is wrong")
            if owner.setdefault(root, name) != name:
                raise UserError(
                    f"groups {owner[root]!r} and {name!r} meet in {self._watch.where}: a slot of one of them is wrong"
                )


def _zero_outside(tensor: Tensor, kept: Iterable[Tensor | None]) -> Tensor:
    """In place."""
    for axis, index in enumerate(kept):
        if index is not None:
            dropped = torch.ones(tensor.shape[axis], dtype=torch.bool)
            dropped[index] = False
            tensor.index_fill_(axis, dropped.nonzero().flatten(), 0)
    return tensor


def _reduced(call: Call) -> list[int]:
    """The dimensions of its input that an op reduces over."""
    if call.name in REDUCTIONS | SOFTMAXES and not isinstance(call["other"], Tensor):
        return call.dims(call["dim"], call.input.ndim)
    if call.name == "aten::native_layer_norm":
        return list(range(call.input.ndim - len(call["normalized_shape"]), call.input.ndim))
    if call.name == "aten::native_group_norm":
        return list(range(1, call.input.ndim))
    if call.name == "aten::native_batch_norm" and call["training"]:
        return [d for d in range(call.input.ndim) if d != 1]
    return []


def _norm_over(call: Call, indices: dict[int, Tensor]) -> tuple:
    """A norm of the kept part, put back among zeros."""
    full, arguments = call.input, dict(call.arguments)
    small = arguments["input"] = _select(full, indices)
    affine = {}  # dimension of the input → of weight and bias
    if "normalized_shape" in arguments:
        count = len(arguments["normalized_shape"])
        arguments["normalized_shape"] = list(small.shape[small.ndim - count :])
        affine = {small.ndim - count + i: i for i in range(count)}
    elif "group" in arguments:
        arguments["C"], arguments["HxW"] = small.shape[1], small[0, 0].numel()
        if arguments["group"] > 1:
            arguments["group"] = arguments["group"] * small.shape[1] // full.shape[1]
        affine = {1: 0}
    for name in ("weight", "bias"):
        if isinstance(arguments[name], Tensor):
            chosen = {affine[d]: index for d, index in indices.items() if d in affine}
            arguments[name] = _select(arguments[name], chosen)
    normed, *statistics = call.func(**arguments)
    return (_put_back(normed, full, indices), *statistics)


def _put_back(part: Tensor, full: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """The part among zeros, in the shape of `full`."""
    out = torch.zeros(full.shape, dtype=part.dtype)
    places = [indices.get(d, torch.arange(n)) for d, n in enumerate(full.shape)]
    out[torch.meshgrid(*places, indexing="ij")] = part
    return out


def _positions_in_full(result: Any, index: Tensor) -> Any:
    """What an op returned for the selected part of one dimension, its positions those in all of it."""
    *values, positions = result if isinstance(result, tuple | list) else [result]
    return (*values, index[positions]) if values else index[positions]


def _select(tensor: Tensor, indices: dict[int, Tensor]) -> Tensor:
    for d, index in indices.items():
        tensor = tensor.index_select(d, index)
    return tensor
