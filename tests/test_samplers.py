"""Both samplers: the frequencies are the probabilities, and the promises about size always hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_trainer.structure import bernoulli, fixed
from offload_trainer.structure.samplers import bernoulli_twins, fixed_twins, inclusion

DRAWS = 4000
probabilities = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-8])), min_size=1, max_size=10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_frequencies(masks: Tensor, p: Tensor) -> None:
    """Within five standard errors of p; exactly p where p is 0 or 1. With fixed seeds it cannot flake."""
    error = (p * (1 - p) / len(masks)).sqrt()
    assert ((masks.double().mean(0) - p).abs() <= 5 * error + 1e-12).all()


def test_bernoulli_frequencies_are_s_and_units_are_independent():
    s, random = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]), generator()
    masks = torch.stack([bernoulli(s, 0, random) for _ in range(DRAWS)])
    assert_frequencies(masks, s.double())
    both = masks[:, [2, 3]].all(1, keepdim=True)
    assert_frequencies(both, torch.tensor([0.15], dtype=torch.float64))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(probabilities, st.data())
def test_bernoulli_keeps_at_least_min_units(s: list[float], data: st.DataObject):
    min_units = data.draw(st.integers(1, len(s)))
    assert bernoulli(torch.tensor(s), min_units, generator()).sum() >= min_units


def test_bernoulli_fills_up_with_the_largest_s_and_breaks_ties_by_the_generator():
    random = generator()
    largest = torch.tensor([0.0, 1e-12, 3e-12, 2e-12])
    assert bernoulli(largest, 2, random).tolist() == [False, False, True, True]
    ties = torch.stack([bernoulli(torch.zeros(4), 1, random) for _ in range(DRAWS)])
    assert (ties.sum(1) == 1).all()
    assert_frequencies(ties, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(
    ("s", "k"),
    [
        ([0.1, 0.9, 0.5, 0.5, 0.3, 0.7, 1.0, 0.0], 4),  # sum(s) = k
        ([0.25] * 12, 3),
        ([0.999, 0.001, 0.6, 0.4], 2),
        ([0.2, 0.9, 0.4, 0.1, 1.0, 0.0], 4),  # raised to k, with a cap
        ([0.6, 0.9, 0.8, 0.7, 1.0, 0.0], 2),  # lowered to k
        ([0.0, 0.0, 0.0, 0.5, 1.0, 0.0], 3),  # fewer above 0 than k
        ([1.0, 1.0, 1.0, 0.5, 0.0], 2),  # more at 1 than k
    ],
)
def test_fixed_frequencies_are_the_inclusion_probabilities(s: list[float], k: int):
    random = generator()
    masks = torch.stack([fixed(torch.tensor(s), k, random) for _ in range(DRAWS)])
    assert (masks.sum(1) == k).all()
    assert_frequencies(masks, inclusion(torch.tensor(s), k))


def test_fixed_with_equal_s_draws_every_subset_equally_often():
    random = generator()
    masks = torch.stack([fixed(torch.full((4,), 0.5), 2, random) for _ in range(DRAWS)])
    subsets, counts = masks.unique(dim=0, return_counts=True)
    assert len(subsets) == 6
    assert ((counts / DRAWS - 1 / 6).abs() <= 5 * (1 / 6 * 5 / 6 / DRAWS) ** 0.5).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(probabilities, st.data())
def test_fixed_keeps_exactly_k_and_inclusion_sums_to_k(s: list[float], data: st.DataObject):
    k = data.draw(st.integers(1, len(s)))
    values = torch.tensor(s)
    p = inclusion(values, k)
    assert p.min() >= 0 and p.max() <= 1
    assert float(p.sum()) == pytest.approx(k, abs=1e-9)
    mask = fixed(values, k, generator(k))
    assert mask.dtype == torch.bool and mask.sum() == k
    ones, zeros = values == 1, values == 0
    assert mask[ones].all() or ones.sum() > k
    assert not mask[zeros].any() or (~zeros).sum() < k


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=10), st.data())
def test_inclusion_keeps_the_order_and_the_ratios_below_the_cap(s: list[float], data: st.DataObject):
    k = data.draw(st.integers(1, len(s)))
    values = torch.tensor(s, dtype=torch.float64)
    p = inclusion(values, k)
    free = p < 1
    scale = p[free] / values[free]
    assert scale.numel() == 0 or scale.max() - scale.min() <= 1e-9
    assert scale.numel() == 0 or (values[~free] * scale[0] >= 1 - 1e-9).all()


def test_inclusion_is_s_when_s_sums_to_k():
    s = torch.tensor([0.1, 0.9, 0.25, 0.75, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(inclusion(s, 3), s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_is_named(k: int):
    with pytest.raises(ValueError, match=rf"k \({k}\) must be from 1 to the number of units \(3\)"):
        fixed(torch.full((3,), 0.5), k, generator())


@pytest.mark.parametrize("draw", [bernoulli, fixed])
def test_same_generator_state_same_masks(draw):
    s = torch.rand(50, generator=generator(1))
    assert torch.equal(draw(s, 20, generator(7)), draw(s, 20, generator(7)))
    assert not torch.equal(draw(s, 20, generator(7)), draw(s, 20, generator(8)))


@pytest.mark.parametrize("draw", [lambda s, g: fixed_twins(s, 3, g), lambda s, g: bernoulli_twins(s, 0, g)])
def test_twins_are_draws_that_differ_as_much_as_they_can(draw):
    s, random = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3, 0.7, 0.0, 0.0]), generator()
    pairs = [draw(s, random) for _ in range(DRAWS)]
    first, second = (torch.stack(masks) for masks in zip(*pairs, strict=True))
    assert_frequencies(first, s.double())
    assert_frequencies(second, s.double())
    assert_frequencies(first & second, (2 * s.double() - 1).clamp(min=0))
    assert_frequencies(~first & ~second, (1 - 2 * s.double()).clamp(min=0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(probabilities, st.data())
def test_fixed_twins_keep_exactly_k_and_the_first_is_what_fixed_draws(s: list[float], data: st.DataObject):
    k, values = data.draw(st.integers(1, len(s))), torch.tensor(s)
    first, second = fixed_twins(values, k, generator(k))
    assert first.sum() == second.sum() == k
    assert torch.equal(first, fixed(values, k, generator(k)))


def test_bernoulli_twins_keep_at_least_min_units():
    first, second = bernoulli_twins(torch.tensor([0.01, 0.02, 0.03]), 2, generator())
    assert first.sum() >= 2 and second.sum() >= 2


def test_large_group():
    s = torch.full((100_000,), 0.3)
    assert fixed(s, 30_000, generator()).sum() == 30_000
