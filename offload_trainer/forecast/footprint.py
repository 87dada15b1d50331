"""How many bytes a forward and a backward take beside the weights: found by running them on fake tensors.

Nothing full-size is computed or allocated. The bytes are the totals of torch's own
`torch.distributed._tools.MemTracker`, which takes nine times as long, since it also says which module holds them.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_trainer import memory
from offload_trainer.groups.experts import countable_on_fake_tensors
from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import named_tensors, rebuild

_CUDA_BLOCK = 512
"""Bytes of which CUDA's caching allocator hands out whole multiples."""


class LiveBytes(TorchDispatchMode):
    """Context that counts the storages that ops make, for as long as they live; those of `outside` count nothing."""

    def __init__(self, outside: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.gradients = self.gradients_at_peak = 0
        self.heap = self.heap_at_peak = 0
        self._outside = list(outside)  # held, so that no other storage gets its address
        self._known = {tensor.untyped_storage()._cdata for tensor in self._outside}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), leaf.device)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak, self.heap_at_peak = self.now, self.gradients, self.heap
        return out

    def _count(self, storage: torch.UntypedStorage, device: torch.device) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        if device.type == "cuda":
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
        heap = size if size < memory.HEAP_BLOCK else 0

        def freed(_: object) -> None:
            del self._alive[key]
            self.now -= size
            self.heap -= heap

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.heap += heap
        self.largest = max(self.largest, size)


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the module's own tensors and the batch, at the fullest moment."""

    peak: int
    """All of them."""
    gradients: int
    """Gradients of parameters among them."""
    heap: int
    """All of them in blocks smaller than `memory.HEAP_BLOCK`."""
    largest: int
    """The largest single tensor that was made on the way."""


def skeleton(model: nn.Module, plan: Plan, device: torch.device) -> nn.Module:
    """The sliced module on fake tensors of a device, in training mode; the model may lie on the meta device."""
    shapes = {name: plan.shape(name) for name in named_tensors(model)}
    device = torch.device("cpu") if device.type == "cpu" else device  # a process of several calls its CPU cpu:0
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            name: torch.empty(shapes[name], dtype=t.dtype, device=device) for name, t in named_tensors(model).items()
        }
    # Only the weights are fake from here on. What is worked out of the batch alone (positions, masks) is real and
    # small, so a model may look at it, and chooses the kernels it will choose in the run.
    return rebuild(model, fakes, plan, plan.groups).train()


def retype(module: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Change the types of a skeleton's tensors."""
    for name, tensor in named_tensors(module).items():
        tensor.data = tensor.data.to(types[name])


def training_footprint(
    module: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, autocast: bool
) -> Footprint:
    """Of one forward and backward of a `skeleton`. `batch` is real, and on the skeleton's device."""
    with _live(module, batch) as live:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: _note_gradient(live, p))
        with _autocast(module, autocast, cached=True), countable_on_fake_tensors(module):
            loss = loss_fn(module, batch)
        loss.backward()
    return Footprint(live.peak, live.gradients_at_peak, live.heap_at_peak, live.largest)


@torch.no_grad()
def forward_footprint(
    module: nn.Module, function: Callable[[nn.Module, Any], Any], batch: Any, *, autocast: bool
) -> Footprint:
    """Of one forward of a `skeleton` without gradients, in evaluation mode, whose autocast keeps nothing."""
    module.eval()
    with _live(module, batch) as live, _autocast(module, autocast, cached=False), countable_on_fake_tensors(module):
        function(module, batch)
    return Footprint(live.peak, 0, live.heap_at_peak, live.largest)


def _live(module: nn.Module, batch: Any) -> LiveBytes:
    return LiveBytes([*named_tensors(module).values(), *(x for x in tree_leaves(batch) if isinstance(x, Tensor))])


def _note_gradient(live: LiveBytes, parameter: Tensor) -> None:
    assert parameter.grad is not None
    live.gradients += parameter.grad.untyped_storage().nbytes()


def _autocast(module: nn.Module, enabled: bool, *, cached: bool) -> torch.autocast:
    device = next(module.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer allocates, as multiples of bytes of parameters."""

    state: float
    """Kept from step to step, if it makes its state itself: of all parameters."""
    one: float
    """For a while in a step: of the largest parameter."""
    together: float
    """For a while in a step: of all parameters."""


def optimizer_cost(
    factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype, device: torch.device
) -> OptimizerCost:
    """Measured on small parameters.

    An optimizer that takes them one by one needs scratch for the one at hand, one that takes them together (`foreach`,
    the default on CUDA) for all.
    """
    unit = 2**12 * dtype.itemsize
    (few_state, few), (_, many) = (_second_step(factory, count, dtype, device) for count in (4, 8))
    together = (many - few) / (4 * unit)
    return OptimizerCost(few_state / (4 * unit), max(0.0, round(few / unit - 4 * together, 1)), round(together, 1))


def _second_step(
    factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, int]:
    """Bytes of the state of so many parameters of (64, 64), and the most that a step allocates at once beside it."""
    parameters = [nn.Parameter(torch.zeros(64, 64, dtype=dtype, device=device)) for _ in range(count)]
    optimizer = factory(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the state
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    with LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None), *state]) as live:
        optimizer.step()
    return sum(tensor.nbytes for tensor in state if tensor.ndim), live.peak
