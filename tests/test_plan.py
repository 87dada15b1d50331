"""Plans: what they refuse, when they are equal, and which elements they keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_trainer.errors import UserError
from offload_trainer.groups import Group, Groups, Plan, Slot, read_rules
from tests.models import MLP

SHAPES = {"w": torch.Size([6, 8]), "b": torch.Size([6])}
GROUPS = Groups(
    (
        Group("out", 6, (Slot("w", 0), Slot("b", 0))),
        Group("heads", 2, (Slot("w", 1, block=3, offset=1),)),
    ),
    SHAPES,
)


@pytest.mark.parametrize(
    ("kept", "rule"),
    [
        ({"out": [1, 0]}, "'out' must be sorted and distinct"),
        ({"out": [1, 1]}, "'out' must be sorted and distinct"),
        ({"out": [0, 6]}, r"'out' must lie in \[0, 6\)"),
        ({"out": [-1, 2]}, r"'out' must lie in \[0, 6\)"),
        ({"heads": []}, "no unit of group 'heads'; at least one"),
        ({"heads": [[0]]}, "no unit of group 'heads'; at least one"),
        ({"heads": [0.0, 1.0]}, "'heads' must be whole numbers, not torch.float32"),
        ({"heads": [False, True]}, "'heads' must be whole numbers, not torch.bool"),
        ({"tails": [0]}, "group 'tails', which the model does not have"),
    ],
)
def test_what_is_not_a_plan_is_a_line(kept: dict, rule: str):
    with pytest.raises(UserError, match=rule) as caught:
        Plan(GROUPS, kept)
    assert "\n" not in str(caught.value)


def test_a_plan_does_not_follow_its_maker():
    indices = torch.tensor([0, 2, 5])
    plan = Plan(GROUPS, {"out": indices})
    digest = plan.digest
    indices[0] = 1
    assert plan["out"].tolist() == [0, 2, 5] and plan.index("b", 0).tolist() == [0, 2, 5]
    assert Plan(GROUPS, {"out": plan["out"]}).digest == digest
    with pytest.raises(TypeError):
        plan["out"] = indices  # type: ignore[index]


def test_what_is_whole_needs_no_index():
    plan = Plan(GROUPS, {"out": range(6), "heads": [1]})
    assert plan.indices("w") == (None, plan.index("w", 1))
    assert plan.index("b", 0) is None and not plan.slices("b") and plan.slices("w")
    assert plan["out"].tolist() == [0, 1, 2, 3, 4, 5]
    assert plan == Plan(GROUPS, {"heads": [1]}) and plan != Plan.whole(GROUPS)
    assert Plan.whole(GROUPS).shape("w") == SHAPES["w"] and plan.shape("w") == (6, 5)


def subsets(units: int) -> st.SearchStrategy[list[int]]:
    return st.sets(st.integers(0, units - 1), min_size=1).map(sorted)


@given(subsets(6), subsets(2), subsets(6), subsets(2))
def test_digests_are_equal_exactly_when_plans_are(a: list, b: list, c: list, d: list):
    one, two = Plan(GROUPS, {"out": a, "heads": b}), Plan(GROUPS, {"heads": d, "out": c})
    assert (one.digest == two.digest) == (one == two) == ((a, b) == (c, d))
    assert hash(one) == hash(Plan(GROUPS, {"out": a, "heads": b}))


@given(st.data())
def test_kept_elements_are_those_of_which_every_slot_keeps_the_unit(data: st.DataObject):
    """Against one look at every element; slots of several groups may share elements (heads and their features)."""
    size = data.draw(st.integers(1, 40))
    groups = []
    for number in range(data.draw(st.integers(1, 3))):
        units = data.draw(st.integers(1, 6))
        slots = []
        for _ in range(data.draw(st.integers(1, 3))):
            if units <= size:
                block = data.draw(st.integers(1, size // units))
                slots.append(Slot("t", 0, block, data.draw(st.integers(0, size - units * block))))
        if slots:
            groups.append(Group(str(number), units, tuple(slots)))
    made = Groups(tuple(groups), {"t": torch.Size([size])})
    kept = {group.name: data.draw(subsets(group.units)) for group in groups}
    index = Plan(made, kept).index("t", 0)
    expected = []
    for element in range(size):
        keep = True
        for group in groups:
            for slot in group.slots:
                unit = (element - slot.offset) // slot.block
                if slot.offset <= element and unit < group.units:
                    keep = keep and unit in kept[group.name]
        if keep:
            expected.append(element)
    assert (list(range(size)) if index is None else index.tolist()) == expected


@pytest.mark.parametrize(
    ("group", "rule"),
    [
        (Group("g", 2, (Slot("v", 0),)), "no parameter or buffer of that name"),
        (Group("g", 2, (Slot("b", 1),)), r"axis 1 does not exist, the tensor has shape \(6,\)"),
        (Group("g", 4, (Slot("b", 0, 2),)), r"4 units of block 2 end at 8, past the axis \(6\)"),
        (Group("g", 0, (Slot("b", 0),)), "each needs one"),
        (Group("g", 1, ()), "each needs one"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_a_line(group: Group, rule: str):
    with pytest.raises(UserError, match=rule):
        Groups((group,), SHAPES)
    with pytest.raises(UserError, match="two groups are called 'out'"):
        Groups((GROUPS["out"], GROUPS["out"]), SHAPES)


def test_groups_print_as_a_table():
    lines = str(GROUPS).splitlines()
    assert lines[0].split() == ["group", "units", "slots", "parameters", "share", "of", "the", "model"]
    assert lines[2].split() == ["out", "6", "2", "54", "100.0%"] and lines[3].split() == [
        "heads",
        "2",
        "1",
        "48",
        "88.9%",
    ]
    assert lines[-1] == "2 groups over 2 tensors with 100.0% of 54 elements"
    assert [str(slot) for slot in GROUPS.slots("heads")] == ["w:1:3:1"]
    assert GROUPS.parameters("out") == 54


def test_rules_by_hand_are_read_as_they_print():
    groups = read_rules({"hidden": ["first.weight:0", "first.bias:0", "second.weight:1:1:0"]}, MLP())
    assert [str(slot) for slot in groups.slots("hidden")] == ["first.weight:0", "first.bias:0", "second.weight:1"]
    assert groups["hidden"].units == 8


@pytest.mark.parametrize(
    ("slots", "rule"),
    [
        ([], "group 'g' has no slot"),
        (["first.weight"], r"must be tensor:axis\[:block\[:offset\]\]"),
        (["first.weight:x"], "must be tensor:axis"),
        (["first.weight:0:0"], "must be tensor:axis"),
        (["first.weight:-1"], "must be tensor:axis"),
        (["first.weight:0:1:0:0"], "must be tensor:axis"),
        (["third.weight:0"], "'third.weight', which the model does not have"),
        (["first.bias:1"], r"no axis 1 in shape \(8,\)"),
        (["first.bias:0:9"], "each needs one"),
    ],
)
def test_rules_that_cannot_be_read_are_a_line(slots: list[str], rule: str):
    with pytest.raises(UserError, match=rule):
        read_rules({"g": slots}, MLP())
