"""One run of a model on fake tensors, its axes followed through every op."""

import functools
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_trainer.errors import UserError
from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Symbol
from offload_trainer.groups.plan import Slot
from offload_trainer.groups.rules import Axes, Call, follow
from offload_trainer.groups.running import Inputs, Watch, plain_attention, run_model, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, with_tensors

logger = logging.getLogger(__name__)

WHOLE_MODULES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules whose forward computes widths from one another: their parameters are never sliced."""


@dataclass(frozen=True)
class Observer:
    """Runs models on fake tensors."""

    mode: FakeTensorMode
    inputs: Inputs
    """Fake tensors of `mode`."""
    pin_unknown: bool
    """Pin what an op without a rule touches, instead of raising."""
    open_constants: bool
    """Whether a size that the code gives to `zeros` or `expand` may be that of an axis which is sliced."""
    originals: Mapping[str, Tensor]
    """Parameters and buffers of the model that the skeletons are copies of, which no copy may compute with."""

    def observe(self, skeleton: nn.Module, failure: str, *, must_train: bool = False) -> "Trace":
        """A trace of the model in evaluation and, for branches that are only trained, in training.

        Raises `ModuleError`, beginning with `failure`, where the model does not run.
        """
        skeleton = with_tensors(skeleton, named_tensors(skeleton))  # some modules change in their forward
        trace = Trace(skeleton, self.originals, pin_unknown=self.pin_unknown, open_constants=self.open_constants)
        trace.pin(tensors_of(self.inputs), "an input of the model")
        with self.mode, torch.no_grad(), plain_attention(), unchecked(), quiet(), trace:
            skeleton.eval()
            outputs = tensors_of(run_watched(skeleton, self.inputs, failure))
            if not outputs:
                raise UserError(f"{failure}: it returns no tensor that could be found")
            skeleton.train()
            if must_train:
                outputs += tensors_of(run_watched(skeleton, self.inputs, f"{failure} in training"))
            else:
                try:
                    outputs += tensors_of(run_model(skeleton, self.inputs))
                    trace.trains = True
                except UserError:
                    raise
                except Exception:  # labels asked for, layers dropped at random: evaluation has to do
                    name = type(skeleton).__name__
                    logger.debug("%s does not run in training mode on these inputs", name, exc_info=True)
        trace.pin(outputs, "an output of the model")
        trace.find_live(outputs)
        return trace


class Trace(TorchDispatchMode):
    """Context: runs each op as it is, then its rule."""

    def __init__(
        self, skeleton: nn.Module, originals: Mapping[str, Tensor], *, pin_unknown: bool, open_constants: bool
    ):
        super().__init__()
        self._originals = {_storage(tensor): name for name, tensor in originals.items()}
        self._axes = Axes(open_constants=open_constants)
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

    def __enter__(self) -> "Trace":
        self._watch.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._require_own(args, kwargs)
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        call = Call(func, args, kwargs, out, self._axes)
        self._steps.append((call.tensors(), call.outputs()))
        if isinstance(self._watch.module, nn.RMSNorm) and self._watch.module.weight is None:
            self.pin(call.tensors(), "its size is given to a norm without weights")
        if not follow(call) and not self._pin_unknown:
            raise UserError(
                f"{self._watch.where} uses {call.name}, an op without a rule: add one with "
                f'@offload_trainer.groups.rule("{call.name}"), or pass pin_unknown=True '
                "(config: structure.pin_unknown) to leave what it touches unsliced"
            )
        return out

    def _require_own(self, args: tuple, kwargs: dict) -> None:
        """Raise for a tensor of the original: a function or a hook that a module keeps is not copied with it."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) and _storage(leaf) in self._originals:
                raise UserError(
                    f"{self._watch.where} computes with {self._originals[_storage(leaf)]} of the model itself, where a"
                    " copy of it runs: a function or a hook that it keeps refers to the model; use its own attributes"
                )

    def pin(self, tensors: Iterable[Tensor], reason: str) -> None:
        for tensor in tensors:
            for axis in self._axes[tensor]:
                ax.pin(axis, reason)
            ax.pin(self._axes.target(tensor) or [], reason)

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
            if not leaf.pinned and leaf.size > leaf.least:
                found.setdefault(leaf, []).append(slot)
        return {leaf: slots for leaf, slots in found.items() if any(slot.tensor in self._live for slot in slots)}


@contextmanager
def forgetful(model: nn.Module) -> Iterator[None]:
    """Context: what a function in a file of the model's has remembered meanwhile (functools' caches) it forgets again.

    Fake tensors would else come up wherever the model, or another, is run later.
    """
    files = {type(module).__module__ for module in model.modules()}
    caches = [o for o in gc.get_objects() if type(o) is functools._lru_cache_wrapper and o.__module__ in files]
    before = [cache.cache_info().misses for cache in caches]
    try:
        yield
    finally:
        for cache, misses in zip(caches, before, strict=True):
            if cache.cache_info().misses > misses:
                cache.cache_clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def fake(shape: torch.Size, dtype: torch.dtype, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype, device="cpu")


@contextmanager
def unchecked() -> Iterator[None]:
    """Context: torch does not look whether values are in their range; fake tensors have none."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with mock.patch.object(torch, "_check_tensor_all_with", lambda *_: None, create=True):
            yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Context: a failing fake op logs a whole traceback; our error is one line."""
    fake_ops = logging.getLogger("torch._subclasses.fake_tensor")
    before = fake_ops.level
    fake_ops.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        fake_ops.setLevel(before)
