"""The global generators of random numbers that a model, a loss or a loader draws from: torch's, NumPy's, Python's."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def random_state(device: torch.device = CPU) -> dict[str, Tensor]:
    """Where all of them are, as plain tensors, with torch's on this device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    _, words, spare = random.getstate()
    states["python"] = torch.tensor(words, device="cpu")
    states["python.spare"] = _spare(spare)
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] == "MT19937":  # nobody has put another one in its place
        words, place = numpy["state"]["key"], numpy["state"]["pos"]
        states["numpy"] = torch.tensor([*words.tolist(), place], device="cpu")
        states["numpy.spare"] = _spare(numpy["gauss"] if numpy["has_gauss"] else None)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device = CPU) -> None:
    """Puts them where they were; one of which nothing is said stays where it is."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        there, spare = states["python.spare"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), spare if there else None))
    if "numpy" in states:
        *words, place = states["numpy"].tolist()
        there, spare = states["numpy.spare"].tolist()
        np.random.set_state(("MT19937", np.array(words, np.uint32), place, int(there), spare))


@contextmanager
def preserve_random_state(device: torch.device = CPU) -> Iterator[None]:
    """Context: afterwards the generators are as they were."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


class RandomState:
    """A state of its own for all of them, on the CPU, put in their place for a while."""

    def __init__(self, seed: int):
        with preserve_random_state():
            torch.default_generator.manual_seed(seed)  # and no device's
            np.random.seed(seed)
            random.seed(seed)
            self._states = random_state()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Goes on from where the last use ended; afterwards the generators are as they were."""
        with preserve_random_state():
            set_random_state(self._states)
            try:
                yield
            finally:
                self._states = random_state()


def _spare(number: float | None) -> Tensor:
    """(2,): whether there is the second of two normal numbers that were drawn together, and that."""
    return torch.tensor([number is not None, number or 0.0], dtype=torch.float64, device="cpu")
