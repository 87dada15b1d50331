"""The master: every parameter, buffer and moment, full size, in a few slabs of host memory."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master.moments import StateLayout
from offload_trainer.master.slab import Slab, by_dtype, slab_bytes


class Master:
    """Takes a model over: its parameters and buffers move into slabs, and the model's own become views of them.

    A model on the meta device gets memory here for the first time and is then filled by `materialise(model)`. A real
    model is moved tensor by tensor, each old one freed before the next, so no two full copies ever exist.

    `tensors` maps names to full-size views, `moments` maps the optimizer's names (`exp_avg`) to such maps, and
    `scalars` maps parameter names to the optimizer's numbers (`step`), empty until the first write-back.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: StateLayout,
        *,
        materialise: Callable[[nn.Module], None] | None = None,
        pin: bool = False,
    ):
        self.model = model
        self._slabs: list[Slab] = []
        tensors: dict[str, Tensor] = {}
        full = named_tensors(model)
        meta = any(tensor.is_meta for tensor in full.values())
        for dtype, shapes in by_dtype({name: (t.dtype, t.shape) for name, t in full.items()}).items():
            slab = Slab(shapes, dtype, pin=pin)
            self._slabs.append(slab)
            tensors.update(slab)
        names = list(full)
        del full
        for name in names:
            _adopt(model, name, tensors[name])
        if meta and materialise is not None:
            materialise(model)
        self.tensors: Mapping[str, Tensor] = MappingProxyType({name: tensors[name] for name in names})
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.moments: dict[str, Mapping[str, Tensor]] = {}
        trained = {n: (t.dtype, t.shape) for n, t in self.tensors.items() if n in self.trainable}
        for moment in layout.moments:
            views: dict[str, Tensor] = {}
            for dtype, shapes in by_dtype(layout.entries(moment, trained)).items():
                slab = Slab(shapes, dtype, pin=pin)
                slab.flat.zero_()
                self._slabs.append(slab)
                views.update(slab)
            self.moments[moment] = MappingProxyType({name: views[name] for name in trained})
        self.scalars: dict[str, dict[str, float]] = {}

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def close(self) -> None:
        for slab in self._slabs:
            slab.close()


def master_bytes(model: nn.Module, layout: StateLayout) -> dict[str, int]:
    """Bytes of the slabs a master of this model would hold: weights and buffers, then each moment."""
    tensors = {name: (t.dtype, t.shape) for name, t in named_tensors(model).items()}
    trained = {name: (p.dtype, p.shape) for name, p in model.named_parameters() if p.requires_grad}
    sizes = {"weights": sum(slab_bytes(shapes, dtype) for dtype, shapes in by_dtype(tensors).items())}
    for moment in layout.moments:
        table = by_dtype(layout.entries(moment, trained))
        sizes[moment] = sum(slab_bytes(shapes, dtype) for dtype, shapes in table.items())
    return sizes


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
