"""Mean and variance of the estimators by exact enumeration of every pair of masks, in float64."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from offload_trainer.structure import disarm, rloo, vr_pge
from offload_trainer.structure.estimators import known_mean

ESTIMATORS = (vr_pge, rloo)
ALPHAS = (0.5, 0.7, 0.99)
INTERIOR = (
    torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64),
    torch.tensor([0.01, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64),
    torch.tensor([1e-6, 0.3, 1 - 1e-6], dtype=torch.float64),
)
Loss = Callable[[Tensor], Tensor]  # masks (2^n, n) → losses (2^n,)


def random_table(masks: Tensor) -> Tensor:
    """An arbitrary function on {0, 1}^n."""
    return torch.randn(len(masks), generator=torch.Generator().manual_seed(len(masks)), dtype=torch.float64) + 3


def tiny_network(masks: Tensor) -> Tensor:
    """Cross-entropy of a two-layer network whose hidden units are gated by the mask."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=random, dtype=torch.float64)
    w_in = torch.randn(masks.shape[1], 3, generator=random, dtype=torch.float64)
    w_out = torch.randn(4, masks.shape[1], generator=random, dtype=torch.float64)
    label = torch.randint(4, (8,), generator=random)
    logits = ((x @ w_in.T).tanh() * masks[:, None]) @ w_out.T  # (masks, 8, 4)
    return torch.stack([nn.functional.cross_entropy(row, label) for row in logits])


def all_masks(n: int) -> Tensor:  # (2^n, n) float64
    return torch.tensor(list(product([0, 1], repeat=n)), dtype=torch.float64)


def weights(s: Tensor) -> Tensor:  # (2^n,), the probability of every mask
    masks = all_masks(len(s))
    return (masks * s + (1 - masks) * (1 - s)).prod(1)


def exact_gradient(s: Tensor, losses: Tensor, alpha: float) -> Tensor:
    """H^alpha(s) grad E[L], E[L] being a polynomial in s that autograd differentiates."""
    leaf = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weights(leaf) @ losses, leaf)
    return (s * (1 - s)) ** alpha * gradient


def moments(estimate, s: Tensor, losses: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and second moment per coordinate over all pairs of masks, each weighted."""
    masks, p = all_masks(len(s)), weights(s)
    d = (losses[:, None] - losses)[..., None]  # (2^n, 2^n, 1)
    values = estimate(s, masks[:, None].expand(-1, len(p), -1), s, masks.expand(len(p), -1, -1), d, alpha)
    pairs = (p[:, None] * p)[..., None]
    mean, second = (pairs * values).sum((0, 1)), (pairs * values**2).sum((0, 1))
    return mean, (pairs * (values - mean) ** 2).sum((0, 1)), second


@pytest.mark.parametrize("loss", [random_table, tiny_network])
@pytest.mark.parametrize("estimate", ESTIMATORS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mean_over_all_pairs_is_the_exact_gradient(estimate, loss: Loss, alpha: float):
    for s in INTERIOR:
        losses = loss(all_masks(len(s)))
        mean, _, _ = moments(estimate, s, losses, alpha)
        torch.testing.assert_close(mean, exact_gradient(s, losses, alpha), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masks_drawn_from_different_s_give_the_gradient_at_each(alpha: float):
    """vr_pge that at the s of m, rloo the mean of both."""
    s, s2 = (
        torch.tensor([0.5, 0.3, 0.8, 0.1], dtype=torch.float64),
        torch.tensor([0.4, 0.5, 0.7, 0.2], dtype=torch.float64),
    )
    masks = all_masks(len(s))
    losses = random_table(masks)
    d = (losses[:, None] - losses)[..., None]
    pairs = (weights(s)[:, None] * weights(s2))[..., None]
    exact, exact2 = exact_gradient(s, losses, alpha), exact_gradient(s2, losses, alpha)
    for estimate, expected in ((vr_pge, exact), (rloo, (exact + exact2) / 2)):
        values = estimate(s, masks[:, None].expand(-1, len(masks), -1), s2, masks, d, alpha)
        torch.testing.assert_close((pairs * values).sum((0, 1)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", [random_table, tiny_network])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_variance_of_rloo_is_half_the_second_moment_of_vr_pge(loss: Loss, alpha: float):
    """With S the score of m and S' that of m', vr_pge = d S and rloo = d (S - S') / 2, up to one factor. So
    E[rloo^2] = (E[d^2 S^2] - E[d^2 S S']) / 2, and E[d^2 S S'] = -2 E[L S] E[L' S'] = -2 g^2, since all other
    terms have a factor E[S] = 0. Hence Var(rloo) = E[vr_pge^2] / 2 = (Var(vr_pge) + g^2) / 2, never above
    Var(vr_pge): rloo is the mean of two estimates, each distributed as vr_pge.
    """
    for s in INTERIOR:
        losses = loss(all_masks(len(s)))
        _, variance, _ = moments(rloo, s, losses, alpha)
        _, variance_paper, second_paper = moments(vr_pge, s, losses, alpha)
        torch.testing.assert_close(variance, second_paper / 2, rtol=1e-9, atol=1e-12)
        assert (variance <= variance_paper * (1 + 1e-9)).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_variance_of_rloo_is_half_of_vr_pge_where_noise_is_all_there_is(alpha: float):
    """At a stationary point (any loss without its linear part, g (m - s)) the half is exact."""
    for s in INTERIOR:
        masks = all_masks(len(s))
        losses = random_table(masks)
        losses = losses - (masks - s) @ exact_gradient(s, losses, 0)
        mean, variance, _ = moments(rloo, s, losses, alpha)
        _, variance_paper, _ = moments(vr_pge, s, losses, alpha)
        torch.testing.assert_close(mean, torch.zeros_like(s), rtol=0, atol=1e-9)
        torch.testing.assert_close(variance, variance_paper / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_variance_is_bounded_for_every_s(alpha: float):
    """The appendix (Eq. 11) bounds the variance for alpha >= 1/2. Here: |L| <= M gives d^2 <= 4 M^2. With
    h = s_i (1 - s_i), coordinate i of vr_pge is d h^alpha (m_i - s_i) / h, and E[(m_i - s_i)^2] = h, so

        Var <= E[d^2 h^(2 alpha - 2) (m_i - s_i)^2] <= 4 M^2 h^(2 alpha - 1) <= 4 M^2 (1/4)^(2 alpha - 1),

    in total at most 4 M^2 n (1/4)^(2 alpha - 1), however near s comes to 0 or 1; for rloo, half of that.
    For alpha < 1/2 the third term has no bound.
    """
    for edge in (0.5, 1e-3, 1e-6, 1e-9):
        s = torch.tensor([edge, 1 - edge, 0.3, 0.8], dtype=torch.float64)
        losses = random_table(all_masks(4))
        largest, h = losses.abs().max(), s * (1 - s)
        bound = 4 * largest**2 * h ** (2 * alpha - 1)
        _, variance, _ = moments(vr_pge, s, losses, alpha)
        assert (variance <= bound * (1 + 1e-9)).all()
        assert variance.sum() <= 4 * largest**2 * len(s) * 0.25 ** (2 * alpha - 1)
        _, variance, _ = moments(rloo, s, losses, alpha)
        assert (variance <= bound / 2 * (1 + 1e-9)).all()


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_gradient_is_zero_where_s_is_0_or_1(estimate):
    s = torch.tensor([0.0, 1.0, 0.5])
    gradient = estimate(s, torch.tensor([True, False, True]), s, torch.tensor([False, True, False]), 2.0, 0.5)
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert gradient[2] == 2.0  # d (1 - s) / sqrt(1/4), or d / 2 / sqrt(1/4)


def test_estimators_are_the_formulas():
    s, m, m2 = torch.tensor([0.2, 0.7]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    h = s * (1 - s)
    torch.testing.assert_close(vr_pge(s, m, s, m2, 0.3, 0.6), 0.3 * h**0.6 * (m - s) / h)
    torch.testing.assert_close(rloo(s, m, s, m2, 0.3, 0.6), 0.15 * h**0.6 * (m - m2) / h)
    furthest = torch.tensor([0.8, 0.7])
    torch.testing.assert_close(disarm(s, m, s, m2, 0.3, 0.6), 0.15 * h**0.6 * (m - m2) * furthest / h)


def twin_weights(s: Tensor) -> Tensor:  # (2^n, 2^n), the probability of every pair of twins
    """Of each unit on its own: both as rarely as can be."""
    masks = all_masks(len(s))
    both, neither, one = (2 * s - 1).clamp(min=0), (1 - 2 * s).clamp(min=0), torch.minimum(s, 1 - s)
    m, m2 = masks[:, None], masks
    return (m * m2 * both + (1 - m) * (1 - m2) * neither + (m - m2).abs() * one).prod(-1)


def mean_over(pairs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, per coordinate, of (2^n, 2^n, n) values whose pairs have these weights."""
    mean = (pairs[..., None] * values).sum((0, 1))
    return mean, (pairs[..., None] * (values - mean) ** 2).sum((0, 1))


@pytest.mark.parametrize("loss", [random_table, tiny_network])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_mean_of_disarm_over_all_twins_is_the_exact_gradient(loss: Loss, alpha: float):
    for s in INTERIOR:
        masks, losses = all_masks(len(s)), loss(all_masks(len(s)))
        pairs, count = twin_weights(s), len(masks)
        torch.testing.assert_close(pairs.sum(1), weights(s))  # each twin is a draw of its own
        d = (losses[:, None] - losses)[..., None]
        values = disarm(s, masks[:, None].expand(-1, count, -1), s, masks.expand(count, -1, -1), d, alpha)
        mean, variance = mean_over(pairs, values)
        torch.testing.assert_close(mean, exact_gradient(s, losses, alpha), rtol=1e-6, atol=1e-9)
        if loss is tiny_network and float(s.max()) == 0.5:
            assert variance.sum() < moments(rloo, s, losses, alpha)[1].sum()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("estimate", [vr_pge, rloo, disarm])
def test_a_linear_control_variate_adds_no_bias(estimate, alpha: float):
    """Whatever it predicts; and where it predicts all of d there is no variance left."""
    for s in INTERIOR:
        masks, losses = all_masks(len(s)), tiny_network(all_masks(len(s)))
        c = torch.randn(len(s), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        count, pairs = len(masks), twin_weights(s) if estimate is disarm else weights(s)[:, None] * weights(s)
        m, m2 = masks[:, None].expand(-1, count, -1), masks.expand(count, -1, -1)

        def controlled(d: Tensor, c=c, s=s, m=m, m2=m2) -> Tensor:
            return estimate(s, m, s, m2, d - (m - m2) @ c[:, None], alpha) + known_mean(estimate, s, s, c, alpha)

        mean, _ = mean_over(pairs, controlled((losses[:, None] - losses)[..., None]))
        torch.testing.assert_close(mean, exact_gradient(s, losses, alpha), rtol=1e-6, atol=1e-9)
        mean, variance = mean_over(pairs, controlled((m - m2) @ c[:, None]))
        torch.testing.assert_close(mean, (s * (1 - s)) ** alpha * c)
        assert variance.max() < 1e-12


def test_the_known_mean_of_rloo_is_between_the_s_of_both_masks():
    s, s2, c = torch.tensor([0.5, 0.2]), torch.tensor([0.1, 0.2]), torch.tensor([2.0, -1.0])
    assert known_mean(rloo, s, s2, c, 0.5).tolist() == pytest.approx([0.5 + 0.3, -0.4])
    assert known_mean(vr_pge, s, s2, c, 0.5).tolist() == pytest.approx([1.0, -0.4])
