"""A structure learns within its budget, follows its schedule, repeats itself and resumes bit for bit."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.structure import Structure, constant, cubic, project, rloo
from offload_trainer.structure.coverage import portrait

Group = namedtuple("Group", "name units")
GROUPS = [
    Group("residual", 10),
    Group("layers.0.mlp", 12),
    Group("layers.1.mlp", 7),
    Group("layers.0.heads", 4),
]


def rounds(structure: Structure, count: int, first: int = 0) -> list[Tensor]:
    """`count` rounds whose d depends on what was drawn; returns everything drawn and s after each."""
    trace = []
    for step in range(first, first + count):
        structure.set_step(step)
        m, m2 = structure.pair()
        trace += [*m.values(), *m2.values()]
        d = sum(float(i.double().mul(2).sin().sum()) for i in m.values()) - len(m2) / (step + 1)
        credit = {name: torch.stack([kept.sin(), kept.cos() ** 2]) for name, kept in m.items()}
        structure.update(d, m, credit)
        trace += [s.clone() for s in structure.s.values()]
    return trace


def assert_same(trace: list[Tensor], other: list[Tensor]) -> None:
    assert len(trace) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(trace, other, strict=True))


VARIANTS = [
    {},
    {"sampler": "bernoulli", "estimator": "vr_pge"},
    {"budget": "global", "min_units": 2},
    {"budget": "global", "sampler": "bernoulli", "min_units": 3, "alpha": 0.75},
    {"per_group_keep": {"residual": 1.0, "*mlp": 0.3, "*": 0.5}, "schedule": "cubic", "schedule_steps": 12},
    {"estimator": "disarm", "keep": 0.3},
    {"estimator": "disarm", "control": "linear", "sampler": "bernoulli", "min_units": 2},
    {"control": "linear"},
    {"estimator": "credit", "explore": 0.3, "explore_steps": 15},
    {"estimator": "magnitude"},
]


@pytest.mark.parametrize("arguments", VARIANTS)
def test_drawn_indices_are_sorted_in_range_and_at_least_min_units(arguments: dict[str, Any]):
    structure = Structure(GROUPS, **arguments)
    units = {group.name: group.units for group in GROUPS}
    for step in range(30):
        structure.set_step(step)
        for kept in (*structure.pair(), structure.draw(), structure.top()):
            assert tuple(kept) == structure.names
            for name, indices in kept.items():
                assert indices.dtype == torch.int64
                assert (indices.diff() > 0).all()
                assert len(indices) >= structure.min_units
                assert indices[0] >= 0 and indices[-1] < units[name]
        structure.update((-1) ** step)


@pytest.mark.parametrize("budget", ["per_group", "global"])
def test_first_update_is_adam_and_then_the_projection(budget: Any):
    """Adam's first step is lr * sign(gradient), whatever its size."""
    structure = Structure(GROUPS, keep=0.3, budget=budget, lr=0.01)
    before = {name: s.clone() for name, s in structure.s.items()}
    m, m2 = structure.pair()
    structure.update(0.7)
    moved = {}
    for group in GROUPS:
        mask, mask2 = torch.zeros(group.units), torch.zeros(group.units)
        mask[m[group.name]], mask2[m2[group.name]] = 1, 1
        was = before[group.name]
        gradient = rloo(was, mask, was, mask2, 0.7, 0.5)
        moved[group.name] = before[group.name] - 0.01 * gradient.sign()
    if budget == "global":
        expected = project(torch.cat([*moved.values()]), sum(0.3 * group.units for group in GROUPS))
        torch.testing.assert_close(torch.cat([*structure.s.values()]), expected, rtol=0, atol=1e-6)
    else:
        for group in GROUPS:
            expected = project(moved[group.name], 0.3 * group.units)
            torch.testing.assert_close(structure.s[group.name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", VARIANTS)
def test_s_stays_inside_its_box_and_budget(arguments: dict[str, Any]):
    structure = Structure(GROUPS, **arguments)
    rounds(structure, 40)
    s = torch.cat([*structure.s.values()])
    assert s.min() >= 0 and s.max() <= 1
    ratios = {"layers.0.mlp": 0.3, "layers.1.mlp": 0.3, "layers.0.heads": 0.5}
    keep = arguments.get("keep", 0.25)
    budgets = {
        group.name: group.units * (ratios[group.name] if "per_group_keep" in arguments else keep)
        for group in GROUPS
        if group.name in structure.names
    }
    assert s.sum() <= sum(budgets.values()) + 1e-4
    if structure.budget == "per_group":
        for name, budget in budgets.items():
            assert structure.s[name].sum() <= budget + 1e-4


LEARNED = [(e, c, b) for e in ("rloo", "vr_pge", "disarm") for c in ("none", "linear") for b in ("per_group", "global")]


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
@pytest.mark.parametrize(("estimator", "control", "budget"), [*LEARNED, ("credit", "none", "per_group")])
def test_helpful_units_are_found(estimator: Any, control: Any, sampler: Any, budget: Any):
    """Additive loss: the even units of each group lower it by 1 to 2, the odd ones do not change it."""
    groups = [Group("a", 12), Group("b", 8)]
    ways = {"estimator": estimator, "control": control, "sampler": sampler, "budget": budget}
    structure = Structure(groups, 0.5, **ways, seed=1)
    helps = {g.name: torch.where(torch.arange(g.units) % 2 == 0, torch.linspace(1, 2, g.units), 0) for g in groups}

    def loss(kept: dict[str, Tensor]) -> float:
        return -sum(float(helps[name][indices].sum()) for name, indices in kept.items())

    untrained = sum(loss(structure.draw()) for _ in range(50)) / 50
    for _ in range(400):
        m, m2 = structure.pair()
        helped = {name: helps[name][indices] for name, indices in m.items()}
        structure.update(loss(m) - loss(m2), m, {name: torch.stack([-h, h**2]) for name, h in helped.items()})
    for s in structure.s.values():
        assert s[0::2].mean() > s[1::2].mean() + 0.5
    assert loss(structure.top()) < 1.5 * untrained


def test_masks_follow_one_another():
    """What is compared with is trained next; each mask counts with the s it was drawn from, which has moved since."""
    structure, drawn = Structure(GROUPS, lr=0.05), []
    for r in range(6):
        at = structure.flat.clone()
        (m, m2), later = structure.follow(), structure.look_ahead()
        drawn += [(m, at), (m2, at), (later, at)] if r == 0 else [(later, at)]
        for i, kept in enumerate((m, m2, later)):
            assert_same([*drawn[r + i][0].values()], [*kept.values()])
        state = structure.state_dict()
        for i in range(3):
            assert torch.equal(state["drawn.from"][i], drawn[r + i][1])
        structure.update((-1) ** r)
    assert not torch.equal(drawn[0][1], drawn[-1][1])


def test_a_resumed_structure_follows_the_masks_it_had():
    one, other = Structure(GROUPS), Structure(GROUPS)
    for r in range(3):
        one.follow()
        one.update(0.1 * r)
    other.load_state_dict(one.state_dict())
    for r in range(4):
        for kept, again in zip(one.follow(), other.follow(), strict=True):
            assert_same([*kept.values()], [*again.values()])
        one.update(0.3 * r)
        other.update(0.3 * r)
    assert_same([*one.s.values()], [*other.s.values()])


@pytest.mark.parametrize("budget", ["per_group", "global"])
def test_nothing_sampled_is_no_special_case(budget: Any):
    structure = Structure(GROUPS, keep=1.0, budget=budget)
    assert structure.names == () and structure.constant_widths and structure.keep == 1
    assert structure.top() == {} and structure.draw() == {} and structure.pair() == ({}, {})
    structure.set_step(5)
    structure.update(0.3, {}, {})


def test_update_uses_the_last_pair_and_not_a_later_draw():
    one, other = Structure(GROUPS), Structure(GROUPS)
    one.pair()
    other.pair()
    other.draw()
    one.update(0.5)
    other.update(0.5)
    assert_same([*one.s.values()], [*other.s.values()])


@pytest.mark.parametrize("d", [float("nan"), float("inf"), -float("inf")])
def test_loss_difference_that_is_not_finite_is_refused_and_changes_nothing(d: float):
    structure = Structure(GROUPS)
    structure.pair()
    before = structure.state_dict()
    with pytest.raises(UserError, match=r"loss difference .* must be finite"):
        structure.update(d)
    assert_same([*structure.state_dict().values()], [*before.values()])


def test_masks_that_follow_are_twins_two_by_two():
    """Every second pair is of twins, drawn from one s; the pairs between are independent, as with rloo."""
    structure, seen = Structure(GROUPS, 0.5, estimator="disarm", lr=0.05), []
    for r in range(6):
        masks = *structure.follow(), structure.look_ahead()
        state = structure.state_dict()
        seen.append(bool(state["drawn.twin"][1]))
        if seen[-1]:
            assert torch.equal(state["drawn.from"][0], state["drawn.from"][1])
            for group in GROUPS[:2]:  # even sizes, kept by half: one has what the other has not
                both = torch.cat([masks[0][group.name], masks[1][group.name]])
                assert both.sort().values.tolist() == list(range(group.units)) or r > 0
        structure.update((-1) ** r)
    assert seen == [True, False] * 3


@pytest.mark.parametrize("estimator", ["rloo", "vr_pge", "disarm"])
def test_what_credit_predicts_is_taken_out_and_its_mean_added_back(estimator: Any):
    """Once it is known that d is c of the units: the estimate is the exact gradient, whatever the pair."""
    groups = [Group("a", 40)]
    structure = Structure(groups, 0.5, estimator=estimator, control="linear", sampler="bernoulli", lr=0.0)
    c = torch.randn(40, generator=torch.Generator().manual_seed(2))
    errors = []
    for _ in range(300):
        m, m2 = structure.pair()
        d = float(c[m["a"]].sum() - c[m2["a"]].sum())
        structure.update(d, m, {"a": torch.stack([c[m["a"]], torch.zeros(len(m["a"]))])})
        gradient = structure.flat.grad
        assert gradient is not None
        errors.append(float((gradient - 0.5 * c).norm() / (0.5 * c).norm()))
    before, after = sum(errors[:10]) / 10, sum(errors[-100:]) / 100
    assert before > 1 and after < 0.07 * before  # some doubt remains


@pytest.mark.parametrize("arguments", [{"control": "linear"}, {"estimator": "credit"}])
def test_credit_that_is_not_finite_is_refused(arguments: dict[str, Any]):
    structure = Structure(GROUPS, **arguments)
    m, _ = structure.pair()
    credit = {name: torch.full((2, len(kept)), float("nan")) for name, kept in m.items()}
    with pytest.raises(UserError, match=r"credit of a unit.*must be finite"):
        structure.update(None, m, credit)


def test_credit_tries_the_unknown_before_the_weakest_and_ever_less():
    """Units that are known to matter stay; exploring falls to nothing at `explore_steps`."""
    structure = Structure([Group("a", 100)], 0.2, estimator="credit", explore=0.3, explore_steps=100)
    kept = {"a": torch.arange(20)}
    strength = torch.arange(1.0, 21) ** 4
    outside = []
    for step in (0, 50, 100):
        structure.set_step(step)
        structure.update(None, kept, {"a": torch.stack([strength, strength])})
        s = structure.s["a"]
        assert s[19] > 0.99 and s[10] > s[0]
        assert s[20:].std() < 1e-4
        outside.append(float(s[structure_order(s)[20:]].sum()) / 20)
    assert outside[0] == pytest.approx(0.3, abs=0.01) and outside[1] == pytest.approx(0.15, abs=0.01)
    assert outside[2] < 0.06  # the weakest one and those never tried are alike
    assert set(structure.top()["a"].tolist()) >= set(range(1, 20))


def structure_order(s: Tensor) -> Tensor:
    return s.argsort(descending=True, stable=True)


def test_update_before_a_pair_is_an_error():
    with pytest.raises(RuntimeError, match="draw one first"):
        Structure(GROUPS).update(1.0)


def test_schedules():
    assert [constant(0.3).keep_at(step) for step in (0, 5, 10**6)] == [0.3] * 3
    falling = cubic(keep=0.2, start_keep=1.0, steps=10)
    assert falling.keep_at(0) == 1.0
    assert falling.keep_at(5) == pytest.approx(0.2 + 0.8 / 8)
    assert falling.keep_at(10) == falling.keep_at(11) == 0.2
    assert all(falling.keep_at(t) > falling.keep_at(t + 1) for t in range(10))


def test_cubic_schedule_shrinks_s_of_every_group_to_its_own_ratio():
    structure = Structure(
        GROUPS,
        per_group_keep={"*mlp": 0.25, "residual": 0.5},
        schedule="cubic",
        start_keep=0.9,
        schedule_steps=20,
    )
    assert all(torch.equal(s, torch.full_like(s, 0.9)) for s in structure.s.values())
    assert structure.names == ("residual", "layers.0.mlp", "layers.1.mlp")
    assert {name: len(kept) for name, kept in structure.draw().items()} == {
        "residual": 9,
        "layers.0.mlp": 11,
        "layers.1.mlp": 6,
    }
    structure.set_step(10)
    assert float(structure.s["residual"][0]) == pytest.approx(0.5 + 0.4 / 8)
    assert float(structure.s["layers.0.mlp"][0]) == pytest.approx(0.25 + 0.65 / 8)
    structure.set_step(20)
    assert {name: float(s[0]) for name, s in structure.s.items()} == pytest.approx(
        {"residual": 0.5, "layers.0.mlp": 0.25, "layers.1.mlp": 0.25}
    )


@pytest.mark.parametrize("arguments", VARIANTS)
def test_same_seed_same_run_other_seed_another(arguments: dict[str, Any]):
    trace = rounds(Structure(GROUPS, seed=3, **arguments), 20)
    assert_same(trace, rounds(Structure(GROUPS, seed=3, **arguments), 20))
    other = rounds(Structure(GROUPS, seed=4, **arguments), 20)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(trace, other, strict=True))


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("between_pair_and_update", [False, True])
def test_resume_continues_bit_for_bit(arguments: dict[str, Any], between_pair_and_update: bool):
    whole = Structure(GROUPS, **arguments)
    rounds(whole, 7)
    if between_pair_and_update:
        whole.pair()
    state = whole.state_dict()
    resumed = Structure(GROUPS, seed=99, **arguments)
    views = dict(resumed.s)
    resumed.load_state_dict(state)
    assert resumed.step == whole.step and resumed.constant_widths == whole.constant_widths
    assert all(resumed.s[name] is view for name, view in views.items())
    if between_pair_and_update:
        whole.update(0.3)
        resumed.update(0.3)
    assert_same(rounds(whole, 10, first=7), rounds(resumed, 10, first=7))
    assert_same([*whole.top().values()], [*resumed.top().values()])


def test_state_is_plain_tensors_that_later_rounds_leave_alone():
    structure = Structure(GROUPS)
    fresh = structure.state_dict()
    rounds(structure, 3)
    state = structure.state_dict()
    assert state.keys() == fresh.keys()
    assert all(type(value) is Tensor for value in state.values())
    copies = [value.clone() for value in state.values()]
    rounds(structure, 3)
    assert_same([*state.values()], copies)


def test_state_of_another_structure_is_refused():
    structure = Structure(GROUPS)
    with pytest.raises(UserError, match=r"4 sampled groups, 33 units\) must fit .* \(2, 19\)"):
        Structure(GROUPS, per_group_keep={"*mlp": 0.25}).load_state_dict(structure.state_dict())
    with pytest.raises(UserError, match=r"structure state \(s\) must hold s, adam.step"):
        structure.load_state_dict({"s": torch.zeros(33)})


def test_default_device_does_not_matter():
    with torch.device("meta"):
        structure = Structure(GROUPS, budget="global", schedule="cubic", schedule_steps=30)
        trace = rounds(structure, 3)
        structure.top()
        structure.load_state_dict(structure.state_dict())
    assert_same(trace, rounds(Structure(GROUPS, budget="global", schedule="cubic", schedule_steps=30), 3))


def test_coverage_counts_the_steps_of_every_unit() -> None:
    structure = Structure(GROUPS, keep=0.5, seed=3)
    steps, last = torch.zeros_like(structure.flat, dtype=torch.long), torch.zeros_like(structure.flat, dtype=torch.long)
    kept: dict[str, Tensor] = {}
    for number in range(1, 5):
        kept, _ = structure.pair()
        structure.trained(kept, 5, 5 * number)
        mask = torch.cat([torch.isin(torch.arange(len(s)), kept[name]) for name, s in structure.s.items()])
        steps, last = steps + 5 * mask, torch.where(mask, 5 * number, last)
    assert torch.equal(structure.coverage.steps, steps) and torch.equal(structure.coverage.last, last)
    other = Structure(GROUPS, keep=0.5, seed=4)
    other.load_state_dict(structure.state_dict())
    assert other.portrait(20) == structure.portrait(20)
    start = 0
    for name, s in structure.s.items():
        shown, own = structure.portrait(20)[name], slice(start, start + len(s))
        assert shown["width"] == len(kept[name]) and shown["units"] == len(s) <= 64
        assert shown["trained"] == pytest.approx([round(n / 20, 3) for n in steps[own].tolist()])
        assert shown["age"] == (20 - last[own]).tolist()
        start += len(s)


def test_a_picture_of_many_units_has_few_rows() -> None:
    s = torch.arange(200) / 200
    shown = portrait(s, torch.arange(200), torch.full((200,), 7), 10)
    assert len(shown["s"]) == len(shown["trained"]) == len(shown["age"]) == 64
    assert shown["s"][0] == pytest.approx(s[:4].mean().item(), abs=1e-3) and shown["age"] == [3] * 64
