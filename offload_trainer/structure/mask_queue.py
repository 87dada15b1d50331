"""The masks that are drawn and not yet done with, each with the probabilities it was drawn from."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_trainer.structure.sampled_units import Kept

AHEAD = 3
"""Masks that a round knows: the one that is trained, the one it is compared with, the one after that."""
ROOM = AHEAD + 1
"""Masks at most: twins are drawn together."""


@dataclass(frozen=True)
class Draw:
    mask: Tensor  # (n,) bool
    s: Tensor  # (n,) float32
    """What it was drawn from: an estimate needs s as it was then."""
    twin: bool
    """Whether it is the antithetic twin of the one before it."""
    kept: Kept
    """The same as indices: one object for as long as the mask is remembered."""


class MaskQueue:
    """m, m′ and what follows them. kept: makes indices of a mask."""

    def __init__(self, units: int, kept: Callable[[Tensor], Kept]):
        self._units, self._kept = units, kept
        self._draws: deque[Draw] = deque()

    def push(self, mask: Tensor, s: Tensor, *, twin: bool = False) -> None:
        """One more at the end."""
        self._draws.append(Draw(mask, s.clone(), twin, self._kept(mask)))

    def step(self) -> None:
        """Done with the first, if there is one: the others move up."""
        if self._draws:
            self._draws.popleft()

    def clear(self) -> None:
        self._draws.clear()

    def __len__(self) -> int:
        return len(self._draws)

    def __iter__(self) -> Iterator[Draw]:
        return iter(self._draws)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies; the shapes are always the same."""
        masks = torch.zeros(ROOM, self._units, dtype=torch.bool, device="cpu")
        s = torch.zeros(ROOM, self._units, dtype=torch.float32, device="cpu")
        twin = torch.zeros(ROOM, dtype=torch.bool, device="cpu")
        for i, draw in enumerate(self._draws):
            masks[i], s[i], twin[i] = draw.mask, draw.s, draw.twin
        return {"masks": masks, "from": s, "twin": twin, "count": torch.tensor(len(self), device="cpu")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.clear()
        for i in range(int(state["count"])):
            self.push(state["masks"][i].clone(), state["from"][i], twin=bool(state["twin"][i]))
