"""Who moves elements between the master and staging: torch's own operations, or compiled kernels where those win."""

from collections.abc import Sequence
from functools import cache
from time import perf_counter
from typing import Literal, Protocol, get_args

import torch

from offload_trainer import memory
from offload_trainer.device.elements import Pair, gather_into, scatter_from
from offload_trainer.device.native import Kernels, NotCompiled, load_kernels
from offload_trainer.errors import UserError

Choice = Literal["auto", "plain", "native"]
TRIED = 2**22
"""Elements of the tensor that both are tried on: more than caches hold, in a few hundredths of a second."""


class Mover(Protocol):
    """What `Transfer` needs. The same elements end up in the same places whoever moves them."""

    why: str
    """Why it was chosen, in words for a user."""

    def gather(self, pairs: Sequence[Pair]) -> None:
        """Dense tensors ← full ones."""
        ...

    def scatter(self, pairs: Sequence[Pair], *, delta: bool) -> float:
        """Full tensors ← dense ones. With `delta`, returns Σ (new − old)² over floating-point tensors, else 0."""
        ...


class Plain:
    """One tensor after the other, by torch."""

    def __init__(self, why: str = "as asked"):
        self.why = f"moved by torch ({why})"

    def gather(self, pairs: Sequence[Pair]) -> None:
        for dense, full, index in pairs:
            gather_into(dense, full, index)

    def scatter(self, pairs: Sequence[Pair], *, delta: bool) -> float:
        return sum(scatter_from(dense, full, index, delta=delta) for dense, full, index in pairs)


class Native:
    """All tensors in one call of compiled code; those that it cannot move go the plain way."""

    def __init__(self, kernels: Kernels, threads: int, why: str = "as asked"):
        self._kernels, self._threads, self._plain = kernels, threads, Plain()
        self.why = f"moved by compiled kernels ({why})"

    def gather(self, pairs: Sequence[Pair]) -> None:
        ours, others = self._split(pairs)
        self._kernels.gather(ours, threads=self._threads)
        self._plain.gather(others)

    def scatter(self, pairs: Sequence[Pair], *, delta: bool) -> float:
        ours, others = self._split(pairs)
        squared = self._kernels.scatter(ours, delta=delta, threads=self._threads)
        return squared + self._plain.scatter(others, delta=delta)

    def _split(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
        ours: list[Pair] = []
        others: list[Pair] = []
        for pair in pairs:
            (ours if self._kernels.can_move(*pair) else others).append(pair)
        return ours, others


@cache
def choose_mover(choice: Choice, threads: int) -> Mover:
    """auto: the faster of both, found by trying once in a process; kernels are compiled first where they never were.

    Raises `NotCompiled`, which is a `UserError`, where kernels are asked for and cannot be compiled.
    """
    if choice not in get_args(Choice):
        raise UserError(f"transfer ({choice!r}) must be {', '.join(get_args(Choice))}")
    if choice == "plain":
        return Plain()
    if choice == "native":
        return Native(load_kernels(), threads)
    try:
        kernels = load_kernels()
    except NotCompiled as error:
        return Plain(str(error))
    native, plain = speed(Native(kernels, threads)), speed(Plain())
    memory.trim_heap()
    if native > plain:
        return Native(kernels, threads, f"{native / 1e9:.1f} GB/s when tried, {plain / 1e9:.1f} by torch")
    return Plain(f"{plain / 1e9:.1f} GB/s when tried, {native / 1e9:.1f} by compiled kernels")


def speed(mover: Mover, repeats: int = 3) -> float:
    """Bytes per second of a gather and a write-back of half the rows and columns of a matrix; the best of a few."""
    full = torch.zeros(TRIED // 2048, 2048)
    index = torch.arange(0, len(full), 2), torch.arange(0, 2048, 2)
    pairs = [(torch.zeros(len(index[0]), len(index[1])), full, index)]
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        mover.gather(pairs)
        mover.scatter(pairs, delta=True)
        seconds.append(perf_counter() - start)
    return 2 * pairs[0][0].nbytes / min(seconds)
