"""Train networks larger than the GPU: one sliced subnetwork at a time, the whole model in host memory."""

from offload_trainer.errors import UserError
from offload_trainer.groups import Group, Groups, Plan, Slot, find_groups, slice_module, verify_groups
from offload_trainer.master.precision import Precision
from offload_trainer.offloader import Offloader
from offload_trainer.result import load_export
from offload_trainer.structure import Structure
from offload_trainer.tasks.task import Task

__all__ = [
    "Group",
    "Groups",
    "Offloader",
    "Plan",
    "Precision",
    "Slot",
    "Structure",
    "Task",
    "UserError",
    "find_groups",
    "load_export",
    "slice_module",
    "verify_groups",
]
