"""How the loss reacts to each unit of the trained subnet, read off the gradients that its backward passes left."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Groups, Plan, Slot
from offload_trainer.groups.readers import find_readers, read_slots

LAST = 4
"""Batches of a round, its last, whose gradients tell: what has just come in has been trained by then."""


class CreditSums:
    """Sums, over the batches of a round, of c and c², where c is the derivative of the loss for a gate on all that
    reads a unit: Σ w·∂L/∂w over the slots that a linear layer or a convolution reads; of a group that none reads, over
    all its slots. (A tied weight counts with what it does elsewhere, too.)

    names: the groups that are wanted; none, and it does nothing. magnitude: c is Σ w² instead. Raises `UserError` for
    groups that share elements.
    """

    def __init__(self, model: nn.Module, groups: Groups, names: Iterable[str], *, magnitude: bool = False):
        self._magnitude = magnitude
        self._slots: dict[str, list[Slot]] = {}
        self._sums: Tensor | None = None
        self._batches = 0
        names = list(names)
        if not names:
            return
        readers, trained = find_readers(model, groups), {n for n, p in model.named_parameters() if p.requires_grad}
        for name in names:
            _require_apart(groups, name)
            own = [slot for slot in groups.slots(name) if slot.tensor in trained]
            read = {slot for _, slot in read_slots(readers, groups, name)}
            self._slots[name] = [slot for slot in own if slot in read] or own

    @torch.no_grad()
    def add(self, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> None:
        """The gradients of one batch, which the parameters of a plan's subnet hold. Nothing waits for the device."""
        if not self._slots:
            return
        c = torch.cat([self._of(plan, parameters, name) for name in self._slots])  # (kept units of all groups,)
        features = torch.stack([c, c.square()])
        self._sums = features if self._sums is None else self._sums + features
        self._batches += 1

    def clear(self) -> None:
        """Forget them: the round they are of has not been."""
        self._sums, self._batches = None, 0

    def take(self) -> Tensor | None:
        """(2, kept units of all groups), on the device: the means over the batches since the last call; None if there
        were none."""
        if self._sums is None:
            return None
        means = self._sums / self._batches
        self.clear()
        return means

    def by_group(self, means: Tensor, plan: Plan) -> dict[str, Tensor]:
        """Group → (2, kept units) of what `take` returned of the plan's rounds."""
        return dict(zip(self._slots, means.split([len(plan[name]) for name in self._slots], 1), strict=True))

    def _of(self, plan: Plan, parameters: Mapping[str, nn.Parameter], name: str) -> Tensor:  # (kept units,) float32
        kept = len(plan[name])
        total = torch.zeros(kept, device=next(iter(parameters.values())).device)
        for slot in self._slots[name]:
            parameter = parameters[slot.tensor]
            factor = parameter if self._magnitude else parameter.grad
            if factor is None:
                continue
            others = [axis for axis in range(parameter.ndim) if axis != slot.axis]
            products = (parameter.conj() * factor).real if parameter.is_complex() else parameter * factor
            elements = products.sum(others, dtype=torch.float32) if others else products.float()
            index = plan.index(slot.tensor, slot.axis)
            first = slot.offset if index is None else int(torch.searchsorted(index, slot.offset))
            total += elements.narrow(0, first, kept * slot.block).view(kept, slot.block).sum(1)
        return total


def _require_apart(groups: Groups, name: str) -> None:
    """Raise if another group keeps or drops elements of this one's units."""
    units = groups[name].units
    for slot in groups.slots(name):
        for other, theirs in groups.by_tensor[slot.tensor][slot.axis]:
            apart = slot.offset + units * slot.block <= theirs.offset
            apart |= theirs.offset + other.units * theirs.block <= slot.offset
            if other.name != name and not apart:
                raise UserError(
                    f"groups {name!r} and {other.name!r} share elements of {slot.tensor}: what each does to the loss "
                    "cannot be told apart, use structure.estimator rloo without structure.control"
                )
