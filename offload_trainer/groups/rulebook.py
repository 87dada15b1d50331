"""Groups written by hand: group name → slots as `tensor:axis[:block[:offset]]`."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Group, Groups, Slot, Widths
from offload_trainer.groups.slicing import named_tensors


def read_rules(rules: Mapping[str, Sequence[str]], model: nn.Module, widths: Widths | None = None) -> Groups:
    """The groups that a config writes out. A group has as many units as its smallest slot has room for.

    Raises `UserError` for a slot that cannot be read, or that the model does not have.
    """
    shapes = {name: torch.Size(tensor.shape) for name, tensor in named_tensors(model).items()}
    groups = []
    for name, texts in rules.items():
        if not texts:
            raise UserError(f"structure.rules: group {name!r} has no slot")
        slots = tuple(_slot(name, text) for text in texts)
        room = []
        for slot in slots:
            shape = shapes.get(slot.tensor)
            if shape is None:
                raise UserError(f"structure.rules: group {name!r} names {slot.tensor!r}, which the model does not have")
            if slot.axis >= len(shape):
                raise UserError(f"structure.rules: {str(slot)!r}: no axis {slot.axis} in shape {tuple(shape)}")
            room.append((shape[slot.axis] - slot.offset) // slot.block)
        groups.append(Group(name, min(room), slots))
    return Groups(tuple(groups), shapes, widths or {})


def _slot(group: str, text: str) -> Slot:
    tensor, *numbers = text.split(":")
    try:
        axis, block, offset = [int(number) for number in numbers] + [1, 0][len(numbers) - 1 :]
        if axis < 0 or block < 1 or offset < 0:
            raise ValueError
        return Slot(tensor, axis, block, offset)
    except ValueError:
        raise UserError(f"structure.rules: group {group!r}: {text!r} must be tensor:axis[:block[:offset]]") from None
