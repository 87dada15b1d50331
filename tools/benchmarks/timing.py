"""Timing on a machine that may be shared: contenders take turns in one process, and medians are compared."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

import torch

from offload_trainer import memory

Seconds = Mapping[str, Sequence[float]]
"""Contender → seconds of each repeat."""


def take_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, *, warmup: int = 1
) -> Seconds:
    """Time each contender `repeats` times, after `warmup` untimed turns.

    Each repeat runs all of them in order: whatever slows the machine for a while slows neighbours alike, and none finds
    in the caches what it left there itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-warmup, repeats):
        for name, run in contenders.items():
            memory.synchronize(device)
            start = perf_counter()
            run()
            memory.synchronize(device)
            if repeat >= 0:
                seconds[name].append(perf_counter() - start)
    return seconds


def times_faster(seconds: Seconds, contender: str, baseline: str) -> float:
    """Seconds of the baseline ÷ seconds of the contender in the same repeat; the median over the repeats."""
    return median(base / own for own, base in zip(seconds[contender], seconds[baseline], strict=True))
