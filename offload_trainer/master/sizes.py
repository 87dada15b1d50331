"""Bytes that follow from a plan's shapes and types alone."""

import torch
from torch import nn

from offload_trainer.device.transfer import LINK_CHUNK
from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master.master import Entries, stored_moments, stored_weights
from offload_trainer.master.moments import StateLayout
from offload_trainer.master.precision import Precision
from offload_trainer.master.slab import by_dtype, slab_bytes


class Sizes:
    """Of the subnet of a plan: what it holds, and what moving it takes."""

    def __init__(self, model: nn.Module, layout: StateLayout, precision: Precision, plan: Plan):
        self.plan, self._precision = plan, precision
        tensors, parameters = named_tensors(model), dict(model.named_parameters())
        self._computed: Entries = {name: (tensor.dtype, plan.shape(name)) for name, tensor in tensors.items()}
        stored = stored_weights(tensors, precision)
        self._stored: Entries = {name: (dtype, plan.shape(name)) for name, (dtype, _) in stored.items()}
        # Frozen parameters have neither gradients nor moments.
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._trained: Entries = {name: entry for name, entry in self._computed.items() if name in trained}
        self._moments: dict[str, Entries] = {name: layout.entries(name, self._trained) for name in layout.moments}

    @property
    def weights(self) -> int:
        """Of a subnet."""
        return _bytes(self._computed)

    @property
    def moments(self) -> dict[str, int]:
        """Of a subnet, by name."""
        return {name: _bytes(entries) for name, entries in self._moments.items()}

    @property
    def gradients(self) -> int:
        """Of all trained parameters."""
        return _bytes(self._trained)

    @property
    def widest(self) -> int:
        """Of the largest trained parameter."""
        return max((_bytes({name: entry}) for name, entry in self._trained.items()), default=0)

    def gradients_below(self, block: int) -> int:
        """Of trained parameters smaller than so many bytes."""
        sizes = [shape.numel() * dtype.itemsize for dtype, shape in self._trained.values()]
        return sum(size for size in sizes if size < block)

    def link(self, reference: bool) -> dict[str, int]:
        """What crosses the link in a round, in the master's types."""
        weights = _bytes(self._stored)
        moments = sum(_bytes(stored_moments(entries, self._precision)) for entries in self._moments.values())
        down = {"gathered weights": weights, "gathered moments": moments, "gathered reference": reference * weights}
        both = down | {"written weights": weights, "written moments": moments}
        return {name: size for name, size in both.items() if size}

    @property
    def staging(self) -> int:
        """One buffer for all slabs of one layout: the moments share theirs."""
        layouts: dict[tuple[torch.dtype, tuple[str, ...]], int] = {}
        kinds = [(self._computed, self._stored)]
        kinds += [(entries, stored_moments(entries, self._precision)) for entries in self._moments.values()]
        for computed, stored in kinds:
            table: dict[tuple[torch.dtype, torch.dtype], Entries] = {}
            for name, (dtype, shape) in stored.items():
                table.setdefault((computed[name][0], dtype), {})[name] = (dtype, shape)
            layouts |= {(dtype, tuple(entries)): _bytes(entries) for (_, dtype), entries in table.items()}
        return sum(layouts.values())

    @property
    def merging(self) -> int:
        """Old values and difference of the largest tensor that is written back in one piece: sliced on one axis."""
        sizes = [0]
        for name, (dtype, shape) in self._computed.items():
            sliced = sum(index is not None for index in self.plan.indices(name))
            if sliced < 2 and self._stored[name][0] == dtype:
                sizes.append((1 + sliced) * shape.numel() * dtype.itemsize)
        return max(sizes)

    @property
    def rounding(self) -> int:
        """Scratch on the device while values become those of a narrower master, piece by piece."""
        narrower = [shape.numel() for name, (dtype, shape) in self._stored.items() if dtype != self._computed[name][0]]
        return 20 * min(LINK_CHUNK, sum(narrower))


def _bytes(entries: Entries) -> int:
    return sum(slab_bytes(shapes, dtype) for dtype, shapes in by_dtype(entries).items())
