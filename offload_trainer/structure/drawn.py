"""The masks that are drawn and not yet done with, each with the probabilities it was drawn from."""

from collections.abc import Iterator

import torch
from torch import Tensor

AHEAD = 3
"""Masks at most: the one that is trained, the one it is compared with, the one after that."""


class Drawn:
    """m, m′ and what follows them; an estimate needs s as it was when each was drawn."""

    def __init__(self, units: int):
        self.masks = torch.zeros(AHEAD, units, dtype=torch.bool, device="cpu")
        self.s = torch.zeros(AHEAD, units, device="cpu")
        self.count = 0

    def push(self, mask: Tensor, s: Tensor) -> None:
        """One more at the end."""
        self.masks[self.count], self.s[self.count] = mask, s
        self.count += 1

    def step(self) -> None:
        """Done with the first, if there is one: the others move up."""
        if self.count:
            self.masks, self.s = self.masks.roll(-1, 0), self.s.roll(-1, 0)
            self.count -= 1

    def clear(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """s and mask of each, in order."""
        return zip(self.s[: self.count], self.masks[: self.count], strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies; the shapes are always the same."""
        count = torch.tensor(self.count, device="cpu")
        return {"masks": self.masks.clone(), "from": self.s.clone(), "count": count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.masks, self.s, self.count = state["masks"].clone(), state["from"].clone(), int(state["count"])
