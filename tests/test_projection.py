"""`project` is the nearest point of its set: checked by a certificate and against a bisection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_trainer.structure import project

values = st.lists(
    st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 2.0])), min_size=1, max_size=12
)
fractions = st.one_of(st.floats(0, 1.2), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


def best_gain(direction: Tensor, budget: float) -> float:
    """max of <direction, y> over {0 <= y <= 1, sum(y) <= budget}: a knapsack in which greedy is exact."""
    gain, left = 0.0, budget
    for value in sorted(direction.tolist(), reverse=True):
        if value <= 0 or left <= 0:
            break
        gain, left = gain + value * min(1.0, left), left - 1
    return gain


def bisection(s: Tensor, budget: float) -> Tensor:
    """The same point by 200 halvings of v; no breakpoints, no sorting."""
    if s.clamp(0, 1).sum() <= budget:
        return s.clamp(0, 1)
    low, high = 0.0, float(s.max())
    for _ in range(200):
        v = (low + high) / 2
        low, high = (v, high) if (s - v).clamp(0, 1).sum() > budget else (low, v)
    return (s - high).clamp(0, 1)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values, fractions)
def test_projection_is_the_nearest_feasible_point(s: list[float], fraction: float):
    """x is the projection exactly if it is feasible and <s - x, y - x> <= 0 for every feasible y.

    A gap in that inequality bounds |x - projection|^2, so 1e-9 certifies four digits; bisection the rest.
    """
    point, budget = torch.tensor(s, dtype=torch.float64), fraction * len(s)
    x = project(point, budget)
    assert x.min() >= 0 and x.max() <= 1
    assert x.sum() <= budget + 1e-9
    assert best_gain(point - x, budget) - float((point - x) @ x) <= 1e-9
    torch.testing.assert_close(x, bisection(point, budget), rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values, fractions)
def test_projecting_again_changes_nothing_in_fp32(s: list[float], fraction: float):
    once = project(torch.tensor(s), fraction * len(s))
    assert once.dtype == torch.float32
    torch.testing.assert_close(project(once, fraction * len(s)), once, rtol=0, atol=1e-6)


def test_feasible_input_is_only_clamped():
    s = torch.tensor([-0.5, 0.1, 0.7, 1.5])
    assert torch.equal(project(s, 1.9), torch.tensor([0.0, 0.1, 0.7, 1.0]))


@pytest.mark.parametrize("budget", [0.0, 1.0, 2.5])
def test_equal_values_share_the_budget_equally(budget: float):
    assert torch.equal(project(torch.full((4,), 2.0), budget), torch.full((4,), budget / 4))


def test_large_group_meets_its_budget():
    s = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(project(s, 1234.5).sum()) == pytest.approx(1234.5, abs=1e-6)
