"""s from scores: its sum, how much it explores, and what it prefers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_trainer.errors import UserError
from offload_trainer.groups import Group, Slot
from offload_trainer.structure import Structure, polarised
from offload_trainer.structure.starts import FLOOR


def outside(s: torch.Tensor, scores: torch.Tensor, k: int) -> float:
    """Expected share of a subnet's units that are not among the k of largest score."""
    rest = scores.argsort(descending=True, stable=True)[k:]
    return float(s[rest].sum()) / k


@settings(max_examples=60, deadline=None)
@given(
    st.integers(8, 200),
    st.floats(0.1, 0.9),
    st.floats(0.02, 0.5),
    st.floats(0.05, 4),
    st.integers(0, 10),
)
def test_sum_share_outside_and_order(n: int, keep: float, explore: float, spread: float, seed: int):
    scores = (spread * torch.randn(n, generator=torch.Generator().manual_seed(seed))).exp()
    k = max(1, round(keep * n))
    s = polarised(scores, k, explore)
    assert float(s.sum()) == pytest.approx(k, rel=1e-3)
    assert float(s.min()) >= FLOOR / 2 and float(s.max()) <= 1 - FLOOR / 2  # nothing is decided for good
    assert bool((s[scores.argsort()].diff() >= -1e-6).all())
    # As much as asked for, unless even a uniform s explores less, or the floor of s alone explores about as much.
    wanted = min(explore, 1 - k / n)
    assert outside(s, scores, k) == pytest.approx(max(wanted, FLOOR * (n - k) / k), abs=0.02)


def test_equal_scores_leave_s_uniform():
    assert torch.allclose(polarised(torch.ones(10), 4, 0.1), torch.full((10,), 0.4))
    assert torch.allclose(polarised(torch.zeros(10), 4, 0.1), torch.full((10,), 0.4))


def test_units_that_do_nothing_come_last():
    s = polarised(torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0]), 2, 0.2)
    assert float(s[[0, 3]].max()) < float(s[[1, 2, 4]].min())


def test_where_the_slope_is_lost_in_rounding():
    scores = [0.9850350022315979, 0.8909765481948853, 0.2695687413215637, 0.1775471568107605]
    assert float(polarised(torch.tensor(scores), 1.023784060437498, 0.05)[1]) == pytest.approx(0.0492, abs=1e-4)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_scores_must_be_scores(bad: float):
    with pytest.raises(ValueError, match="scores must be finite and not negative"):
        polarised(torch.tensor([1.0, bad, 2.0]), 1, 0.1)


GROUPS = [Group("a", 20, (Slot("w", 0),)), Group("b", 10, (Slot("v", 0),)), Group("c", 4, (Slot("u", 0),))]


def scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.units, generator=generator) for group in GROUPS}


def test_the_top_plan_is_the_most_important_units():
    structure = Structure(GROUPS, keep=0.5)
    structure.start_from(scores(), explore=0.1)
    for name, kept in structure.top().items():
        assert torch.equal(kept, scores()[name].topk(len(kept)).indices.sort().values)
    drawn = torch.stack([structure.s["a"].new_zeros(20).index_fill(0, structure.draw()["a"], 1) for _ in range(400)])
    top = structure.top()["a"]
    assert float(drawn[:, top].sum(1).mean()) / 10 == pytest.approx(0.9, abs=0.02)  # explores a tenth
    assert float((drawn.mean(0) - structure.s["a"]).abs().max()) < 0.1


def test_a_falling_budget_keeps_to_the_most_important():
    arguments = {"keep": 0.25, "schedule": "cubic", "start_keep": 0.9, "schedule_steps": 100}
    structure, other = Structure(GROUPS, **arguments), Structure(GROUPS, **arguments)
    structure.start_from(scores(), explore=0.05)
    for step in (0, 20, 50, 100, 120):
        structure.set_step(step)
        expected = {name: polarised(scores()[name], float(s.sum()), 0.05) for name, s in structure.s.items()}
        for name, s in structure.s.items():
            torch.testing.assert_close(s, expected[name], atol=5e-3, rtol=0)
        for name, kept in structure.top().items():
            assert torch.equal(kept, scores()[name].topk(len(kept)).indices.sort().values)
        structure.pair()
        structure.update(0.0)
        if step == 50:  # what a resumed run takes over
            other.load_state_dict(structure.state_dict())
            for structure_ in (structure, other):
                structure_.set_step(60)
            assert torch.equal(structure.flat, other.flat)


def test_a_global_budget_compares_groups():
    structure = Structure(GROUPS, keep=0.5, budget="global")
    important = {**scores(), "b": scores()["b"] + 2}
    structure.start_from(important, explore=0.05)
    assert len(structure.top()["b"]) == 10
    assert float(structure.flat.sum()) == pytest.approx(17, rel=1e-3)


def test_explore_must_be_a_share():
    with pytest.raises(UserError, match=r"structure.explore \(1\) must be in \(0, 1\)"):
        Structure(GROUPS).start_from(scores(), 1)
    with pytest.raises(UserError, match=r"scores of group '.*' \(none\) must be of shape"):
        Structure(GROUPS).start_from({}, 0.1)


# Widths in steps


def test_widths_are_the_nearest_multiples():
    structure = Structure(GROUPS, keep=0.5, width_steps={"a": 8, "b": 4, "c": 1})
    assert {name: len(kept) for name, kept in structure.top().items()} == {"a": 8, "b": 4, "c": 2}
    for _ in range(20):
        assert {name: len(kept) for name, kept in structure.draw().items()} == {"a": 8, "b": 4, "c": 2}
    assert {name: float(s.sum()) for name, s in structure.s.items()} == pytest.approx({"a": 8, "b": 4, "c": 2})


def test_widths_stay_multiples_along_a_schedule():
    arguments = {"schedule": "cubic", "start_keep": 1.0, "schedule_steps": 100, "width_steps": {"a": 4, "b": 5, "c": 2}}
    structure = Structure(GROUPS, keep=0.25, **arguments)
    for step in range(0, 120, 7):
        structure.set_step(step)
        for name, kept in structure.pair()[0].items():
            assert len(kept) % arguments["width_steps"][name] == 0 and len(kept) > 0
        structure.update(0.1)
    assert {name: len(kept) for name, kept in structure.top().items()} == {"a": 4, "b": 5, "c": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width_steps": {"c": 8}}, "structure.multiple_of (8 units) must leave a width for c, which has 4 units"),
        ({"width_steps": {"a": 8}, "budget": "global"}, "structure.multiple_of (8) must be 1 unless sampler is fixed"),
        (
            {"width_steps": {"a": 8}, "sampler": "bernoulli"},
            "structure.multiple_of (8) must be 1 unless sampler is fixed",
        ),
        ({"width_steps": {"a": 12}, "min_units": 4, "keep": 0.5}, None),
        (
            {"width_steps": {"a": 12}, "min_units": 13},
            "structure.multiple_of (12 units) must leave a width for a, which",
        ),
    ],
)
def test_widths_that_cannot_be(arguments: dict, message: str | None):
    if message is None:
        assert len(Structure(GROUPS, **arguments).top()["a"]) == 12
    else:
        with pytest.raises(UserError) as caught:
            Structure(GROUPS, **arguments)
        assert str(caught.value).startswith(message)
