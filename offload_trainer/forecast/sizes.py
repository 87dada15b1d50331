"""Bytes that follow from a plan's shapes and types alone."""

from collections.abc import Iterable
from itertools import chain

from torch import nn

from offload_trainer.device.elements import PATCH
from offload_trainer.device.swap import ARRIVING
from offload_trainer.device.transfer import LINK_CHUNK, SlabLayout, limited, slab_layouts
from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master.master import Entries, stored_moments, stored_weights
from offload_trainer.master.moments import StateSpec
from offload_trainer.master.precision import Precision
from offload_trainer.master.slab import by_dtype, slab_bytes


class Sizes:
    """Of the subnet of a plan: what it holds, and what moving it takes. sampled: tensors that some plan slices."""

    def __init__(
        self, model: nn.Module, state_spec: StateSpec, precision: Precision, plan: Plan, sampled: frozenset[str]
    ):
        self.plan, self._sampled = plan, sampled
        tensors, parameters = named_tensors(model), dict(model.named_parameters())
        self._computed: Entries = {name: (tensor.dtype, plan.shape(name)) for name, tensor in tensors.items()}
        stored = stored_weights(tensors, precision)
        self._stored: Entries = {name: (dtype, plan.shape(name)) for name, (dtype, _) in stored.items()}
        # Frozen parameters have neither gradients nor moments.
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        self._trained: Entries = {name: entry for name, entry in self._computed.items() if name in trained}
        self._moments: dict[str, Entries] = {
            name: state_spec.entries(name, self._trained) for name in state_spec.moments
        }
        layouts = [(self._computed, self._stored)]
        layouts += [(entries, stored_moments(entries, precision)) for entries in self._moments.values()]
        self._layouts = [
            slab_layouts(own, {name: dtype for name, (dtype, _) in stored.items()}) for own, stored in layouts
        ]

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

    def link(self, reference: bool, ahead: bool) -> dict[str, int]:
        """What crosses the link in a round, in the master's types.

        reference: a second subnet is gathered. ahead: it is the one that is trained next, gathered once for both uses,
        and only of tensors that some plan slices.
        """
        weights, *moments = self._layouts
        written = _stored_bytes(weights), sum(map(_stored_bytes, moments))
        gathered = written
        if ahead:
            weights, *moments = [limited(kind, self._sampled) for kind in self._layouts]
            gathered = _stored_bytes(weights), sum(map(_stored_bytes, moments))
        both = {
            "gathered weights": gathered[0],
            "gathered moments": gathered[1],
            "gathered reference": gathered[0] if reference and not ahead else 0,
            "written weights": written[0],
            "written moments": written[1],
        }
        return {name: size for name, size in both.items() if size}

    def staging(self, *, overlap: bool, ahead: bool, on_host: bool) -> int:
        """Of one process. Where nothing overlaps, one buffer for all slabs of one layout, since the moments share
        theirs, and on the host none but where types differ."""
        if overlap:
            waiting = [limited(kind, self._sampled) for kind in self._layouts] if ahead else []
            return sum(map(_stored_bytes, [*self._layouts, *waiting]))
        held = {
            (stored, tuple(shapes)): slab_bytes(shapes, stored)
            for dtype, stored, shapes in chain(*self._layouts)
            if not on_host or dtype != stored
        }
        return sum(held.values())

    def arriving(self, *, on_host: bool) -> int:
        """On the device during a swap: some neighbouring tensors of what was gathered ahead, on the host where types
        differ; and on a device scratch of the copies of what one shares with the subnet."""
        coming = [
            shape.numel() * dtype.itemsize
            for dtype, stored, shapes in limited(chain(*self._layouts), self._sampled)
            for shape in shapes.values()
            if not on_host or dtype != stored
        ]
        largest = max(coming, default=0)
        together = min(sum(coming), ARRIVING + largest)
        return together if on_host else together + 3 * min(PATCH, largest)

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
        narrower = [
            sum(shape.numel() for shape in shapes.values())
            for dtype, stored, shapes in chain(*self._layouts)
            if dtype != stored
        ]
        return 20 * min(LINK_CHUNK, max(narrower, default=0))


def _stored_bytes(kind: Iterable[SlabLayout]) -> int:
    return sum(slab_bytes(shapes, stored) for _, stored, shapes in kind)


def _bytes(entries: Entries) -> int:
    return sum(slab_bytes(shapes, dtype) for dtype, shapes in by_dtype(entries).items())
