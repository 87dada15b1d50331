"""Which plan is trained in which round, and what it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.groups import Groups, Plan
from offload_trainer.structure import Structure

Reference = Literal["next", "fresh"]


@dataclass(frozen=True)
class Entry:
    """What one round does."""

    plan: Plan
    """Trained in it."""
    reference: Plan | None = None
    """Compared with it on the paired batches; None: s does not learn from this round."""
    next_plan: Plan | None = None
    """Of the next round, if it is known."""


class Agenda:
    """Plans of the rounds, in order. All follows from the structure, its state, and two switches.

    reference: "next" compares a plan with the one that is trained after it, so plans are drawn two rounds ahead (by
        `look_ahead`, while a round trains), and with the s of then; "fresh" with one that is drawn for this alone.
        Raises `UserError` for any other.
    """

    def __init__(self, groups: Groups, structure: Structure, reference: Reference):
        if reference not in get_args(Reference):
            raise UserError(f"reference ({reference!r}) must be next or fresh")
        self._groups, self._structure, self._reference = groups, structure, reference
        self.settled = False
        """From the next round on, the units of the largest s are trained and s stays as it is."""
        self.starts_from_top = False
        """s started from importance, so the first plan is known."""
        self._known: tuple[tuple[Mapping[str, Tensor], Plan], ...] = ()
        self._follows = False

    def begin(self, step: int, rounds: int) -> Entry:
        """The round after `rounds` others, at optimizer step `step`: masks are drawn as far as they are needed."""
        self._structure.set_step(step)
        self._follows = False
        if self.settled or not self._structure.names:
            return Entry(*self._plans([self._structure.top()]))
        first = self.starts_from_top and not rounds
        compared = self._structure.compares and not first
        if self._reference == "fresh":
            if first:
                return Entry(self.top())
            plan, other = self._plans(self._structure.pair())
            return Entry(plan, other if compared else None)
        plan, next_plan = self._follow()
        return Entry(self.top() if first else plan, next_plan if compared else None, next_plan)

    def foresee(self, plan: Plan, next_plan: Plan) -> Entry | None:
        """The round after the running one, before that has come to its end: of the plans that were drawn for it. None
        if its plan is another one."""
        return None if self.settled else Entry(plan, next_plan if self._structure.compares else None, next_plan)

    def catch_up(self, step: int) -> None:
        """A round that was foreseen began at optimizer step `step`, and the one before it has come to its end now."""
        self._structure.set_step(step)
        self._follow()

    def _follow(self) -> list[Plan]:
        plans = self._plans(self._structure.follow())
        self._follows = True
        return plans

    def look_ahead(self) -> Plan | None:
        """The plan after that of the next round, if that is known. Once a round."""
        if not self._follows:
            return None
        self._follows = False
        (after_next,) = self._plans([self._structure.look_ahead()], known=self._known)
        return after_next

    def learn(
        self, plan: Plan, steps: int, now: int, difference: float | None, credit: Mapping[str, Tensor] | None
    ) -> None:
        """The round of `plan` has ended after `steps`, at step `now` of the run. difference: d, if there were pairs;
        credit: what the backward passes said of its units, if that is wanted."""
        self._structure.trained(plan, steps, now)
        if difference is not None or credit is not None:
            self._structure.update(difference, plan, credit)

    def state_dict(self) -> dict[str, bool]:
        return {"settled": self.settled, "starts_from_top": self.starts_from_top}

    def load_state_dict(self, state: Mapping[str, bool]) -> None:
        self.settled, self.starts_from_top = state["settled"], state["starts_from_top"]

    def top(self) -> Plan:
        """The units of the largest s; all of them where no group is sampled."""
        return self._plan(self._structure.top())

    def _plans(self, masks: Sequence[Mapping[str, Tensor]], known: Sequence[tuple[Any, Plan]] = ()) -> list[Plan]:
        """Those known from earlier rounds are the same objects, with all the indices they have worked out.

        known: beside these.
        """
        plans = [self._plan(kept) for kept in masks]
        self._known = (*known, *zip(masks, plans, strict=True))
        return plans

    def _plan(self, mask: Mapping[str, Tensor]) -> Plan:
        known = next((plan for kept, plan in self._known if kept is mask), None)
        if known is not None:
            return known
        plan = Plan(self._groups, mask)
        return next((one for _, one in self._known if one == plan), plan)
