"""The master: every parameter, buffer and moment, full size, in a few slabs of host memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.slicing import named_tensors, slice_module
from offload_trainer.master.moments import StateSpec
from offload_trainer.master.precision import FP32, Precision
from offload_trainer.master.slab import Slab, by_dtype, slab_bytes

Entries = dict[str, tuple[torch.dtype, torch.Size]]
"""Name → stored type and shape."""


class Master:
    """Takes a model over: its parameters and buffers move into slabs, and the model's own become views of them.

    A model on the meta device gets memory here for the first time and is then filled by `materialise(model)`. A real
    model is moved tensor by tensor, each old one freed before the next, so no two full copies ever exist. With a
    `precision` of bfloat16 the model's parameters really are of that type from then on, rounded to the nearest. With a
    `folder` the slabs are mapped files in it (master/slab.py), and not pinned: they may be larger than the memory.

    `tensors` maps names to full-size views, `moments` maps the optimizer's names (`exp_avg`) to such maps, and
    `scalars` maps parameter names to the optimizer's numbers (`step`), empty until the first write-back. `computes`
    maps names to the types the model came in, which are those of every subnet.
    """

    def __init__(
        self,
        model: nn.Module,
        state_spec: StateSpec,
        *,
        materialise: Callable[[nn.Module], None] | None = None,
        pin: bool = False,
        precision: Precision = FP32,
        folder: Path | None = None,
    ):
        pin = pin and folder is None
        self.model, self.precision = model, precision
        self._slabs: list[Slab] = []
        tensors: dict[str, Tensor] = {}
        full = named_tensors(model)
        self.computes: Mapping[str, torch.dtype] = MappingProxyType({name: t.dtype for name, t in full.items()})
        meta = [name for name, tensor in full.items() if tensor.is_meta]
        if meta and materialise is None:
            raise UserError(f"{meta[0]} is on the meta device: give `materialise`, which fills the model's tensors")
        _require_apart(full)
        model.zero_grad()  # what its owner has tried: from now on a gradient of the model itself is a mistake
        for dtype, shapes in by_dtype(stored_weights(full, precision)).items():
            # One that a real model moves into is not touched before: never two full copies.
            slab = Slab(shapes, dtype, pin=pin and bool(meta), folder=folder)
            self._slabs.append(slab)
            tensors.update(slab)
        names = list(full)
        del full
        for name in names:
            _adopt(model, name, tensors[name])
        if meta and materialise is not None:
            materialise(model)
        for slab in self._slabs if pin else ():
            slab.pin()
        self.tensors: Mapping[str, Tensor] = MappingProxyType({name: tensors[name] for name in names})
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.moments: dict[str, Mapping[str, Tensor]] = {}
        trained = {name: (self.computes[name], t.shape) for name, t in self.tensors.items() if name in self.trainable}
        for moment in state_spec.moments:
            views: dict[str, Tensor] = {}
            for dtype, shapes in by_dtype(stored_moments(state_spec.entries(moment, trained), precision)).items():
                slab = Slab(shapes, dtype, pin=pin, folder=folder)
                start = state_spec.starts.get(moment, 0.0)
                if folder is None or start:
                    slab.flat.fill_(start)  # all of it now, not bit by bit while training
                self._slabs.append(slab)
                views.update(slab)
            self.moments[moment] = MappingProxyType({name: views[name] for name in trained})
        self.scalars: dict[str, dict[str, float]] = {}

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def sliced(self, plan: Plan, groups: Groups) -> nn.Module:
        """A plan's module on the host, in the types it computes in, with tensors of its own."""
        module = slice_module(self.model, plan, groups)
        for name, tensor in named_tensors(module).items():
            tensor.data = tensor.data.to(self.computes[name])  # one at a time, each narrow one freed before the next
        return module

    def close(self) -> None:
        for slab in self._slabs:
            slab.close()


def master_bytes(model: nn.Module, state_spec: StateSpec, precision: Precision = FP32) -> dict[str, int]:
    """Bytes of the slabs a master of this model would hold: weights and buffers, then each moment."""
    trained = {name: (p.dtype, p.shape) for name, p in model.named_parameters() if p.requires_grad}
    tables = {"weights": stored_weights(named_tensors(model), precision)}
    tables |= {moment: stored_moments(state_spec.entries(moment, trained), precision) for moment in state_spec.moments}
    return {kind: sum(slab_bytes(shapes, dtype) for dtype, shapes in by_dtype(t).items()) for kind, t in tables.items()}


def stored_weights(tensors: Mapping[str, Tensor], precision: Precision) -> Entries:
    """Of a model's parameters and buffers, which are of the types they compute in."""
    return {
        name: (precision.weight(t.dtype, t.shape) if isinstance(t, nn.Parameter) else t.dtype, t.shape)
        for name, t in tensors.items()
    }


def stored_moments(entries: Entries, precision: Precision) -> Entries:
    """Of a moment that the optimizer keeps as `entries` says."""
    return {name: (precision.moment(dtype, shape), shape) for name, (dtype, shape) in entries.items()}


def _require_apart(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for two tensors that are one in memory alone and trained: in a slab they would be two."""
    last, end = "", 0  # of what lies before, the one that reaches furthest
    for start, name in sorted((t.data_ptr(), name) for name, t in tensors.items() if not t.is_meta and t.numel()):
        tensor = tensors[name]
        if start < end and (tensor.requires_grad or tensors[last].requires_grad):
            raise UserError(f"{last} and {name} share their memory but are two tensors: make them one, or clone it")
        # Where one is not contiguous, others may lie between its elements.
        reach = start + (tensor.nbytes if tensor.is_contiguous() else tensor.element_size())
        if reach > end:
            last, end = name, reach


def _adopt(model: nn.Module, name: str, view: Tensor) -> None:
    """Make the model's tensor `name`, under all the names it is tied to, the given view of the same values."""
    path, _, leaf = name.rpartition(".")
    old = getattr(model.get_submodule(path), leaf)
    if not old.is_meta:
        view.copy_(old.detach())
        if old.device == view.device:
            old.data = view  # the same object: whatever else the model keeps it as goes with it
            return
    new = nn.Parameter(view, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else view
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is old:
                    table[key] = new  # type: ignore[assignment]
