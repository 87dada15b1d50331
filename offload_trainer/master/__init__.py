"""The full-size parameters, buffers and optimizer state in host memory, and their checkpoints."""

from offload_trainer.master.checkpoint import Checkpoint, CheckpointStore
from offload_trainer.master.master import Master
from offload_trainer.master.moments import StateLayout, probe_optimizer
from offload_trainer.master.slab import Slab, slab_bytes

__all__ = ["Checkpoint", "CheckpointStore", "Master", "Slab", "StateLayout", "probe_optimizer", "slab_bytes"]
