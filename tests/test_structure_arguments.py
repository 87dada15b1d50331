"""Arguments that make no sense end with one line that names the key, the value and the rule."""

from collections import namedtuple
from typing import Any

import pytest

from offload_trainer.errors import UserError
from offload_trainer.structure import Structure

Group = namedtuple("Group", "name units")
GROUPS = [
    Group("residual", 10),
    Group("layers.0.mlp", 12),
    Group("layers.1.mlp", 7),
    Group("layers.0.heads", 4),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "structure.keep (0) must be in (0, 1]"),
        ({"keep": 1.5}, "structure.keep (1.5) must be in (0, 1]"),
        ({"keep": float("nan")}, "structure.keep (nan) must be in (0, 1]"),
        ({"alpha": 0.4}, "structure.alpha (0.4) must be in [0.5, 1)"),
        ({"alpha": 1.0}, "structure.alpha (1.0) must be in [0.5, 1)"),
        ({"lr": -0.1}, "structure.lr (-0.1) must be finite and not negative"),
        ({"paired_batches": 0}, "structure.paired_batches (0) must be at least 1"),
        ({"min_units": 0}, "structure.min_units (0) must be at least 1"),
        ({"min_units": 5}, "structure.min_units (5) must be at most 4, the units of layers.0.heads"),
        (
            {"estimator": "credit", "control": "linear"},
            "structure.control (linear) must be none with estimator credit, which has no pairs",
        ),
        (
            {"estimator": "credit", "budget": "global"},
            "structure.budget (global) must be per_group with estimator credit: what it says of different groups does"
            " not compare",
        ),
        ({"explore": 1.0}, "structure.explore (1.0) must be in (0, 1)"),
        ({"estimator": "arm"}, "structure.estimator (arm) must be one of rloo, vr_pge, disarm, credit, magnitude"),
        ({"sampler": "topk"}, "structure.sampler (topk) must be one of fixed, bernoulli"),
        ({"budget": "layer"}, "structure.budget (layer) must be one of per_group, global"),
        ({"schedule": "linear"}, "structure.schedule (linear) must be one of constant, cubic"),
        ({"per_group_keep": {"*": 0.0}}, "structure.groups['*'] (0.0) must be in (0, 1]"),
        (
            {"per_group_keep": {"*mpl*": 0.5}},
            "structure.groups ('*mpl*') must match a group that no earlier pattern matches; "
            "the groups are residual, layers.0.mlp, layers.1.mlp, layers.0.heads",
        ),
        (
            {"per_group_keep": {"*": 0.5, "*mlp": 0.25}},
            "structure.groups ('*mlp') must match a group that no earlier pattern matches; "
            "the groups are residual, layers.0.mlp, layers.1.mlp, layers.0.heads",
        ),
        (
            {"start_keep": 0.9},
            "structure.start_keep (0.9) must be left out when structure.schedule is constant",
        ),
        (
            {"schedule_steps": 9},
            "structure.schedule_steps (9) must be left out when structure.schedule is constant",
        ),
        (
            {"schedule": "cubic"},
            "structure.schedule_steps (0) must be at least 1 when structure.schedule is cubic",
        ),
        (
            {"schedule": "cubic", "schedule_steps": 9, "start_keep": 1.1},
            "structure.start_keep (1.1) must be in (0, 1]",
        ),
        (
            {"schedule": "cubic", "schedule_steps": 9, "start_keep": 0.2},
            "structure.start_keep (0.2) must not be below a keep ratio that it leads to (0.25)",
        ),
    ],
)
def test_bad_argument_is_one_line_that_names_key_value_and_rule(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        Structure(GROUPS, **arguments)
    assert str(error.value) == message


def test_min_units_concerns_sampled_groups_only():
    assert Structure(GROUPS, per_group_keep={"*mlp": 0.5}, min_units=5).names == (
        "layers.0.mlp",
        "layers.1.mlp",
    )
