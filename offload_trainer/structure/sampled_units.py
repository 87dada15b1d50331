"""The sampled units as one flat vector: which part is whose, what may be kept of each group, and drawing masks."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from offload_trainer.structure.budgets import GroupBudget
from offload_trainer.structure.projection import project
from offload_trainer.structure.ranking import largest, largest_of_all
from offload_trainer.structure.samplers import bernoulli, bernoulli_twins, fixed, fixed_twins

Kept = dict[str, Tensor]
"""Name of each sampled group → its kept units, int64, sorted."""


class SampledUnits:
    """All that is asked of s at an optimizer step, whose keep ratios hold; it changes no s itself.

    sampler, budget: see `Structure`.
    """

    def __init__(self, budgets: Mapping[str, GroupBudget], sampler: str, budget: str):
        self._budgets, self._sampler, self._together = budgets, sampler, budget == "global"
        self.names = tuple(budgets)
        self.sizes = [group.units for group in budgets.values()]
        self.units = sum(self.sizes)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, (n,), by group."""
        return dict(zip(self.names, flat.split(self.sizes), strict=True)) if self.names else {}

    def allowance(self, name: str, step: int) -> float:
        """The largest sum of s in a group."""
        return self._budgets[name].allowance(step)

    def parts(self, step: int) -> Iterator[tuple[slice, float]]:
        """Units that share a budget, as places in the flat vector, and the largest sum of s there."""
        if self._together:
            yield slice(None), self._total(step)
            return
        start = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield slice(start, start + size), self.allowance(name, step)
            start += size

    def project(self, flat: Tensor, step: int) -> None:
        """Makes s fit the budgets, in place."""
        for units, budget in self.parts(step):
            flat[units] = project(flat[units], budget)

    def constant_widths(self, step: int) -> bool:
        """Whether every draw, from this step on, keeps the same number of units of each group."""
        settled = all(step >= group.schedule.steps for group in self._budgets.values())
        return not self.names or (self._sampler == "fixed" and not self._together and settled)

    def draw(self, flat: Tensor, step: int, generator: torch.Generator) -> Tensor:  # (n,) bool
        draw: Callable[..., Tensor] = fixed if self._sampler == "fixed" else bernoulli
        masks = [draw(s, self._count(name, s, step), generator) for name, s in self.by_name(flat).items()]
        return torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool, device="cpu")

    def antithetic_pair(
        self, flat: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:  # (n,) bool each
        """Two masks, each a draw, that differ as much as they can."""
        draw: Callable[..., tuple[Tensor, Tensor]] = fixed_twins if self._sampler == "fixed" else bernoulli_twins
        pairs = [draw(s, self._count(name, s, step), generator) for name, s in self.by_name(flat).items()]
        none = [torch.zeros(0, dtype=torch.bool, device="cpu")]
        return torch.cat([one for one, _ in pairs] or none), torch.cat([other for _, other in pairs] or none)

    def top(self, flat: Tensor, step: int) -> Kept:
        """The units of largest s; see `Structure.top`."""
        s = self.by_name(flat)
        if not self._together or not s:
            masks = {name: largest(part, self._width(name, part, step)) for name, part in s.items()}
        else:
            least = {name: group.least for name, group in self._budgets.items()}
            masks = largest_of_all(s, least, round(self._total(step)))
        return {name: mask.nonzero().flatten() for name, mask in masks.items()}

    def kept(self, mask: Tensor) -> Kept:
        return {name: part.nonzero().flatten() for name, part in self.by_name(mask).items()}

    def mask(self, kept: Mapping[str, Tensor]) -> Tensor:  # (n,) bool
        """The inverse of `kept`; it may name other groups as well."""
        mask = torch.zeros(self.units, dtype=torch.bool, device="cpu")
        for name, part in self.by_name(mask).items():
            part[kept[name]] = True
        return mask

    def centred(self, c: Tensor, s: Tensor, *, antithetic: bool = False) -> Tensor:  # (n,) all, float32
        """c, moved by a number for each group so that its weighted mean is 0 there, where a group's width never varies.

        Both masks of a pair keep as many units then, so cᵀ(m − m′) stays the same; and a common part of c says nothing
        of which units to keep. The weights are the shares of a unit in the pairs' variance: s(1 − s) or, of twins,
        min(s, 1 − s).
        """
        if self._sampler != "fixed":
            return c.float()
        c, s = c.double(), s.double()  # sums in float32 would depend on the number of threads
        variance = torch.minimum(s, 1 - s) if antithetic else s * (1 - s)
        shift = [
            (part * weight).sum() / weight.sum().clamp(min=torch.finfo(c.dtype).tiny)
            for part, weight in zip(c.split(self.sizes), variance.split(self.sizes), strict=True)
        ]
        return torch.cat([part - by for part, by in zip(c.split(self.sizes), shift, strict=True)]).float()

    def _total(self, step: int) -> float:
        """The largest sum of s over all sampled units."""
        return sum(self.allowance(name, step) for name in self.names)

    def _count(self, name: str, s: Tensor, step: int) -> int:
        """What a sampler has to know: units to keep, or to keep at least."""
        return self._width(name, s, step) if self._sampler == "fixed" else self._budgets[name].least

    def _width(self, name: str, s: Tensor, step: int) -> int:
        """Units of this group that the fixed sampler keeps."""
        if self._together:
            return max(self._budgets[name].least, round(float(s.double().sum())))
        return self._budgets[name].width(step)
