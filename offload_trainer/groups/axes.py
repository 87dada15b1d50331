"""The algebra of axes: what one axis of a tensor is made of, and how two axes come to be the same.

An axis is a product of symbols, outermost first: 32 heads of 128 features, flattened, are `[heads, features]`.
An axis of size 1 is the empty product. A symbol is one of

- a leaf, which may become a group of units, or is pinned (never sliced);
- a product of other symbols, once a `view` has split it;
- a concatenation of axes, once a `cat`, `split` or slice has shown where it may be cut.

`unify` makes two axes equal, refining leaves where one side knows more, as unification of terms does.
Whatever it cannot express is pinned: the result is then smaller, never wrong.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod

Axis = list["Symbol"]

PICKED_APART = "its entries are told apart by index"  # select, unbind: q, k, v of a (3, heads, d) projection


class Symbol:
    """One factor of an axis; a node of a union-find forest whose roots carry the facts."""

    __slots__ = ("_link", "chosen", "factors", "least", "outer", "pinned", "residual", "segments", "size")

    def __init__(self, size: int, pinned: str | None = None, outer: "Symbol | None" = None):
        self.size = size
        self.pinned = pinned  # why it is never sliced
        self.outer = outer  # the next outer symbol of the split that made this one
        self.factors: Axis | None = None
        self.segments: list[Axis] | None = None
        self.residual = False  # two activations were added along it
        self.chosen = False  # its entries are chosen by position: experts by a router
        self.least = 1  # so many entries must stay
        self._link: Symbol | None = None

    @property
    def root(self) -> "Symbol":
        symbol = self
        while symbol._link is not None:
            symbol = symbol._link
        return symbol

    def become(self, other: "Symbol") -> None:
        """From now on this leaf is `other`."""
        self._link = other
        other.residual |= self.residual
        other.chosen |= self.chosen
        require([other], self.least)
        if self.pinned:
            pin([other], self.pinned)


def fresh(size: int, pinned: str | None = None) -> Axis:
    return [] if size == 1 else [Symbol(size, pinned)]


def size_of(axis: Axis) -> int:
    return prod(symbol.size for symbol in axis)


def resolve(axis: Iterable[Symbol]) -> Axis:
    """The same axis with every product expanded: roots only, each a leaf or a concatenation, none of size 1."""
    resolved: Axis = []
    for symbol in axis:
        root = symbol.root
        if root.factors is not None:
            resolved += resolve(root.factors)
        elif root.size != 1:
            resolved.append(root)
    return resolved


def leaves(axis: Axis) -> Iterator[Symbol]:
    for symbol in resolve(axis):
        if symbol.segments is None:
            yield symbol
        else:
            for segment in symbol.segments:
                yield from leaves(segment)


def pin(axis: Axis, reason: str) -> None:
    for leaf in leaves(axis):
        leaf.pinned = leaf.pinned or reason


def is_pinned(axis: Axis) -> bool:
    return all(leaf.pinned for leaf in leaves(axis))


def mark_residual(axis: Axis) -> None:
    for leaf in leaves(axis):
        leaf.residual = True


def mark_chosen(axis: Axis) -> None:
    for leaf in leaves(axis):
        leaf.chosen = True


def require(axis: Axis, count: int) -> None:
    """At least `count` entries of the axis must stay: so many of them are chosen."""
    if count < 2:
        return
    for symbol in resolve(axis):
        if symbol.segments is None:
            # Its other factors lie inside its units, so they stay whole where this one is sliced.
            symbol.least = max(symbol.least, ceil(count * symbol.size / size_of(axis)))
        else:
            pin([symbol], "entries of a concatenation are chosen by position")


def concat(axes: Sequence[Axis]) -> Axis:
    """The axis that lays `axes` one after the other."""
    parts = [axis for axis in axes if size_of(axis) > 0]
    if len(parts) == 1:
        return parts[0]
    symbol = Symbol(sum(size_of(part) for part in parts))
    symbol.segments = parts
    return [symbol]


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Factor `axis` into axes of `sizes` (outermost first), splitting symbols where needed; None if it does not fit."""
    queue = resolve(axis)
    parts: list[Axis] = []
    for size in sizes:
        part: Axis = []
        while size > 1:
            if not queue:
                return None
            head = queue[0]
            if head.size > size:
                if head.size % size or not _factor(head, size):
                    return None
                queue = resolve(queue)
                continue
            if size % head.size:
                return None
            part.append(queue.pop(0))
            size //= head.size
        parts.append(part)
    return parts if not queue else None


def cut(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Cut `axis` into consecutive pieces of `sizes`; None if a boundary falls inside a unit's block."""
    symbols = resolve(axis)
    if len(sizes) == 1:
        return [axis]
    head, inner = symbols[0], symbols[1:]
    block = size_of(inner)
    if any(size % block for size in sizes):
        return None
    sizes = [size // block for size in sizes]
    if head.segments is None:
        pieces = [fresh(size, head.pinned) for size in sizes]
        head.segments = list(pieces)
        require([head], head.least)
    else:
        cut_segments = _cut_segments(head.segments, sizes)
        if cut_segments is None:
            return None
        pieces = cut_segments
    return [piece + inner for piece in pieces]


def unify(a: Axis, b: Axis, reason: str = "two axes of different make meet") -> None:
    """Make two axes of the same size one. Where they cannot be aligned, both are pinned."""
    left, right = resolve(a), resolve(b)
    while left and right:
        x, y = left[0], right[0]
        if x.size == y.size:
            _unify_symbols(left.pop(0), right.pop(0), reason)
        elif x.size > y.size:
            if x.size % y.size or not _factor(x, y.size):
                break
        elif y.size % x.size or not _factor(y, x.size):
            break
        left, right = resolve(left), resolve(right)  # a symbol that has just changed may stand in both
    pin(left, reason)
    pin(right, reason)


def occurrences(axis: Axis, block: int = 1, offset: int = 0) -> Iterator[tuple[Symbol, int, int]]:
    """Every run of a leaf's units along the axis: (leaf, elements per unit, first element)."""
    symbols = resolve(axis)
    for position, symbol in enumerate(symbols):
        inner = block * size_of(symbols[position + 1 :])
        for repeat in range(size_of(symbols[:position])):
            start = offset + repeat * symbol.size * inner
            if symbol.segments is None:
                yield symbol, inner, start
                continue
            for segment in symbol.segments:
                yield from occurrences(segment, inner, start)
                start += size_of(segment) * inner


def pin_inner(axes: Iterable[Axis]) -> None:
    """Of a split axis only the outermost factor is a unit (a head is kept or dropped whole).

    The exception: an outer factor whose entries are told apart (the 3 of a fused qkv) leaves its inner ones free.
    """
    for symbol in [symbol for axis in axes for symbol in axis]:
        root = symbol.root
        if symbol.outer is not None:  # settled before its inner ones: products are walked from the outside in
            outer_pins = {leaf.pinned for leaf in leaves([symbol.outer])}
            if outer_pins != {PICKED_APART}:
                pin([symbol], "it lies inside a unit")
        pin_inner([root.factors] if root.factors is not None else root.segments or [])


def _factor(symbol: Symbol, outer: int) -> bool:
    """Turn a symbol into a product of (outer, size / outer); False if it is a concatenation that does not allow it."""
    inner = symbol.size // outer
    if symbol.segments is None:
        first = Symbol(outer, symbol.pinned, symbol.outer)
        symbol.factors = [first, Symbol(inner, symbol.pinned, outer=first)]
        first.residual, first.chosen = symbol.residual, symbol.chosen
        require(symbol.factors, symbol.least)
        return True
    if any(size_of(segment) % inner for segment in symbol.segments):
        return False
    halves = [split(segment, (size_of(segment) // inner, inner)) for segment in symbol.segments]
    if any(half is None for half in halves):
        return False
    head = Symbol(outer, None, symbol.outer)
    head.segments = [half[0] for half in halves if half]
    shared = [half[1] for half in halves if half]
    for other in shared[1:]:
        unify(shared[0], other)
    symbol.segments = None
    symbol.factors = [head, *shared[0]]
    return True


def _cut_segments(segments: list[Axis], sizes: Sequence[int]) -> list[Axis] | None:
    """Regroup a concatenation's segments into pieces of `sizes`, refining `segments` in place."""
    pieces: list[Axis] = []
    position = 0
    for size in sizes:
        taken: list[Axis] = []
        while size > 0:
            available = size_of(segments[position])
            if available > size:
                parts = cut(segments[position], (size, available - size))
                if parts is None:
                    return None
                segments[position : position + 1] = parts
                available = size
            taken.append(segments[position])
            size -= available
            position += 1
        pieces.append(concat(taken))
    return pieces


def _unify_symbols(x: Symbol, y: Symbol, reason: str) -> None:
    x, y = x.root, y.root
    if x is y:
        return
    if x.factors is not None or y.factors is not None:
        unify([x], [y], reason)  # an earlier factor of the same pair has refined one of them meanwhile
    elif x.segments is None:
        x.become(y)
    elif y.segments is None:
        y.become(x)
    else:
        pieces = _cut_segments(x.segments, [size_of(segment) for segment in y.segments])
        other = _cut_segments(y.segments, [size_of(segment) for segment in x.segments])
        if pieces is None or other is None:
            pin([x], reason)
            pin([y], reason)
            return
        # Both lists now have every boundary of the other, so they pair up one to one.
        for mine, theirs in zip(list(x.segments), list(y.segments), strict=True):
            unify(mine, theirs, reason)
        x.become(y)
