"""What the backward passes of the subnet say about each unit, for free: a score, and what to expect of its effect.

Think of a gate g = 1 on everything that reads a unit. Its gradient c = ∂L/∂g is Σ w·∂L/∂w over the weights that read
the unit, which a backward pass has computed anyway. To second order, leaving the unit out changes the loss by
−c + F/2 with F the Fisher information of the gate (Molchanov et al., "Importance Estimation for Neural Network
Pruning", 2019); from batch to batch c scatters with a variance proportional to F. So the means of c and c² over batches
are two features of a unit; what they are worth is learned from pairs of masks whose losses are known (effects.py).

Of a unit that was never trained nothing is known: in a prediction it counts like the mean of its group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MEMORY = 0.7
"""Share of what was known of a unit that stays when it is seen again."""
FEATURES = 2


class Credit:
    """Features of each unit; all flat vectors over the sampled units."""

    def __init__(self, units: int):
        self.features = torch.zeros(FEATURES, units, dtype=torch.float32, device="cpu")
        self.seen = torch.zeros(units, dtype=torch.bool, device="cpu")

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
        return {"features": self.features.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.features, self.seen = state["features"].clone(), state["seen"].clone()
