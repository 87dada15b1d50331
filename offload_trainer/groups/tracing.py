"""Find the groups of a model: run it once on fake tensors and follow its axes through every op."""

import logging
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from offload_trainer.errors import UserError
from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis, Symbol
from offload_trainer.groups.naming import name_groups
from offload_trainer.groups.plan import Groups, Plan, Slot, Widths
from offload_trainer.groups.rules import RULES, Call, pin_all, pointwise
from offload_trainer.groups.running import Inputs, Watch, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, rebuild, with_tensors

WHOLE_MODULES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules whose forward computes widths from one another: their parameters are never sliced."""


def find_groups(
    model: nn.Module, example_inputs: Inputs, *, widths: Widths | None = None, pin_unknown: bool = False
) -> Groups:
    """What can be sliced of `model`, found by one forward pass on fake tensors: no memory, no arithmetic.

    `model` may lie on any device, the meta device included. `example_inputs` is a tuple of arguments or a dict of
    keyword arguments, on the CPU; odd sizes (batch 3, sequence 11) keep its axes apart from the model's own.
    `widths` adds attribute rules for the model's own module types (see `WIDTHS`).

    Raises `UserError`, naming the op and the module, for an op without a rule (`pin_unknown=True` instead leaves
    everything that op touches unsliced), and when nothing can be sliced.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), plain_attention():
        skeleton = with_tensors(model, {n: _fake(t, mode) for n, t in named_tensors(model).items()}).eval()
        trace = _Trace(skeleton, pin_unknown)
        for module in skeleton.modules():
            if isinstance(module, WHOLE_MODULES):
                for tensor in module.parameters():
                    trace.axes.pin(tensor, f"{type(module).__name__} computes its widths itself")
        inputs = tree_map(lambda x: _fake(x, mode) if isinstance(x, Tensor) else x, example_inputs)
        for tensor in tensors_of(inputs):
            trace.axes.pin(tensor, "an input of the model")
        with trace:
            outputs = run_watched(skeleton, inputs, "the model cannot be traced")
        for tensor in tensors_of(outputs):
            trace.axes.pin(tensor, "an output of the model")
        shapes = {name: torch.Size(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
        found = trace.sliceable({name for name, _ in skeleton.named_parameters()})
        if not found:
            why = sorted({leaf.pinned for leaf, _ in trace.slots() if leaf.pinned})
            raise UserError(
                f"no group of units found in {type(model).__name__}: every axis is pinned ({'; '.join(why)})"
            )
    groups = Groups(name_groups(found, shapes), shapes, widths or {})
    _try_half(skeleton, groups, inputs, mode)
    return groups


def _try_half(skeleton: nn.Module, groups: Groups, inputs: Inputs, mode: FakeTensorMode) -> None:
    """Run half of every group, still without memory: it shows a width that is stored where no rule looks."""
    half = Plan(groups, {group.name: torch.arange((group.units + 1) // 2) for group in groups})
    tensors = named_tensors(skeleton)
    shapes = {name: half.shape(name) for name in tensors}
    with mode, torch.no_grad(), plain_attention(), _quiet("torch._subclasses.fake_tensor"):
        sliced = rebuild(
            skeleton, {n: torch.empty(shapes[n], dtype=t.dtype) for n, t in tensors.items()}, half, groups
        )
        run_watched(sliced, inputs, "a sliced subnetwork does not run, a width rule is missing (widths=…)")


class Axes:
    """The axes of every tensor seen so far."""

    def __init__(self) -> None:
        self._axes: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __getitem__(self, tensor: Tensor) -> list[Axis]:
        if tensor not in self._axes:
            self._axes[tensor] = [ax.fresh(n, "a constant") for n in tensor.shape]
        return self._axes[tensor]

    def __setitem__(self, tensor: Tensor, axes: list[Axis]) -> None:
        self._axes[tensor] = axes

    def pin(self, tensor: Tensor, reason: str) -> None:
        for axis in self[tensor]:
            ax.pin(axis, reason)

    def follow(self, call: Call) -> bool:
        """Apply the op's rule; without one, pin all that the op touches and return False if that cost anything."""
        rule = RULES.get(call.name) or (pointwise if torch.Tag.pointwise in call.func.tags else None)
        if rule is not None:
            rule(call)
            return True
        harmless = all(ax.is_pinned(axis) for tensor in call.tensors() for axis in self[tensor])
        pin_all(call, f"{call.name} has no rule")
        return harmless


class _Trace(TorchDispatchMode):
    """Runs each op as it is, then its rule."""

    def __init__(self, skeleton: nn.Module, pin_unknown: bool):
        super().__init__()
        self.axes = Axes()
        self._pin_unknown = pin_unknown
        self._watch = Watch(skeleton)
        self._declared = {name: [ax.fresh(n) for n in t.shape] for name, t in named_tensors(skeleton).items()}
        for name, tensor in named_tensors(skeleton).items():
            self.axes[tensor] = self._declared[name]

    def __enter__(self) -> "_Trace":
        self._watch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        call = Call(func, args, kwargs, out, self.axes.__getitem__, self.axes.__setitem__)
        if not self.axes.follow(call) and not self._pin_unknown:
            raise UserError(
                f"{self._watch.where} uses {call.name}, an op without a rule: add one with "
                f'@offload_trainer.groups.rule("{call.name}"), or pass pin_unknown=True '
                "(config: structure.pin_unknown) to leave what it touches unsliced"
            )
        return out

    def slots(self) -> list[tuple[Symbol, Slot]]:
        """Every run of a leaf on a parameter or buffer, in the model's order."""
        return [
            (leaf, Slot(name, dimension, block, offset))
            for name, axes in self._declared.items()
            for dimension, axis in enumerate(axes)
            for leaf, block, offset in ax.occurrences(axis)
        ]

    def sliceable(self, parameters: set[str]) -> dict[Symbol, list[Slot]]:
        """Every leaf that may be sliced → its slots: one that is produced and used, at least once by a parameter."""
        ax.pin_inner([axis for axes in self._declared.values() for axis in axes])
        found: dict[Symbol, list[Slot]] = {}
        for leaf, slot in self.slots():
            if not leaf.pinned and leaf.size > 1:
                found.setdefault(leaf, []).append(slot)
        return {
            leaf: slots for leaf, slots in found.items() if any(slot.tensor in parameters for slot in slots)
        }


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextmanager
def _quiet(logger: str):
    """Context: a failing fake op logs a whole traceback; our error is one line."""
    before = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(before)


@contextmanager
def plain_attention():
    """Context: nn.MultiheadAttention's fused inference path hides its axes; the plain one computes the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
