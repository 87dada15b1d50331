"""Who reads a group's units: the layers that multiply them by a weight."""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from offload_trainer.groups.plan import Groups, Slot


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's units: the axis of its weight that its input lies on, and that of the input."""

    path: str
    weight: str
    """Name by which the groups know the weight (that of the first tensor tied to it)."""
    axis: int
    features: int
    """Axis of the layer's input that holds the units."""


def find_readers(model: nn.Module, groups: Groups) -> list[Reader]:
    """Every layer whose input axis some group slices."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first.setdefault(id(parameter), name)
    readers = []
    for path, module in model.named_modules():
        place = _input_axis(module)
        if place is None:
            continue
        weight = first.get(id(module._parameters.get("weight")))  # not `module.weight`, which may be a computation
        if weight is None:  # computed, or a buffer: nothing that is sliced and trained
            continue
        if groups.by_tensor.get(weight, {}).get(place[0]):
            readers.append(Reader(path, weight, *place))
    return readers


def _input_axis(module: nn.Module) -> tuple[int, int] | None:
    """(axis of the weight, axis of the input) that hold what a layer reads; None for a layer of another kind."""
    if isinstance(module, nn.Linear):
        return 1, -1
    if isinstance(module, Conv1D):
        return 0, -1
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        return (0 if module.transposed else 1), -1 - len(module.kernel_size)
    return None


def read_slots(readers: list[Reader], groups: Groups, name: str) -> list[tuple[Reader, Slot]]:
    """The slots of a group that a layer reads, with that layer."""
    return [(r, slot) for r in readers for slot in groups.slots(name) if (slot.tensor, slot.axis) == (r.weight, r.axis)]
