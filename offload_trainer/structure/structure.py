"""The probability of every unit: drawing subnetworks from it, and learning it from pairs of losses."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.structure.arguments import PAIRLESS, Budget, Control, Estimator, Sampler, require_arguments
from offload_trainer.structure.budgets import GroupLike, ScheduleName, group_budgets, require
from offload_trainer.structure.coverage import Coverage, portrait
from offload_trainer.structure.credit import Credit
from offload_trainer.structure.descent import Descent
from offload_trainer.structure.effects import Effects
from offload_trainer.structure.estimators import ESTIMATORS, controlled, rloo
from offload_trainer.structure.mask_queue import AHEAD, MaskQueue
from offload_trainer.structure.sampled_units import Kept, SampledUnits
from offload_trainer.structure.starts import polarised


class Structure:
    """Probabilities s of the units of the sampled groups, on the CPU.

    A round calls `set_step(step)`, `pair()` (or `follow()` and, before its end, `look_ahead()`), `trained` and
    `update`. All follows from `seed` and those numbers, so ranks that share them draw the same masks.

    groups: any iterable of objects with `name` and `units`, such as `Groups`.
    keep: keep ratio of every group, in (0, 1]; not used when `per_group_keep` is given.
    per_group_keep: fnmatch pattern of group names → keep ratio; the first match decides. A group that matches
        none, or whose ratio is 1, is not sampled: it stays whole and has no s.
    estimator, alpha: gradient of s, and the exponent of its preconditioner, in [1/2, 1) (estimators.py). "disarm"
        compares twins; where masks follow one another, every second pair is of twins and the others count as "rloo".
        "credit" needs no pairs: s is polarised (starts.py) by how much the loss reacts to each unit, in the backward
        passes of the subnets that had it (credit.py). That is biased: it knows units only as they were trained.
        "magnitude" is the same by the size of the weights that read a unit. Units never trained count alike in both.
    control: "linear": what earlier pairs and credit predict of d (effects.py) is taken out of it, and the known mean of
        that added back; exact with "bernoulli", with "fixed" but for a factor that all units share.
    explore, explore_steps: for these two: share of a subnet's units that is expected to lie outside the best, and the
        optimizer steps in which that falls to zero, in a straight line; 0: it does not.
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
        control: Control = "none",
        alpha: float = 0.5,
        sampler: Sampler = "fixed",
        budget: Budget = "per_group",
        min_units: int = 1,
        width_steps: Mapping[str, int] | None = None,
        lr: float = 12e-3,
        paired_batches: int = 1,
        schedule: ScheduleName = "constant",
        start_keep: float | None = None,
        schedule_steps: int = 0,
        explore: float = 0.1,
        explore_steps: int = 0,
        seed: int = 0,
    ):
        kinds = {"estimator": estimator, "control": control, "sampler": sampler, "budget": budget, "schedule": schedule}
        require_arguments(keep, alpha, lr, paired_batches, min_units, width_steps, explore, **kinds)
        budgets = group_budgets(
            groups,
            keep,
            per_group_keep,
            schedule=schedule,
            start_keep=start_keep,
            schedule_steps=schedule_steps,
            min_units=min_units,
            width_steps=width_steps or {},
        )
        self._sampled = SampledUnits(budgets, sampler, budget)
        self.names, self.step = self._sampled.names, 0
        self.estimator, self.control, self.sampler, self.budget = estimator, control, sampler, budget
        self.alpha, self.min_units, self.paired_batches = alpha, min_units, paired_batches
        self._explore, self._explore_steps = explore, explore_steps
        self._generator = torch.Generator("cpu").manual_seed(seed)

        self._flat = torch.empty(units := self._sampled.units, dtype=torch.float32, device="cpu")
        self.s = self._sampled.by_name(self._flat)
        for name, s in self.s.items():
            s.fill_(self._sampled.allowance(name, 0) / s.numel())
        self._scores = torch.zeros_like(self._flat)
        self._outside = 0.0  # the share of a subnet's units outside the best by scores; 0: there are no scores
        self._masks, self.coverage = MaskQueue(units, self._sampled.kept), Coverage(units)
        self._credit, self._effects = Credit(units), Effects(units, remembers=control == "linear")
        self._descent = Descent(self._flat, lr)
        self._parts = {"adam": self._descent, "drawn": self._masks, "coverage": self.coverage}
        self._parts |= {"credit": self._credit, "effects": self._effects}

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
        return self._sampled.constant_widths(self.step)

    @property
    def compares(self) -> bool:
        """Whether s is learned from the losses of two subnetworks."""
        return self.estimator not in PAIRLESS

    @property
    def credited(self) -> tuple[str, ...]:
        """The groups of which `update` wants to know what the backward passes say."""
        return self.names if self.control == "linear" or not self.compares else ()

    def set_step(self, step: int) -> None:
        """Moves the schedule to optimizer step `step`; if that changes a budget, s is made to fit it, by projection.

        After `start_from`, from the scores anew: a projection would leave all units alike that were nearly certain.
        """
        before = list(self._sampled.parts(self.step))
        self.step = step
        if list(self._sampled.parts(step)) != before:
            self._fit()

    def start_from(self, scores: Mapping[str, Tensor], explore: float) -> None:
        """Sets s by the importance of units, most of it on those of the largest scores (starts.py).

        scores: name of each sampled group → (units,) not negative; comparable between groups if `budget` is global.
        explore: share of a subnet's units that is expected to lie outside the most important, in (0, 1).
        """
        require(0 < explore < 1, "explore", explore, "be in (0, 1)")
        for name, s in self.s.items():
            found = tuple(scores[name].shape) if name in scores else "none"
            if found != (len(s),):
                raise UserError(f"scores of group {name!r} ({found}) must be of shape ({len(s)},)")
        self._scores = torch.cat([scores[name].float() for name in self.names])
        self._outside = explore
        self._fit()

    def pair(self) -> tuple[Kept, ...]:
        """Draws m and m′ from s, independently, and remembers both for `update`."""
        self._masks.clear()
        return tuple(self._fill(2))

    def follow(self) -> tuple[Kept, ...]:
        """m and m′, which is the next round's m. They were drawn in earlier rounds, as far as there were any."""
        self._masks.step()
        return tuple(self._fill(2))

    def look_ahead(self) -> Kept:
        """The mask after m′, of which the next call of `follow` makes its m′: drawn from s now."""
        return self._fill(AHEAD)[-1]

    def update(
        self,
        d: float | None = None,
        kept: Mapping[str, Tensor] | None = None,
        credit: Mapping[str, Tensor] | None = None,
    ) -> None:
        """What a round has shown moves s, which stays in its budget.

        d: L(m) - L(m′) of the last pair, mean over the paired batches and all ranks. kept: the units that were
        trained, by group. credit: group → (2, kept units), the means over batches of c and c² (credit.py); both are
        wanted of `credited`. Raises UserError if a number is not finite and RuntimeError if no pair was drawn.
        """
        if d is not None and not math.isfinite(d):
            raise UserError(f"loss difference of the paired subnetworks ({d}) must be finite")
        if not self.names:
            return
        if d is not None and self.compares:
            self._descend(d)
        if credit is not None and kept is not None:
            self._see(kept, credit)
        if not self.compares and bool(self._credit.seen.any()):
            left = 1 - self.step / self._explore_steps if self._explore_steps else 1.0
            self._outside = self._explore * max(1e-6, left)
            self._scores = self._credit.scores(self._sampled.sizes, self._outside)
            self._fit()

    def _descend(self, d: float) -> None:
        """One step of Adam down the gradient that the last pair estimates."""
        if len(self._masks) < 2:
            raise RuntimeError("update() needs the masks of a pair(): draw one first")
        first, second, *_ = self._masks
        s, m, s2, m2 = first.s, first.mask, second.s, second.mask
        estimate = ESTIMATORS[self.estimator]
        if self.estimator == "disarm" and not second.twin:
            estimate = rloo  # the second of twins and the first of the next two: drawn independently
        if self.control == "linear":
            effects = self._effects.expected(self._credit.known(self._sampled.sizes))
            c = self._sampled.centred(self._effects.trust() * effects, s, antithetic=second.twin)
            self._descent.step(controlled(estimate, s, m, s2, m2, d, self.alpha, c))
            self._effects.compare(m, m2, d, effects)
        else:
            self._descent.step(estimate(s, m, s2, m2, d, self.alpha))
        self._sampled.project(self._flat, self.step)

    def _see(self, kept: Mapping[str, Tensor], credit: Mapping[str, Tensor]) -> None:
        features = torch.cat([credit[name].float() for name in self.names], 1)
        if not bool(features.isfinite().all()):
            raise UserError("the credit of a unit, from the gradients of a round, must be finite")
        self._credit.see(self._sampled.mask(kept), features)

    def trained(self, kept: Mapping[str, Tensor], steps: int, now: int) -> None:
        """The kept units, by group, have been trained for `steps` more, until step `now` of the run."""
        self.coverage.add(self._sampled.mask(kept), steps, now)

    def portrait(self, now: int) -> dict[str, dict[str, Any]]:
        """Name of each sampled group → s and coverage of its units at step `now`, for a log (coverage.py)."""
        steps, last = self._sampled.by_name(self.coverage.steps), self._sampled.by_name(self.coverage.last)
        return {name: portrait(s, steps[name], last[name], now) for name, s in self.s.items()}

    def draw(self) -> Kept:
        """One more sample. It replaces none that is remembered, but moves the generator on."""
        return self._sampled.kept(self._sampled.draw(self._flat, self.step, self._generator))

    def top(self) -> Kept:
        """The units of largest s, as many as the keep ratios of this step allow.

        per_group: the width of each group. global: round(sum of keep * units) of all, but `min_units` of each group at
        least. How equal s are ranked: ranking.py.
        """
        return self._sampled.top(self._flat, self.step)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that changes, as plain tensors: `load_state_dict` continues from them bit for bit."""
        return {
            "s": self._flat.clone(),
            **{f"{kind}.{key}": x for kind, part in self._parts.items() for key, x in part.state_dict().items()},
            "scores": self._scores.clone(),
            "outside": torch.tensor(self._outside, dtype=torch.float64, device="cpu"),
            "step": torch.tensor(self.step, device="cpu"),
            "units": torch.tensor(self._sampled.sizes, dtype=torch.long, device="cpu"),  # of each group
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
        self._scores, self._outside = state["scores"].clone(), float(state["outside"])
        self.step = int(state["step"])
        for kind, part in self._parts.items():
            part.load_state_dict({key: state[f"{kind}.{key}"] for key in part.state_dict()})
        self._generator.set_state(state["generator"])

    def _fit(self) -> None:
        """s from the scores, if there are any, and in any case within the budget."""
        for units, budget in self._sampled.parts(self.step) if self._outside else ():
            self._flat[units] = polarised(self._scores[units], budget, self._outside)
        self._sampled.project(self._flat, self.step)

    def _fill(self, count: int) -> list[Kept]:
        """Draws until so many masks are remembered."""
        while len(self._masks) < count:
            if self.estimator == "disarm":
                one, other = self._sampled.antithetic_pair(self._flat, self.step, self._generator)
                self._masks.push(one, self._flat)
                self._masks.push(other, self._flat, twin=True)
            else:
                self._masks.push(self._sampled.draw(self._flat, self.step, self._generator), self._flat)
        return [draw.kept for draw in self._masks][:count]
