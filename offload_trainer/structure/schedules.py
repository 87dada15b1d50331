"""Keep ratio as a function of the optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """From `start_keep` at step 0 to `keep` at step `steps`, where it stays."""

    keep: float
    """Keep ratio in the end, in (0, 1]."""
    start_keep: float
    """Keep ratio at step 0, in [keep, 1]."""
    steps: int
    """Optimizer steps until `keep` is reached; 0: at once."""

    def keep_at(self, step: int) -> float:
        """keep + (start_keep - keep) * (1 - step / steps)^3, then `keep` (Zhu & Gupta 2017)."""
        if step >= self.steps:
            return self.keep
        return self.keep + (self.start_keep - self.keep) * (1 - step / self.steps) ** 3


def constant(keep: float) -> Schedule:
    """`keep` at every step."""
    return Schedule(keep, keep, 0)


def cubic(keep: float, start_keep: float, steps: int) -> Schedule:
    """Falls fast at first, where there is most to spare, and slowly towards the end."""
    return Schedule(keep, start_keep, steps)
