"""The probability of every unit: drawing subnetworks from it, and learning it from pairs of losses."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.structure.arguments import Budget, Estimator, Sampler, require_arguments
from offload_trainer.structure.budgets import GroupLike, ScheduleName, group_budgets, require
from offload_trainer.structure.coverage import Coverage, portrait
from offload_trainer.structure.drawn import AHEAD, Drawn
from offload_trainer.structure.estimators import rloo, vr_pge
from offload_trainer.structure.projection import project
from offload_trainer.structure.ranking import largest, largest_of_all
from offload_trainer.structure.samplers import bernoulli, fixed
from offload_trainer.structure.starts import polarised

ESTIMATORS = {"rloo": rloo, "vr_pge": vr_pge}
Kept = dict[str, Tensor]
"""Name of each sampled group → its kept units, int64, sorted."""


class Structure:
    """Probabilities s of the units of the sampled groups, on the CPU.

    A round calls `set_step(step)`, `pair()` or `follow()` and, when the losses of the two subnetworks are known,
    `update(d)`. All follows from `seed` and the values of d, so ranks that share them draw the same masks.

    groups: any iterable of objects with `name` and `units`, such as `Groups`.
    keep: keep ratio of every group, in (0, 1]; not used when `per_group_keep` is given.
    per_group_keep: fnmatch pattern of group names → keep ratio; the first match decides. A group that matches
        none, or whose ratio is 1, is not sampled: it stays whole and has no s.
    estimator, alpha: gradient of s, and the exponent of its preconditioner, in [1/2, 1) (estimators.py).
    sampler: "fixed" keeps round(sum of s) units of a group, "bernoulli" draws each on its own (samplers.py).
    budget: "per_group": sum(s) <= keep * units in each group. "global": over all sampled units together. With
        "fixed", widths are constant under "per_group" and vary between draws under "global".
    min_units: units that every group keeps at least.
    width_steps: group name → the number of units its width is a multiple of, such as `groups.width_steps(64)`.
    lr: step size of Adam on s, about how far s moves in an update; 0: s stays as it starts.
    paired_batches: batches a round on which the two subnetworks are compared; d is the mean over them.
    schedule, start_keep, schedule_steps: the keep ratio, from `start_keep` (1 if None) to each group's (schedules.py).
    seed: of the one generator that draws the masks.

    Raises UserError: a value out of range, a pattern without effect, a group of fewer than `min_units` units.
    """

    names: tuple[str, ...]
    """The sampled groups, in the order of `groups`."""
    s: dict[str, Tensor]
    """Name → (units,) fp32 in [0, 1]: views of one flat vector, which `update` and `set_step` change."""
    step: int
    """The optimizer step whose keep ratios hold."""
    coverage: Coverage
    """Of all sampled units, in the order of `flat`."""

    def __init__(
        self,
        groups: Iterable[GroupLike],
        keep: float = 0.25,
        *,
        per_group_keep: dict[str, float] | None = None,
        estimator: Estimator = "rloo",
        alpha: float = 0.5,
        sampler: Sampler = "fixed",
        budget: Budget = "per_group",
        min_units: int = 1,
        width_steps: Mapping[str, int] | None = None,
        lr: float = 12e-3,
        paired_batches: int = 4,
        schedule: ScheduleName = "constant",
        start_keep: float | None = None,
        schedule_steps: int = 0,
        seed: int = 0,
    ):
        kinds = {"estimator": estimator, "sampler": sampler, "budget": budget, "schedule": schedule}
        require_arguments(keep, alpha, lr, paired_batches, min_units, width_steps, **kinds)
        self._budgets = group_budgets(
            groups,
            keep,
            per_group_keep,
            schedule=schedule,
            start_keep=start_keep,
            schedule_steps=schedule_steps,
            min_units=min_units,
            width_steps=width_steps or {},
        )

        self.names, self.step = tuple(self._budgets), 0
        self.estimator: Estimator = estimator
        self.sampler: Sampler = sampler
        self.budget: Budget = budget
        self.alpha, self.min_units = alpha, min_units
        self.paired_batches = paired_batches
        self._generator = torch.Generator("cpu").manual_seed(seed)

        units = sum(group.units for group in self._budgets.values())
        self._flat = torch.empty(units, dtype=torch.float32, device="cpu")
        self.s = self._by_name(self._flat)
        for name, s in self.s.items():
            s.fill_(self._allowance(name) / s.numel())
        self._scores = torch.zeros_like(self._flat)
        self._explore = 0.0  # 0: no scores were given
        self._drawn, self.coverage = Drawn(units), Coverage(units)
        self._adam = torch.optim.Adam([self._flat], lr=lr)
        # Made here and not by the first step, so that state_dict always has the same keys.
        self._moments: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(self._flat),
            "exp_avg_sq": torch.zeros_like(self._flat),
        }
        self._adam.state[self._flat] = self._moments

    @property
    def flat(self) -> Tensor:
        """s of all sampled units, (n,)."""
        return self._flat

    @property
    def keep(self) -> float:
        """Sum of s over the number of sampled units; 1 when no group is sampled."""
        return float(self._flat.double().mean()) if self.names else 1.0

    @property
    def constant_widths(self) -> bool:
        """Whether every draw, from this step on, keeps the same number of units of each group."""
        settled = all(self.step >= group.schedule.steps for group in self._budgets.values())
        return not self.names or (self.sampler == "fixed" and self.budget == "per_group" and settled)

    def set_step(self, step: int) -> None:
        """Moves the schedule to optimizer step `step`; if that changes a budget, s is made to fit it, by projection.

        After `start_from`, from the scores anew: a projection would leave all units alike that were nearly certain.
        """
        before = [self._allowance(name) for name in self.names]
        self.step = step
        if [self._allowance(name) for name in self.names] != before:
            self._fit()

    def start_from(self, scores: Mapping[str, Tensor], explore: float) -> None:
        """Sets s by the importance of units, most of it on those of the largest scores (starts.py).

        scores: name of each sampled group → (units,) not negative; comparable between groups if `budget` is global.
        explore: share of a subnet's units that is expected to lie outside the most important, in (0, 1).
        """
        require(0 < explore < 1, "explore", explore, "be in (0, 1)")
        self._scores = torch.cat([scores[name].float() for name in self.names])
        self._explore = explore
        self._fit()

    def pair(self) -> tuple[Kept, ...]:
        """Draws m and m′ from s, independently, and remembers both for `update`."""
        self._drawn.clear()
        return tuple(self._fill(2))

    def follow(self) -> tuple[Kept, ...]:
        """m, m′ and the mask after them, of which the next call makes its m and m′: only one is drawn, from s now."""
        self._drawn.step()
        return tuple(self._fill(AHEAD))

    def update(self, d: float) -> None:
        """Moves s down the gradient that the last pair estimates, and back into its budget.

        d: L(m) - L(m′), mean over the paired batches and all ranks. Raises UserError if it is not finite (s
        is as before) and RuntimeError if no pair was drawn.
        """
        if not math.isfinite(d):
            raise UserError(f"loss difference of the paired subnetworks ({d}) must be finite")
        if not self.names:
            return
        if self._drawn.count < 2:
            raise RuntimeError("update() needs the masks of a pair(): draw one first")
        (s, m), (s2, m2), *_ = self._drawn
        self._flat.grad = ESTIMATORS[self.estimator](s, m, s2, m2, d, self.alpha)
        self._adam.step()
        self._project()

    def trained(self, kept: Mapping[str, Tensor], steps: int, now: int) -> None:
        """The kept units, by group, have been trained for `steps` more, until step `now` of the run."""
        mask = torch.zeros_like(self._flat, dtype=torch.bool)
        for name, part in self._by_name(mask).items():
            part[kept[name]] = True
        self.coverage.add(mask, steps, now)

    def portrait(self, now: int) -> dict[str, dict[str, Any]]:
        """Name of each sampled group → s and coverage of its units at step `now`, for a log (coverage.py)."""
        steps, last = self._by_name(self.coverage.steps), self._by_name(self.coverage.last)
        return {name: portrait(s, steps[name], last[name], now) for name, s in self.s.items()}

    def draw(self) -> Kept:
        """One more sample. It replaces none that is remembered, but moves the generator on."""
        return self._kept(self._draw())

    def top(self) -> Kept:
        """The units of largest s, as many as the keep ratios of this step allow.

        per_group: the width of each group. global: round(sum of keep * units) of all, but `min_units` of each group at
        least. How equal s are ranked: ranking.py.
        """
        if not self.names:
            return {}
        if self.budget == "per_group":
            masks = {name: largest(s, self._width(name)) for name, s in self.s.items()}
        else:
            least = {name: group.least for name, group in self._budgets.items()}
            masks = largest_of_all(self.s, least, round(self._total()))
        return self._kept(torch.cat(list(masks.values())))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that changes, as plain tensors: `load_state_dict` continues from them bit for bit."""
        return {
            "s": self._flat.clone(),
            **{f"adam.{key}": value.clone() for key, value in self._moments.items()},
            "scores": self._scores.clone(),
            "explore": torch.tensor(self._explore, dtype=torch.float64, device="cpu"),
            "step": torch.tensor(self.step, device="cpu"),
            **{f"drawn.{key}": value for key, value in self._drawn.state_dict().items()},
            **{f"coverage.{key}": value for key, value in self.coverage.state_dict().items()},
            "units": torch.tensor([len(s) for s in self.s.values()], dtype=torch.long, device="cpu"),  # of each group
            "generator": self._generator.get_state(),  # uint8
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over the state of a structure made with the same arguments; UserError if it does not fit."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise UserError(f"structure state ({', '.join(state) or 'empty'}) must hold {', '.join(own)}")
        if not torch.equal(state["units"], own["units"]):
            raise UserError(
                f"structure state ({len(state['units'])} sampled groups, {state['s'].numel()} units) must fit"
                f" the model and keep ratios of this run ({len(self.names)}, {self._flat.numel()})"
            )
        self._flat.copy_(state["s"])
        for key, value in self._moments.items():
            value.copy_(state[f"adam.{key}"])
        self._scores, self._explore = state["scores"].clone(), float(state["explore"])
        self.step = int(state["step"])
        self._drawn.load_state_dict({key: state[f"drawn.{key}"] for key in self._drawn.state_dict()})
        self.coverage.load_state_dict({key: state[f"coverage.{key}"] for key in self.coverage.state_dict()})
        self._generator.set_state(state["generator"])

    def _allowance(self, name: str) -> float:
        """The largest sum of s in this group, at this step."""
        return self._budgets[name].allowance(self.step)

    def _total(self) -> float:
        """The largest sum of s over all sampled units, at this step."""
        return sum(map(self._allowance, self.names))

    def _width(self, name: str) -> int:
        """Units of this group that the fixed sampler keeps."""
        if self.budget == "global":
            return max(self._budgets[name].least, round(float(self.s[name].double().sum())))
        return self._budgets[name].width(self.step)

    def _fit(self) -> None:
        """s from the scores, if there are any, and in any case within the budget."""
        for units, budget in self._parts() if self._explore else ():
            self._flat[units] = polarised(self._scores[units], budget, self._explore)
        self._project()

    def _project(self) -> None:
        for units, budget in self._parts():
            self._flat[units] = project(self._flat[units], budget)

    def _parts(self) -> Iterator[tuple[slice, float]]:
        """Units that share a budget, as places in the flat vector, and the largest sum of s there."""
        if self.budget == "global":
            yield slice(None), self._total()
            return
        start = 0
        for name, s in self.s.items():
            yield slice(start, start + len(s)), self._allowance(name)
            start += len(s)

    def _fill(self, count: int) -> list[Kept]:
        """Draws until so many masks are remembered."""
        while self._drawn.count < count:
            self._drawn.push(self._draw(), self._flat)
        return [self._kept(mask) for _, mask in self._drawn]

    def _draw(self) -> Tensor:  # (n,) bool
        mask = torch.zeros_like(self._flat, dtype=torch.bool)
        for name, part in self._by_name(mask).items():
            s = self.s[name]
            if self.sampler == "fixed":
                part.copy_(fixed(s, self._width(name), self._generator))
            else:
                part.copy_(bernoulli(s, self._budgets[name].least, self._generator))
        return mask

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:  # views of (n,)
        if not self.names:
            return {}
        return dict(zip(self.names, flat.split([group.units for group in self._budgets.values()]), strict=True))

    def _kept(self, mask: Tensor) -> Kept:
        return {name: part.nonzero().flatten() for name, part in self._by_name(mask).items()}
