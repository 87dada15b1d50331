"""The full-size parameters, buffers and optimizer state in host memory, and their checkpoints."""

from offload_trainer.master.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, set_aside, whole_folder
from offload_trainer.master.master import Master
from offload_trainer.master.moments import StateSpec, probe_optimizer, trained_dtype
from offload_trainer.master.precision import FP32, Precision
from offload_trainer.master.slab import Slab

__all__ = [
    "FP32",
    "Checkpoint",
    "CheckpointStore",
    "Master",
    "Precision",
    "Slab",
    "StateSpec",
    "find_checkpoint",
    "probe_optimizer",
    "set_aside",
    "trained_dtype",
    "whole_folder",
]
