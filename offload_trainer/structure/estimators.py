"""Gradients of the expected loss for the probabilities s, from the losses of two masks and no backward pass.

All estimate H^alpha(s) * grad_s E[L(m)] without bias, where H(s) = diag(s(1 - s)) and m ~ Bernoulli(s). The
preconditioner tames the score (m - s) / (s(1 - s)), which explodes near s = 0 and s = 1: for alpha >= 1/2 the
variance is bounded for every s. A unit with s = 0 or s = 1 is no longer random; its gradient is 0.

A mask drawn some rounds ago was drawn from the s of then, so each comes with its own. Where the two differ, `rloo`
estimates the mean of the gradients at both.

Each is linear in d, and what it is in expectation for d = cᵀ(m - m2) is known: `known_mean`. So a prediction of d by
a c that knows nothing of this pair can be taken out of it and its mean added back: no bias, and less variance the
better it predicts (a control variate).

Source: appendix of Zhou et al., "Efficient Neural Network Training via Forward and Backward Propagation
Sparsification" (NeurIPS 2021), Eq. 11 (the bound) and Eq. 12 (`vr_pge`).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def vr_pge(
    s: Tensor,  # (n,) in [0, 1]: what m was drawn from
    m: Tensor,  # (n,) or (..., n), 0/1 or bool
    s2: Tensor,  # as s, of m2
    m2: Tensor,  # as m, drawn independently of it; only its loss counts here
    d: float | Tensor,  # L(m) - L(m2); a tensor broadcasts against m
    alpha: float,  # in [1/2, 1)
) -> Tensor:  # shape of m
    """The paper's: d * H^alpha(s) * (m - s) / (s(1 - s)). The loss of m2 is a baseline for that of m."""
    return d * _score(s, m, alpha)


def rloo(
    s: Tensor,  # (n,) in [0, 1]: what m was drawn from
    m: Tensor,  # (n,) or (..., n), 0/1 or bool
    s2: Tensor,  # as s, of m2
    m2: Tensor,  # as m, drawn independently of it
    d: float | Tensor,  # L(m) - L(m2); a tensor broadcasts against m
    alpha: float,  # in [1/2, 1)
) -> Tensor:  # shape of m
    """d / 2 * H^alpha(s) * (m - m2) / (s(1 - s)) where s = s2: each mask is the baseline of the other.

    That is `vr_pge` averaged with itself after swapping the masks (leave-one-out, Kool et al. 2019). Per
    coordinate, Var(rloo) = E[vr_pge^2] / 2 = (Var(vr_pge) + g^2) / 2 with g the gradient: half, where noise
    outweighs signal.
    """
    return d / 2 * (_score(s, m, alpha) - _score(s2, m2, alpha))


def disarm(
    s: Tensor,  # (n,) in [0, 1]: what both were drawn from
    m: Tensor,  # (n,) or (..., n), 0/1 or bool
    s2: Tensor,  # as s
    m2: Tensor,  # as m, its antithetic twin (samplers.py)
    d: float | Tensor,  # L(m) - L(m2); a tensor broadcasts against m
    alpha: float,  # in [1/2, 1)
) -> Tensor:  # shape of m
    """d / 2 * H^alpha(s) * (m - m2) * max(s, 1 - s) / (s(1 - s)), for twins, which differ as much as they can.

    DisARM (Dong, Mnih & Tucker 2020; U2G of Yin et al. 2020), whose gradient is for the logit of s, over the
    derivative s(1 - s) of s for it. A unit on which the twins agree gets 0: the conditional mean, given what they
    differ in, that less antithetic estimates scatter around. It gains most near s = 1/2.
    """
    variance = s * (1 - s)
    certain = variance <= 0
    factor = torch.maximum(s, 1 - s) * variance.masked_fill(certain, 1).pow(alpha - 1)
    return d / 2 * ((m.to(s.dtype) - m2.to(s.dtype)) * factor).masked_fill(certain, 0)


Estimate = Callable[[Tensor, Tensor, Tensor, Tensor, float | Tensor, float], Tensor]
ESTIMATORS: dict[str, Estimate] = {"rloo": rloo, "vr_pge": vr_pge, "disarm": disarm}


def controlled(
    estimate: Estimate,
    s: Tensor,  # (n,)
    m: Tensor,  # (n,)
    s2: Tensor,  # (n,)
    m2: Tensor,  # (n,)
    d: float,
    alpha: float,
    c: Tensor,  # (n,): what a unit is expected to add to the loss, by what was known before this pair
) -> Tensor:  # (n,)
    """An estimate, less what c predicts of it, and the known mean of that: a control variate."""
    predicted = float(c.double() @ (m.double() - m2.double()))
    return estimate(s, m, s2, m2, d - predicted, alpha) + known_mean(estimate, s, s2, c, alpha)


def known_mean(
    estimate: Estimate,
    s: Tensor,  # (n,)
    s2: Tensor,  # (n,)
    c: Tensor,  # (n,)
    alpha: float,
) -> Tensor:  # (n,)
    """The expectation of an estimate in which d is cᵀ(m - m2): H^alpha(s) c, for `rloo` its mean at s and s2."""
    first, second = ((s * (1 - s)).pow(alpha) * c for s in (s, s2))
    return (first + second) / 2 if estimate is rloo else first


def _score(s: Tensor, m: Tensor, alpha: float) -> Tensor:
    """H^alpha(s) * (m - s) / (s(1 - s)), and 0 where s(1 - s) = 0."""
    variance = s * (1 - s)
    fixed = variance <= 0
    return ((m.to(s.dtype) - s) * variance.masked_fill(fixed, 1).pow(alpha - 1)).masked_fill(fixed, 0)
