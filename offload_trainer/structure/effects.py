"""The effect of each unit on the loss, learned from pairs of masks whose losses are known.

What two masks m and m′ show, d = L(m) − L(m′), is nearly linear in what they differ in: d = cᵀ(m − m′) + noise, with c
the effects of the units. Backward passes say beforehand what to expect of each (credit.py): its c is a little of each
of its features, and something of its own, whose variance grows with its mean c². The expected c, given the last pairs,
is that of a Gaussian process; it takes a linear system of as many unknowns as there are pairs, however many the units.
A handful of units often makes most of d, and is found after a few pairs that differ in it.

Source: Rasmussen & Williams, "Gaussian Processes for Machine Learning" (2006): Eq. 2.25 (mean), Section 2.7 (features),
Eq. 5.12 (what leaving out each pair would have predicted of it).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from offload_trainer.structure.credit import FEATURES

REMEMBERED = (64, 256)
"""Pairs that are remembered, the last ones: at least, at most."""
WORK = 1 << 23
"""Of m − m′ of all of them, elements that are looked at without a round being noticeably longer."""
ENOUGH = 8
"""Pairs until which nothing is expected."""
FORGETS = (0.95, 0.98, 1.0)
"""By how much less a pair counts with each that follows: weights change, and with them the effects."""
NOISES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Variances of the noise, as shares of that of d. Of all FORGETS and NOISES those are taken that predict left-out pairs
best."""
JUDGED = 0.95
"""As FORGETS, for how much each left-out pair counts in that."""
LEAST = 0.1
"""Variance of a unit's own effect where its c² is 0, as a share of the mean variance."""
LATELY = 0.9
"""As FORGETS, where it is asked how right predictions were."""
DOUBT = 0.5
"""As if so many pairs had shown that predictions are worth nothing."""
CHUNK = 1 << 16
"""Units that are looked at together, in float64."""
TINY = torch.finfo(torch.float64).tiny


class Effects:
    """The last pairs, and what they say of the units. remembers: whether there will be any, which takes memory.

    Masks that follow one another are in two pairs each, and no pair may be predicted by what one of its masks has
    shown. So what is asked is always answered by all pairs but the last.
    """

    def __init__(self, units: int, *, remembers: bool = True):
        least, most = REMEMBERED
        room = min(max(least, WORK // max(1, units)), most) + 1 if remembers else 0
        self._differences = torch.zeros(room, units, dtype=torch.int8, device="cpu")  # m − m′ of each, the newest last
        self._d = torch.zeros(room, dtype=torch.float64, device="cpu")
        self._predicted = torch.zeros(room, dtype=torch.float64, device="cpu")
        self._count = 0

    def compare(self, m: Tensor, m2: Tensor, d: float, effects: Tensor) -> None:
        """A pair, (n,) bool each, has shown d = L(m) − L(m2); effects: what was expected before it."""
        difference = m.to(torch.int8) - m2.to(torch.int8)
        new = ((self._differences, difference), (self._d, d), (self._predicted, effects @ difference.double()))
        for rows, row in new:
            rows.copy_(rows.roll(-1, 0))
            rows[-1] = row
        self._count = min(self._count + 1, len(self._d))

    def expected(self, features: Tensor) -> Tensor:
        """(n,) float64: the expected effects, 0 before there are enough pairs. features: (2, n), see `Credit`."""
        pairs = self._count - 1
        if pairs < ENOUGH:
            return torch.zeros(features.shape[1], dtype=torch.float64, device="cpu")
        squares = features[1].double()
        variances = squares / squares.mean().clamp(min=TINY) + LEAST  # of what is a unit's own, in any scale
        own = torch.zeros(pairs, pairs, dtype=torch.float64, device="cpu")
        said = torch.zeros(pairs, FEATURES, dtype=torch.float64, device="cpu")  # features, summed over what differs
        for units, differences in self._chunks():
            own += differences * variances[units] @ differences.T
            said += differences @ features[:, units].double().T
        # Both parts, and each feature, are as likely to matter.
        own_scale, said_scale = own.diagonal().mean().clamp(min=TINY), said.square().mean(0).clamp(min=TINY)
        weights = _fitted(own / own_scale + said / said_scale @ said.T, self._d[-self._count : -1])
        effects = (said / said_scale).T @ weights @ features.double()
        for units, differences in self._chunks():
            effects[units] += variances[units] / own_scale * (weights @ differences)
        return effects

    def trust(self) -> float:
        """How right predictions were lately, in [0, 1]: by which factor they would have been best."""
        d, predicted = (rows[-self._count : -1] for rows in (self._d, self._predicted))
        counts = _counts(len(d), LATELY)
        power = (counts * predicted.square()).sum() * (1 + DOUBT / counts.sum().clamp(min=TINY))
        return float(((counts * predicted * d).sum() / power.clamp(min=TINY)).clamp(0, 1))

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self._differences.shape[1], CHUNK):
            units = slice(start, start + CHUNK)
            yield units, self._differences[-self._count : -1, units].double()

    def state_dict(self) -> dict[str, Tensor]:
        rows = {"differences": self._differences, "d": self._d, "predicted": self._predicted}
        return {**{name: x.clone() for name, x in rows.items()}, "count": torch.tensor(self._count, device="cpu")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._differences, self._d, self._predicted = (state[n].clone() for n in ("differences", "d", "predicted"))
        self._count = int(state["count"])


def _counts(pairs: int, forget: float) -> Tensor:  # (pairs,)
    """How much each counts, the newest last."""
    return forget ** torch.arange(pairs - 1, -1, -1, dtype=torch.float64, device="cpu")


def _fitted(kernel: Tensor, d: Tensor) -> Tensor:  # (pairs,)
    """Weights of the pairs in what is expected. kernel: (pairs, pairs). d: (pairs,)."""
    judged = _counts(len(d), JUDGED)

    def fit(forget: float, noise: float) -> tuple[float, Tensor]:
        """Error in predicting each pair by the others, and the weights."""
        inverse = torch.linalg.inv(kernel + torch.diag(noise / _counts(len(d), forget)))
        weights = inverse @ d
        return float((judged * (weights / inverse.diagonal()).square()).sum()), weights

    fits = [fit(forget, noise) for forget in FORGETS for noise in NOISES]
    return min(fits, key=lambda one: one[0])[1]
