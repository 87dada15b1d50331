"""What the backward passes of the subnet say about each unit, for free: a prediction of the loss, and a score.

Think of a gate g = 1 on everything that reads a unit. Its gradient c = ∂L/∂g is Σ w·∂L/∂w over the weights that read
the unit, which a backward pass has computed anyway. To second order, leaving the unit out changes the loss by
−c + F/2 with F the Fisher information of the gate (Molchanov et al., "Importance Estimation for Neural Network
Pruning", 2019); from batch to batch c scatters with a variance proportional to F. So the means of c and c² over batches
are two features of a unit, and what they are worth, two numbers, is learned from pairs of masks whose losses are known.

Of a unit that was never trained nothing is known: in a prediction it counts like the mean of its group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MEMORY = 0.7
"""Share of what was known of a unit that stays when it is seen again."""
FORGET = 0.99
"""Share of what earlier pairs said that stays with each pair: weights change, and what c is worth with them."""
DOUBT, ENOUGH = 2, 9
"""As if so many pairs had shown a d of 0; and the pairs until which features are worth nothing."""
FEATURES = 2


class Credit:
    """Features of each unit, and the worth of a feature; all flat vectors over the sampled units."""

    def __init__(self, units: int, dtype: torch.dtype = torch.float32):
        self.features = torch.zeros(FEATURES, units, dtype=dtype, device="cpu")
        self.seen = torch.zeros(units, dtype=torch.bool, device="cpu")
        self._gram = torch.zeros(FEATURES, FEATURES, dtype=torch.float64, device="cpu")
        self._moment = torch.zeros(FEATURES, dtype=torch.float64, device="cpu")
        self._pairs = torch.zeros((), dtype=torch.float64, device="cpu")
        self._waiting = torch.zeros(FEATURES + 2, dtype=torch.float64, device="cpu")
        """The last pair: what the features said of it, its d, and 1 if there is one."""

    def see(self, mask: Tensor, features: Tensor) -> None:
        """mask: the trained units, (n,) bool. features: means of c and c² over a round's batches, (2, kept)."""
        fresh = ~self.seen[mask]
        self.features[:, mask] = torch.where(fresh, features, MEMORY * self.features[:, mask] + (1 - MEMORY) * features)
        self.seen |= mask

    def known(self, sizes: Sequence[int]) -> Tensor:
        """(2, n): features, of unseen units those of the mean of their group; sizes: units of each group."""
        parts = []
        for part, seen in zip(self.features.split(list(sizes), 1), self.seen.split(list(sizes)), strict=True):
            mean = part[:, seen].mean(1, keepdim=True) if bool(seen.any()) else torch.zeros_like(part[:, :1])
            parts.append(torch.where(seen, part, mean))
        return torch.cat(parts, 1) if parts else self.features

    @property
    def worth(self) -> Tensor:
        """(2,): ridge regression of the d of pairs on what the features said of them; 0 before there are enough."""
        if self._pairs < ENOUGH:
            return torch.zeros_like(self._moment)
        scale = self._gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        doubt = DOUBT / self._pairs * torch.eye(FEATURES, dtype=torch.float64, device="cpu")
        return torch.linalg.solve(self._gram / scale[:, None] / scale + doubt, self._moment / scale) / scale

    def compare(self, difference: Tensor, known: Tensor, d: float) -> None:
        """A pair has shown d = L(m) − L(m′). difference: m − m′, (n,). known: features then, (2, n).

        It counts from the pair after next on: masks that follow one another are in two pairs each, and no pair may be
        predicted by what one of its masks has shown.
        """
        if self._waiting[-1]:
            said, before = self._waiting[:FEATURES], self._waiting[FEATURES]
            self._gram = FORGET * self._gram + said[:, None] * said
            self._moment = FORGET * self._moment + said * before
            self._pairs = FORGET * self._pairs + 1
        self._waiting = torch.cat([known.double() @ difference.double(), self._waiting.new_tensor([d, 1])])

    def scores(self, sizes: Sequence[int], unknown: float) -> Tensor:
        """(n,), not negative: mean c². One that was never seen scores like the given quantile of those seen in its
        group (or of all, where none was): hopeful enough to be tried before the weakest."""
        scores, everywhere = self.features[1].clone(), self.features[1][self.seen]
        for part, seen in zip(scores.split(list(sizes)), self.seen.split(list(sizes)), strict=True):
            tried = part[seen] if bool(seen.any()) else everywhere
            if len(tried):
                part[~seen] = tried.quantile(unknown)
        return scores

    def state_dict(self) -> dict[str, Tensor]:
        named = {"features": self.features, "seen": self.seen}
        named |= {"gram": self._gram, "moment": self._moment, "pairs": self._pairs, "waiting": self._waiting}
        return {name: tensor.clone() for name, tensor in named.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.features, self.seen = state["features"].clone(), state["seen"].clone()
        self._gram, self._moment = state["gram"].clone(), state["moment"].clone()
        self._pairs, self._waiting = state["pairs"].clone(), state["waiting"].clone()
