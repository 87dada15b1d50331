"""The masks that are drawn and not yet done with, each with the probabilities it was drawn from."""

from collections.abc import Iterator

import torch
from torch import Tensor

AHEAD = 3
"""Masks that a round knows: the one that is trained, the one it is compared with, the one after that."""
ROOM = AHEAD + 1
"""Masks at most: twins are drawn together."""


class Drawn:
    """m, m′ and what follows them; an estimate needs s as it was when each was drawn."""

    def __init__(self, units: int):
        self.masks = torch.zeros(ROOM, units, dtype=torch.bool, device="cpu")
        self.s = torch.zeros(ROOM, units, dtype=torch.float32, device="cpu")
        self.twin = torch.zeros(ROOM, dtype=torch.bool, device="cpu")
        """Whether each is the antithetic twin of the one before it."""
        self.count = 0

    def push(self, mask: Tensor, s: Tensor, *, twin: bool = False) -> None:
        """One more at the end."""
        self.masks[self.count], self.s[self.count], self.twin[self.count] = mask, s, twin
        self.count += 1

    def step(self) -> None:
        """Done with the first, if there is one: the others move up."""
        if self.count:
            self.masks, self.s, self.twin = (x.roll(-1, 0) for x in (self.masks, self.s, self.twin))
            self.count -= 1

    def clear(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """s and mask of each, in order."""
        return zip(self.s[: self.count], self.masks[: self.count], strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies; the shapes are always the same."""
        count = torch.tensor(self.count, device="cpu")
        return {"masks": self.masks.clone(), "from": self.s.clone(), "twin": self.twin.clone(), "count": count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.masks, self.s, self.twin = (state[name].clone() for name in ("masks", "from", "twin"))
        self.count = int(state["count"])
