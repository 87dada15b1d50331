"""How the loss reacts to each unit of the trained subnet, read off the gradients that its backward passes left."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from offload_trainer.groups.plan import Groups, Plan, Slot
from offload_trainer.groups.readers import find_readers, read_slots


class Crediting:
    """Sums, over the batches of a round, of c and c², where c is the derivative of the loss for a gate on all that
    reads a unit: Σ w·∂L/∂w over the slots that a layer reads; of a group that none reads, over all its slots.

    names: the groups that are wanted; none, and it does nothing. magnitude: c is Σ w² instead.
    """

    def __init__(self, model: nn.Module, groups: Groups, names: Iterable[str], *, magnitude: bool = False):
        self._magnitude = magnitude
        readers, trained = find_readers(model, groups), {n for n, p in model.named_parameters() if p.requires_grad}
        self._slots: dict[str, list[Slot]] = {}
        for name in names:
            own = [slot for slot in groups.slots(name) if slot.tensor in trained]
            read = {slot for _, slot in read_slots(readers, groups, name)}
            self._slots[name] = [slot for slot in own if slot in read] or own
        self._sums: Tensor | None = None
        self._batches = 0

    @torch.no_grad()
    def add(self, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> None:
        """The gradients of one batch, which the parameters of a plan's subnet hold. Nothing waits for the device."""
        if not self._slots:
            return
        c = torch.cat([self._of(plan, parameters, name) for name in self._slots])  # (kept units of all groups,)
        features = torch.stack([c, c.square()])
        self._sums = features if self._sums is None else self._sums + features
        self._batches += 1

    def take(self, plan: Plan) -> dict[str, Tensor] | None:
        """Group → (2, kept units), the means over the batches since the last call; None if there were none."""
        if self._sums is None:
            return None
        means = (self._sums / self._batches).cpu()
        self._sums, self._batches = None, 0
        sizes = [len(plan[name]) for name in self._slots]
        return dict(zip(self._slots, means.split(sizes, 1), strict=True))

    def _of(self, plan: Plan, parameters: Mapping[str, nn.Parameter], name: str) -> Tensor:  # (kept units,) float32
        kept = len(plan[name])
        total = torch.zeros(kept, device=next(iter(parameters.values())).device)
        for slot in self._slots[name]:
            parameter = parameters[slot.tensor]
            factor = parameter if self._magnitude else parameter.grad
            if factor is None:
                continue
            others = [axis for axis in range(parameter.ndim) if axis != slot.axis]
            products = parameter * factor
            elements = products.sum(others, dtype=torch.float32) if others else products.float()
            index = plan.index(slot.tensor, slot.axis)
            first = slot.offset if index is None else int(torch.searchsorted(index, slot.offset))
            total += elements.narrow(0, first, kept * slot.block).view(kept, slot.block).sum(1)
        return total
