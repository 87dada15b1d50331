"""What a structure samples, how much of it, and what it takes as the result."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_trainer.structure import Structure

Group = namedtuple("Group", "name units")
GROUPS = [
    Group("residual", 10),
    Group("layers.0.mlp", 12),
    Group("layers.1.mlp", 7),
    Group("layers.0.heads", 4),
]


def widths(kept: dict[str, Tensor]) -> dict[str, int]:
    return {name: len(indices) for name, indices in kept.items()}


def test_s_starts_at_keep_as_views_of_one_vector():
    structure = Structure(GROUPS, keep=0.3)
    assert structure.names == tuple(group.name for group in GROUPS)
    for group in GROUPS:
        assert torch.equal(structure.s[group.name], torch.full((group.units,), 0.3))
    assert structure.keep == pytest.approx(0.3)
    assert len({s.untyped_storage().data_ptr() for s in structure.s.values()}) == 1
    structure.pair()
    structure.update(1.0)
    assert not torch.equal(structure.s["residual"], torch.full((10,), 0.3))


def test_first_pattern_wins_and_the_rest_stays_whole():
    structure = Structure(GROUPS, per_group_keep={"layers.0.*": 0.5, "*mlp": 0.25})
    assert structure.names == ("layers.0.mlp", "layers.1.mlp", "layers.0.heads")
    assert {name: float(s[0]) for name, s in structure.s.items()} == {
        "layers.0.mlp": 0.5,
        "layers.1.mlp": 0.25,
        "layers.0.heads": 0.5,
    }
    assert Structure(GROUPS, per_group_keep={"residual": 1.0, "*": 0.5}).names == structure.names


@pytest.mark.parametrize("arguments", [{"keep": 1.0}, {"per_group_keep": {}}, {"per_group_keep": {"*": 1.0}}])
@pytest.mark.parametrize("budget", ["per_group", "global"])
def test_nothing_sampled_is_a_structure_that_does_nothing(arguments: dict[str, Any], budget: Any):
    structure = Structure(GROUPS, budget=budget, **arguments)
    assert structure.names == () and structure.s == {} and structure.keep == 1 and structure.constant_widths
    assert structure.pair() == ({}, {}) and structure.draw() == {} and structure.top() == {}
    structure.update(0.5)
    structure.set_step(3)
    structure.load_state_dict(structure.state_dict())
    assert structure.step == 3


def test_widths_are_constant_under_fixed_and_per_group_even_when_s_sinks_below_its_budget():
    structure = Structure(GROUPS, keep=0.3)
    expected = {"residual": 3, "layers.0.mlp": 4, "layers.1.mlp": 2, "layers.0.heads": 1}
    assert structure.constant_widths
    for sink in (1.0, 0.5, 0.0):
        for s in structure.s.values():
            s.mul_(sink)
        for kept in (*structure.pair(), structure.draw(), structure.top()):
            assert widths(kept) == expected


def test_widths_follow_s_under_fixed_and_global():
    structure = Structure(GROUPS, keep=0.5, budget="global")
    assert not structure.constant_widths
    structure.s["residual"].fill_(0.84)
    structure.s["layers.0.heads"].zero_()
    assert widths(structure.draw()) == {
        "residual": 8,
        "layers.0.mlp": 6,
        "layers.1.mlp": 4,
        "layers.0.heads": 1,
    }


def test_constant_widths_only_once_the_schedule_has_ended():
    structure = Structure(GROUPS, schedule="cubic", schedule_steps=10)
    assert not structure.constant_widths
    structure.set_step(9)
    assert not structure.constant_widths
    structure.set_step(10)
    assert structure.constant_widths
    assert not Structure(GROUPS, sampler="bernoulli").constant_widths


def test_the_two_masks_of_a_pair_are_independent_draws():
    structure = Structure([Group("g", 2)], keep=0.5)
    drawn = [(int(m["g"]), int(m2["g"])) for m, m2 in (structure.pair() for _ in range(2000))]
    for outcome in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert abs(drawn.count(outcome) / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_top_takes_the_largest_s_of_each_group():
    structure = Structure([Group("a", 4), Group("b", 4)], keep=0.5)
    structure.s["a"].copy_(torch.tensor([0.1, 0.9, 0.2, 0.8]))
    assert {name: kept.tolist() for name, kept in structure.top().items()} == {"a": [1, 3], "b": [0, 1]}


def test_top_under_a_global_budget_ranks_all_units_and_respects_min_units():
    structure = Structure([Group("a", 6), Group("b", 4)], keep=0.5, budget="global", min_units=1)
    structure.s["a"].copy_(torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))
    structure.s["b"].copy_(torch.tensor([0.0, 0.1, 0.0, 0.0]))
    assert {name: kept.tolist() for name, kept in structure.top().items()} == {"a": [0, 1, 2, 3], "b": [1]}


def test_top_of_an_untrained_structure_gives_every_group_its_share():
    top = Structure([Group("a", 100), Group("b", 40)], keep=0.5, budget="global").top()
    assert abs(len(top["a"]) - 50) <= 1 and abs(len(top["b"]) - 20) <= 1
