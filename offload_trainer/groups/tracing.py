"""Find the groups of a model: run it on fake tensors and follow its axes through every op; then trace half of it."""

import logging
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from offload_trainer.errors import UserError
from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis, Symbol
from offload_trainer.groups.naming import name_groups
from offload_trainer.groups.plan import Groups, Plan, Slot, Widths
from offload_trainer.groups.rules import Call, pin_all, rule_of
from offload_trainer.groups.running import Inputs, Watch, map_inputs, run_model, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, rebuild, with_tensors

logger = logging.getLogger(__name__)

WHOLE_MODULES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules whose forward computes widths from one another: their parameters are never sliced."""


def find_groups(
    model: nn.Module, example_inputs: Inputs, *, widths: Widths | None = None, pin_unknown: bool = False
) -> Groups:
    """What can be sliced of `model`, found by running it on fake tensors: no memory, no arithmetic.

    `model` may lie on any device, the meta device included. `example_inputs` is a tuple of arguments or a dict of
    keyword arguments, on the CPU; odd sizes (batch 3, sequence 11) keep its axes apart from the model's own.
    `widths` adds attribute rules for the model's own module types (see `groups.widths`).

    The groups are then held against a sliced copy, which is traced as well: it must show the same groups, smaller.

    Raises `UserError`, naming the op and the module, for an op without a rule (`pin_unknown=True` instead leaves
    everything that op touches unsliced), for a width stored where no rule looks, and when nothing can be sliced.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = with_tensors(model, {n: _fake(t.shape, t.dtype, mode) for n, t in named_tensors(model).items()})
    inputs = map_inputs(lambda x: _fake(x.shape, x.dtype, mode), example_inputs)
    trace = _traced(skeleton, inputs, mode, pin_unknown, "the model cannot be traced")
    found = trace.sliceable()
    if not found:
        why = sorted({leaf.pinned for leaf, _ in trace.slots() if leaf.pinned})
        raise UserError(f"no group of units found in {type(model).__name__}: every axis is pinned ({'; '.join(why)})")
    shapes = {name: torch.Size(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
    groups = Groups(name_groups(found, shapes), shapes, widths or {})
    _trace_sliced(skeleton, groups, inputs, mode, pin_unknown, must_train=trace.trains)
    return groups


def _traced(
    skeleton: nn.Module,
    inputs: Inputs,
    mode: FakeTensorMode,
    pin_unknown: bool,
    failure: str,
    *,
    must_train: bool = False,
) -> "_Trace":
    """A trace of the model in evaluation and, for branches that are only trained, in training."""
    trace = _Trace(skeleton, pin_unknown)
    trace.pin(tensors_of(inputs), "an input of the model")
    with mode, torch.no_grad(), plain_attention(), _quiet("torch._subclasses.fake_tensor"), trace:
        skeleton.eval()
        outputs = tensors_of(run_watched(skeleton, inputs, failure))
        if not outputs:
            raise UserError(f"{failure}: it returns no tensor that could be found")
        skeleton.train()
        if must_train:
            outputs += tensors_of(run_watched(skeleton, inputs, f"{failure} in training"))
        else:
            try:
                outputs += tensors_of(run_model(skeleton, inputs))
                trace.trains = True
            except UserError:
                raise
            except Exception:  # labels asked for, layers dropped at random: evaluation has to do
                logger.debug("%s does not run in training mode on these inputs", type(skeleton).__name__, exc_info=True)
    trace.pin(outputs, "an output of the model")
    trace.find_live(outputs)
    return trace


def _trace_sliced(
    skeleton: nn.Module, groups: Groups, inputs: Inputs, mode: FakeTensorMode, pin_unknown: bool, *, must_train: bool
) -> None:
    """Trace a sliced copy: a width that is stored where no rule looks breaks it, or shows as other groups."""
    # Neighbours get different widths, so that a `chunk(2)` of two groups does not pass for right.
    kept = {g.name: torch.arange((g.units + 1) // 2 + (i % 2 and g.units > 3)) for i, g in enumerate(groups)}
    plan = Plan(groups, kept)
    tensors = {n: _fake(plan.shape(n), t.dtype, mode) for n, t in named_tensors(skeleton).items()}
    sliced = rebuild(skeleton, tensors, plan, groups)
    failure = "a sliced subnetwork does not run, a width rule is missing (widths=…)"
    trace = _traced(sliced, inputs, mode, pin_unknown, failure, must_train=must_train)
    again = {frozenset(slots) for slots in trace.sliceable().values()}
    for group in groups:
        slots = frozenset(_sliced_slot(slot, plan) for slot in group.slots)
        if len(kept[group.name]) > 1 and slots not in again:  # one unit is no axis any more
            near = max(again, key=lambda other: len(slots & other), default=frozenset())
            where = min(slots - near, key=str).tensor.rpartition(".")[0] or "the model"
            raise UserError(
                f"group {group.name!r} is not the same in a sliced subnetwork: {where} or a module around it stores "
                "a width that no rule covers; add one (widths=…)"
            )


def _sliced_slot(slot: Slot, plan: Plan) -> Slot:
    """Where the slot begins once the plan has sliced its axis."""
    index = plan.index(slot.tensor, slot.axis)
    offset = slot.offset if index is None else int((index < slot.offset).sum())
    return Slot(slot.tensor, slot.axis, slot.block, offset)


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

    def follow(self, call: Call) -> bool:
        """Apply the op's rule; without one, pin all that the op touches and return False if that cost anything."""
        rule = rule_of(call.func)
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
        self._axes = Axes()
        self.trains = False
        """Whether the model also runs in training mode."""
        self._pin_unknown = pin_unknown
        self._watch = Watch(skeleton)
        self._tensors = named_tensors(skeleton)
        self._parameters = {name for name, _ in skeleton.named_parameters()}
        self._steps: list[tuple[list[Tensor], list[Tensor]]] = []  # what every op read and wrote
        self._live: set[str] = set()
        self._declared = {name: [ax.fresh(n) for n in t.shape] for name, t in self._tensors.items()}
        for name, tensor in self._tensors.items():
            self._axes[tensor] = self._declared[name]
        for module in skeleton.modules():
            if isinstance(module, WHOLE_MODULES):
                self.pin(module.parameters(), f"{type(module).__name__} computes its widths itself")

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
        call = Call(func, args, kwargs, out, self._axes.__getitem__, self._axes.__setitem__)
        self._steps.append((call.tensors(), call.outputs()))
        if isinstance(self._watch.module, nn.RMSNorm) and self._watch.module.weight is None:
            self.pin(call.tensors(), "its size is given to a norm without weights")
        if not self._axes.follow(call) and not self._pin_unknown:
            raise UserError(
                f"{self._watch.where} uses {call.name}, an op without a rule: add one with "
                f'@offload_trainer.groups.rule("{call.name}"), or pass pin_unknown=True '
                "(config: structure.pin_unknown) to leave what it touches unsliced"
            )
        return out

    def pin(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            for axis in self._axes[tensor]:
                ax.pin(axis, reason)

    def find_live(self, outputs: list[Tensor]) -> None:
        """Find the parameters that the outputs depend on: backwards through the ops, by storage (writes in place)."""
        live = {_storage(tensor) for tensor in outputs}
        for read, written in reversed(self._steps):
            if not live.isdisjoint(map(_storage, written)):
                live.update(map(_storage, read))
        self._live = {name for name in self._parameters if _storage(self._tensors[name]) in live}
        self._steps.clear()

    def slots(self) -> list[tuple[Symbol, Slot]]:
        """Every run of a leaf on a parameter or buffer, in the model's order."""
        return [
            (leaf, Slot(name, dimension, block, offset))
            for name, axes in self._declared.items()
            for dimension, axis in enumerate(axes)
            for leaf, block, offset in ax.occurrences(axis)
        ]

    def sliceable(self) -> dict[Symbol, list[Slot]]:
        """Every leaf that may be sliced → its slots, of which at least one is on a parameter that the outputs need."""
        ax.pin_inner([axis for axes in self._declared.values() for axis in axes])
        found: dict[Symbol, list[Slot]] = {}
        for leaf, slot in self.slots():
            if not leaf.pinned and leaf.size > 1:
                found.setdefault(leaf, []).append(slot)
        return {leaf: slots for leaf, slots in found.items() if any(slot.tensor in self._live for slot in slots)}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fake(shape: torch.Size, dtype: torch.dtype, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


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
