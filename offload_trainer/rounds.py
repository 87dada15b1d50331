"""What a round cost and did."""

import time
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class RoundReport:
    """The round now running, or the last one if none is."""

    round: int = 0
    difference: float | None = None
    """d: mean over the paired batches of L(m) − L(m′); None when the round had no pairs."""
    gather_ms: float = 0.0
    writeback_ms: float = 0.0
    delta_norm: float = 0.0
    """Euclidean norm of what the round changed in the master."""
    bytes_moved: int = 0
    """Gathered and written back."""


@dataclass
class Spent:
    """Wall seconds since the start, by what they went into."""

    gather: float = 0.0
    writeback: float = 0.0
    reference: float = 0.0

    @contextmanager
    def on(self, what: str):
        start = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)
