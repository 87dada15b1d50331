"""The ledger: who will hold how many bytes, on the host and on the device, told before anything is allocated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import named_tensors, rebuild
from offload_trainer.master.master import master_bytes
from offload_trainer.master.moments import StateLayout
from offload_trainer.master.slab import by_dtype, slab_bytes


@dataclass(frozen=True)
class Ledger:
    """Predicted bytes, by what holds them. On a CPU the device's are host memory as well."""

    host: Mapping[str, int]
    device: Mapping[str, int]
    disk: Mapping[str, int]

    def __str__(self) -> str:
        lines = []
        for place, entries in (("host", self.host), ("device", self.device), ("disk", self.disk)):
            lines += [f"{place:<8}{name:<28}{_mib(size):>14}" for name, size in entries.items()]
            lines.append(f"{place:<8}{'together':<28}{_mib(sum(entries.values())):>14}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "host": dict(self.host),
            "host_bytes": sum(self.host.values()),
            "device": dict(self.device),
            "device_bytes": sum(self.device.values()),
        }


def predict(
    model: nn.Module,
    plan: Plan,
    layout: StateLayout,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    reference: bool,
    staged: bool,
    autocast: bool = False,
) -> Ledger:
    """The ledger of a run whose plans are as large as `plan`, with `batch` on each device.

    `reference`: a second subnet is held for the paired batches. `staged`: the device is not the host, so transfers
    pass through pinned buffers. `layout` without moments: the optimizer's state is not carried. The model may lie on
    the meta device; nothing is allocated.
    """
    tensors = named_tensors(model)
    small = {name: plan.shape(name) for name in tensors}
    weights = _bytes({name: (t.dtype, small[name]) for name, t in tensors.items()})
    trained = {name: (p.dtype, small[name]) for name, p in model.named_parameters() if p.requires_grad}
    gradients = sum(shape.numel() * dtype.itemsize for dtype, shape in trained.values())
    moments = {moment: _bytes(layout.entries(moment, trained)) for moment in layout.moments}
    host = master_bytes(model, layout)
    disk = {"one checkpoint": sum(host.values())}
    if staged:
        host["staging (pinned)"] = weights + sum(moments.values())
    device = {"subnet": weights, "gradients": gradients, **moments}
    if reference:
        device["reference"] = weights
    device["activations"] = activation_bytes(model, plan, loss_fn, batch, autocast=autocast)
    return Ledger(host, device, disk)


def activation_bytes(
    model: nn.Module, plan: Plan, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, autocast: bool
) -> int:
    """Bytes that the subnet's forward saves for its backward: counted on fake tensors, each storage once."""
    tensors = named_tensors(model)
    shapes = {name: plan.shape(name) for name in tensors}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until counted, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        fakes = {name: torch.empty(shapes[name], dtype=t.dtype) for name, t in tensors.items()}
        own = {tensor.untyped_storage()._cdata for tensor in fakes.values()}
        module = rebuild(model, fakes, plan, plan.groups).train()
        inputs = tree_map(lambda x: mode.from_tensor(x.cpu()) if isinstance(x, Tensor) else x, batch)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_fn(module, inputs)
    return sum(size for storage, size in seen.items() if storage not in own)


def _bytes(entries: Mapping[str, tuple[torch.dtype, torch.Size]]) -> int:
    return sum(slab_bytes(shapes, dtype) for dtype, shapes in by_dtype(entries).items())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
