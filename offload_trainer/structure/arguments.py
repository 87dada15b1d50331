"""What a structure can be made of, checked before it is."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Literal, get_args

from offload_trainer.structure.budgets import ScheduleName, require

Estimator = Literal["rloo", "vr_pge", "disarm", "credit", "magnitude"]
PAIRLESS = ("credit", "magnitude")
"""Estimators that score units and compare no subnetworks."""
Control = Literal["none", "linear"]
Sampler = Literal["fixed", "bernoulli"]
Budget = Literal["per_group", "global"]


def require_arguments(
    keep: float,
    alpha: float,
    lr: float,
    paired_batches: int,
    min_units: int,
    width_steps: Mapping[str, int] | None,
    explore: float,
    *,
    estimator: str,
    control: str,
    sampler: str,
    budget: str,
    schedule: str,
) -> None:
    """Raises `UserError`; for the arguments see `Structure`."""
    for key, value, choices in (
        ("estimator", estimator, get_args(Estimator)),
        ("control", control, get_args(Control)),
        ("sampler", sampler, get_args(Sampler)),
        ("budget", budget, get_args(Budget)),
        ("schedule", schedule, get_args(ScheduleName)),
    ):
        require(value in choices, key, value, f"be one of {', '.join(choices)}")
    require(isinstance(keep, Real) and 0 < keep <= 1, "keep", keep, "be in (0, 1]")
    require(0.5 <= alpha < 1, "alpha", alpha, "be in [0.5, 1)")
    require(0 <= lr < math.inf, "lr", lr, "be finite and not negative")
    require(paired_batches >= 1, "paired_batches", paired_batches, "be at least 1")
    require(0 < explore < 1, "explore", explore, "be in (0, 1)")
    rule = f"be per_group with estimator {estimator}: what it says of different groups does not compare"
    require(budget == "per_group" or estimator not in PAIRLESS, "budget", budget, rule)
    rule = f"be none with estimator {estimator}, which has no pairs"
    require(control == "none" or estimator not in PAIRLESS, "control", control, rule)
    require(min_units >= 1, "min_units", min_units, "be at least 1")
    if width_steps and max(width_steps.values()) > 1:
        rule = "be 1 unless sampler is fixed, budget per_group"
        require(sampler == "fixed" and budget == "per_group", "multiple_of", max(width_steps.values()), rule)
