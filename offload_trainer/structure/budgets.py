"""How much of each group is kept: its keep ratio over the run, and the widths that follow from it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from offload_trainer.errors import UserError
from offload_trainer.structure.schedules import Schedule, constant, cubic

ScheduleName = Literal["constant", "cubic"]


class GroupLike(Protocol):
    """What a structure has to know of a group."""

    @property
    def name(self) -> str: ...
    @property
    def units(self) -> int: ...


@dataclass(frozen=True)
class GroupBudget:
    units: int
    """Units of the whole group."""
    schedule: Schedule
    least: int
    """Units that are kept in any case."""
    step: int = 1
    """The width is a multiple of so many units."""

    def allowance(self, at: int) -> float:
        """The largest Σs, in units, at optimizer step `at`."""
        return self.schedule.keep_at(at) * self.units if self.step == 1 else self.width(at)

    def width(self, at: int) -> int:
        """Units kept where widths are constant: the multiple of `step` nearest to the keep ratio, `least` at least."""
        wanted = self.schedule.keep_at(at) * self.units
        fewest, most = math.ceil(self.least / self.step), self.units // self.step
        return self.step * min(max(fewest, round(wanted / self.step)), most)


def require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise UserError(f"structure.{key} ({value}) must {rule}")


def group_budgets(
    groups: Iterable[GroupLike],
    keep: float,
    patterns: Mapping[str, float] | None,
    *,
    schedule: ScheduleName,
    start_keep: float | None,
    schedule_steps: int,
    min_units: int,
    width_steps: Mapping[str, int],
) -> dict[str, GroupBudget]:
    """Name of each sampled group → its budget; for the arguments see `Structure`. Raises `UserError`."""
    units = {group.name: group.units for group in groups}
    least = {group.name: getattr(group, "least", 1) for group in groups}
    ratios = _keep_ratios(list(units), keep, patterns)
    schedules = _schedules(ratios, schedule, start_keep, schedule_steps)
    budgets = {}
    for name in ratios:
        fewest, step = max(min_units, least[name]), width_steps.get(name, 1)
        require(fewest <= units[name], "min_units", fewest, f"be at most {units[name]}, the units of {name}")
        multiples = step * math.ceil(fewest / step)
        rule = f"leave a width for {name}, which has {units[name]} units and must keep {fewest}"
        require(multiples <= units[name], "multiple_of", f"{step} units", rule)
        budgets[name] = GroupBudget(units[name], schedules[name], fewest, step)
    return budgets


def _keep_ratios(names: list[str], keep: float, patterns: Mapping[str, float] | None) -> dict[str, float]:
    """Name of each sampled group → its keep ratio, below 1."""
    ratios = dict.fromkeys(names, keep if patterns is None else 1.0)
    free = names
    for pattern, ratio in (patterns or {}).items():
        require(0 < ratio <= 1, f"groups[{pattern!r}]", ratio, "be in (0, 1]")
        matched = [name for name in free if fnmatchcase(name, pattern)]
        free = [name for name in free if name not in matched]
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        rule = f"match a group that no earlier pattern matches; the groups are {some or 'none'}"
        require(bool(matched), "groups", repr(pattern), rule)
        ratios.update(dict.fromkeys(matched, ratio))
    return {name: ratio for name, ratio in ratios.items() if ratio < 1}


def _schedules(ratios: dict[str, float], kind: ScheduleName, start: float | None, steps: int) -> dict[str, Schedule]:
    """Name of each sampled group → its schedule."""
    if kind == "constant":
        require(start is None, "start_keep", start, "be left out when structure.schedule is constant")
        require(steps == 0, "schedule_steps", steps, "be left out when structure.schedule is constant")
        return {name: constant(ratio) for name, ratio in ratios.items()}
    start = 1.0 if start is None else start
    largest = max(ratios.values(), default=0.0)
    require(0 < start <= 1, "start_keep", start, "be in (0, 1]")
    require(largest <= start, "start_keep", start, f"not be below a keep ratio that it leads to ({largest})")
    require(steps >= 1, "schedule_steps", steps, "be at least 1 when structure.schedule is cubic")
    return {name: cubic(ratio, start, steps) for name, ratio in ratios.items()}
