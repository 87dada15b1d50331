"""What can be sliced of a model, found by tracing; and the frozen plan that says which units are kept."""

from offload_trainer.groups.plan import Group, Groups, Plan, Slot
from offload_trainer.groups.rulebook import read_rules
from offload_trainer.groups.rules import rule
from offload_trainer.groups.slicing import require_of, slice_module
from offload_trainer.groups.tracing import find_groups
from offload_trainer.groups.verification import random_plan, verify_groups

__all__ = [
    "Group",
    "Groups",
    "Plan",
    "Slot",
    "find_groups",
    "random_plan",
    "read_rules",
    "require_of",
    "rule",
    "slice_module",
    "verify_groups",
]
