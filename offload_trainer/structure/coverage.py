"""Which units have been trained, how long, and when last."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROWS = 64
"""Of a group in a picture of it: neighbouring units share a row."""


class Coverage:
    """steps: optimizer steps that each unit has been trained, (n,). last: the run's step when it last was; 0: never."""

    def __init__(self, units: int):
        self.steps = torch.zeros(units, dtype=torch.long, device="cpu")
        self.last = torch.zeros(units, dtype=torch.long, device="cpu")

    def add(self, mask: Tensor, steps: int, now: int) -> None:
        """The units of a mask, (n,) bool, have been trained for `steps`, until step `now` of the run."""
        self.steps.add_(mask, alpha=steps)
        self.last.masked_fill_(mask, now)

    def state_dict(self) -> dict[str, Tensor]:
        return {"steps": self.steps.clone(), "last": self.last.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.steps, self.last = state["steps"].clone(), state["last"].clone()


def portrait(s: Tensor, steps: Tensor, last: Tensor, now: int) -> dict[str, Any]:
    """A group as a log can hold it, all (units,): lists of at most `ROWS` numbers, each of as many neighbours.

    width: units that were trained last. s: mean probability. trained: mean share of the steps so far. age: the most
    steps since a unit was trained.
    """

    def rows(values: Tensor, digits: int, most: bool = False) -> list[float]:
        parts = values.double().tensor_split(min(ROWS, len(values)))
        return [round(float(part.max() if most else part.mean()), digits) for part in parts]

    return {
        "units": len(s),
        "width": int((last == last.max()).sum()) if now else 0,
        "s": rows(s, 3),
        "trained": rows(steps / max(1, now), 3),
        "age": [int(age) for age in rows(now - last, 0, most=True)],
    }
