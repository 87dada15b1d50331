"""Groups of units and the frozen plan that says which of them are kept. Data only: no tracing, no slicing."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from types import MappingProxyType

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.groups.table import table

Widths = Mapping[type, Mapping[str, tuple[str, int]]]
"""Module type → {attribute: (tensor name inside the module, axis)}: the attribute scales as that axis does."""


@dataclass(frozen=True)
class Slot:
    """One run of a group's units along one axis of one tensor."""

    tensor: str
    axis: int
    block: int = 1
    """Consecutive elements per unit (head_dim, or height × width where a convolution was flattened)."""
    offset: int = 0
    """First element of unit 0."""

    def __str__(self) -> str:
        tail = f":{self.block}:{self.offset}" if self.offset else f":{self.block}" if self.block > 1 else ""
        return f"{self.tensor}:{self.axis}{tail}"


@dataclass(frozen=True)
class Group:
    """Units that share one mask, because the network ties them together."""

    name: str
    units: int
    slots: tuple[Slot, ...]
    least: int = 1
    """So many units must stay: a router that chooses two experts needs two."""
    chosen: bool = False
    """The model picks among the units by position, as a router does among experts."""


@dataclass(frozen=True)
class Groups:
    """What can be sliced of a model: iterable of `Group`, by name with `groups[name]`; `print(groups)` is a table."""

    groups: tuple[Group, ...]
    shapes: Mapping[str, torch.Size]
    """Every parameter and buffer of the model by name (tied ones once)."""
    widths: Widths = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"two groups are called {name!r}; group names must differ")
        for group in self.groups:
            if group.units < 1 or not group.slots:
                raise UserError(
                    f"group {group.name!r} has {group.units} units and {len(group.slots)} slots; each needs one"
                )
            if not 1 <= group.least <= group.units:
                raise UserError(f"group {group.name!r} must keep at least {group.least} units and has {group.units}")
            for slot in group.slots:
                self._check(group, slot)

    def _check(self, group: Group, slot: Slot) -> None:
        where = f"group {group.name!r}, slot {str(slot)!r}"
        if slot.tensor not in self.shapes:
            raise UserError(f"{where}: the model has no parameter or buffer of that name")
        shape = self.shapes[slot.tensor]
        if not 0 <= slot.axis < len(shape):
            raise UserError(f"{where}: axis {slot.axis} does not exist, the tensor has shape {tuple(shape)}")
        end = slot.offset + group.units * slot.block
        if slot.offset < 0 or slot.block < 1 or end > shape[slot.axis]:
            size = shape[slot.axis]
            raise UserError(f"{where}: {group.units} units of block {slot.block} end at {end}, past the axis ({size})")

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        if name not in self._by_name:
            raise KeyError(f"no group {name!r}; there are {', '.join(self._by_name)}")
        return self._by_name[name]

    def slots(self, name: str) -> tuple[Slot, ...]:
        return self[name].slots

    def sliced_by(self, names: Iterable[str]) -> frozenset[str]:
        """The tensors that the groups of these names slice. Raises `UserError` for a name that is not there."""
        names = list(names)
        unknown = [name for name in names if name not in self._by_name]
        if unknown:
            raise UserError(
                f"the structure has group {unknown[0]!r}, which the model's groups do not: make both of one"
            )
        return frozenset(slot.tensor for name in names for slot in self.slots(name))

    def block(self, name: str) -> int:
        """The greatest number that divides the blocks of all its slots on tensors of two axes or more; 1 without any.

        A head of 64 features whose keys have 64 rows and whose queries have 128 has a block of 64.
        """
        return gcd(*(slot.block for slot in self[name].slots if len(self.shapes[slot.tensor]) > 1)) or 1

    def width_steps(self, multiple_of: int) -> dict[str, int]:
        """Group name → in steps of how many units its width goes, so that axes stay multiples of so many elements.

        What the model picks from (experts) is no width of a matrix product, and goes one by one.
        """
        return {g.name: 1 if g.chosen else multiple_of // gcd(multiple_of, self.block(g.name)) for g in self}

    def parameters(self, name: str) -> int:
        """Elements of all tensors that the group slices."""
        return sum(self.shapes[tensor].numel() for tensor in {slot.tensor for slot in self[name].slots})

    @cached_property
    def _by_name(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def by_tensor(self) -> Mapping[str, Mapping[int, tuple[tuple[Group, Slot], ...]]]:
        """tensor → axis → the slots on it."""
        table: dict[str, dict[int, tuple[tuple[Group, Slot], ...]]] = {}
        for group in self.groups:
            for slot in group.slots:
                axes = table.setdefault(slot.tensor, {})
                axes[slot.axis] = (*axes.get(slot.axis, ()), (group, slot))
        return table

    def __str__(self) -> str:
        return table(self)


class Plan(Mapping[str, Tensor]):
    """A frozen choice of units: group name → kept indices, sorted, int64. A group not named is kept whole.

    Raises `UserError` when made of indices that are unsorted, repeated, out of range or too few.
    """

    def __init__(self, groups: Groups, kept: Mapping[str, Tensor]):
        known = {group.name: group for group in groups}
        chosen: dict[str, Tensor] = {}
        for name, indices in kept.items():
            if name not in known:
                raise UserError(f"the plan names group {name!r}, which the model does not have")
            indices, units = torch.as_tensor(indices), known[name].units
            if indices.ndim != 1 or len(indices) == 0:
                raise UserError(f"the plan keeps no unit of group {name!r}; at least one must stay")
            if len(indices) < known[name].least:
                raise UserError(
                    f"the plan keeps {len(indices)} units of group {name!r}; at least {known[name].least} must stay"
                )
            if indices.is_floating_point() or indices.dtype == torch.bool:
                raise UserError(f"the plan's indices of group {name!r} must be whole numbers, not {indices.dtype}")
            indices = indices.to("cpu", torch.int64, copy=True)
            if bool((indices.diff() <= 0).any()):
                raise UserError(f"the plan's indices of group {name!r} must be sorted and distinct")
            if int(indices[0]) < 0 or int(indices[-1]) >= units:
                raise UserError(f"the plan's indices of group {name!r} must lie in [0, {units})")
            if len(indices) < units:  # a group kept whole needs no index anywhere
                chosen[name] = indices
        self.groups = groups
        self._chosen = MappingProxyType(chosen)
        self._index: dict[tuple, Tensor | None] = {}
        self._shared: dict[tuple, tuple[Tensor | None, Tensor | None]] = {}

    @classmethod
    def whole(cls, groups: Groups) -> "Plan":
        return cls(groups, {})

    def __getitem__(self, name: str) -> Tensor:
        chosen = self._chosen.get(name)
        return torch.arange(self.groups[name].units) if chosen is None else chosen

    def __iter__(self) -> Iterator[str]:
        return (group.name for group in self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the kept indices: equal on two ranks exactly when their plans are."""
        sha = hashlib.sha256()
        for name in self:
            kept = self[name].numpy().tobytes()
            sha.update(f"{name}\0{len(kept)}\0".encode() + kept)
        return sha.hexdigest()

    def index(self, tensor: str, axis: int) -> Tensor | None:
        """Kept elements along one axis of a tensor, sorted; None when the axis stays whole."""
        key = self._axis(tensor, axis)
        if key not in self._index:
            self._index[key] = self._elements(*key)
        return self._index[key]

    def _axis(self, tensor: str, axis: int) -> tuple:
        """Its size, and name, units, block and offset of each group on it: equal for axes that are sliced alike."""
        slots = self.groups.by_tensor.get(tensor, {}).get(axis, ())
        return self.groups.shapes[tensor][axis], *((g.name, g.units, s.block, s.offset) for g, s in slots)

    def _elements(self, size: int, *slots: tuple[str, int, int, int]) -> Tensor | None:
        chosen = [slot for slot in slots if slot[0] in self._chosen]
        if not chosen:
            return None
        keep = torch.ones(size, dtype=torch.bool)
        for name, count, block, offset in chosen:
            units = torch.zeros(count, dtype=torch.bool)
            units[self._chosen[name]] = True
            # Where two groups meet on an element (heads and their features), both must keep it.
            keep[offset : offset + count * block] &= units.repeat_interleave(block)
        return keep.nonzero().flatten()

    def shared(self, other: "Plan", tensor: str) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Where the elements of a tensor that both plans keep lie, for every axis (None: all of it is shared): in this
        plan's sliced tensor, and in the other's."""
        pairs = []
        for axis in range(len(self.groups.shapes[tensor])):
            key = (other.digest, self._axis(tensor, axis))
            if key not in self._shared:
                ours, theirs = self.index(tensor, axis), other.index(tensor, axis)
                self._shared[key] = _common(ours, theirs, self.groups.shapes[tensor][axis])
            pairs.append(self._shared[key])
        return tuple(here for here, _ in pairs), tuple(there for _, there in pairs)

    def indices(self, tensor: str) -> tuple[Tensor | None, ...]:
        """`index` for every axis of a tensor."""
        return tuple(self.index(tensor, axis) for axis in range(len(self.groups.shapes[tensor])))

    def shape(self, tensor: str) -> torch.Size:
        """Shape of the sliced tensor."""
        full = self.groups.shapes[tensor]
        return torch.Size(n if i is None else len(i) for n, i in zip(full, self.indices(tensor), strict=True))

    def slices(self, tensor: str) -> bool:
        """Whether the plan leaves out any element of the tensor."""
        return any(index is not None for index in self.indices(tensor))


def _common(ours: Tensor | None, theirs: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Places in two sorted selections of `size` elements (None: all of them) of what is in both (None: everywhere)."""
    if ours is None or theirs is None:
        return theirs, ours
    places = torch.full((size,), -1)
    places[ours] = torch.arange(len(ours))
    found = places[theirs]
    both = found >= 0
    if len(ours) == len(theirs) and bool(both.all()):
        return None, None
    return found[both], both.nonzero().flatten()
