"""What people use today to train what does not fit the device, beside ours, each in a process of its own."""

from benchmarks.peers.comparison import Options, measure

__all__ = ["Options", "measure"]
