"""The algebra of axes against labels that are moved along with the entries they name."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis, Symbol


def labels(axis: Axis, *, free: bool = False) -> list[set[tuple[Symbol, int]]]:
    """Of every entry along the axis: its leaves (`free`: those not pinned), and which unit of each it belongs to."""
    seen: list[set[tuple[Symbol, int]]] = [set() for _ in range(ax.size_of(axis))]
    for leaf, block, offset in ax.occurrences(axis):
        for i in range(leaf.size * block if not (free and leaf.pinned) else 0):
            seen[offset + i].add((leaf, i // block))
    return seen


@st.composite
def axes(draw: st.DrawFn, size: int = 24) -> Axis:
    """Concatenations of leaves times a fixed block; leaves of one size may be the same leaf."""
    block = draw(st.sampled_from([1, 1, 2, 3, 4, 6]))
    cuts = sorted(draw(st.sets(st.integers(1, size // block - 1), max_size=3)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size // block], strict=True)]
    shared = {n: Symbol(n) for n in sizes} if draw(st.booleans()) else {}
    return [*ax.concat([[shared.get(n) or Symbol(n)] if n > 1 else [] for n in sizes]), *ax.fresh(block, "inside")]


@given(axes(), st.data())
def test_cut_pieces_hold_the_entries_they_were_cut_at(axis: Axis, data: st.DataObject):
    size = ax.size_of(axis)
    where = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=3)))
    sizes = [b - a for a, b in zip([0, *where], [*where, size], strict=True)]
    pieces = ax.cut(axis, sizes)
    assume(pieces is not None)
    assert [ax.size_of(piece) for piece in pieces] == sizes
    assert [entry for piece in pieces for entry in labels(piece)] == labels(axis)


@given(axes(), st.sampled_from([2, 3, 4, 6, 8, 12]))
def test_split_is_a_view_of_the_same_entries(axis: Axis, inner: int):
    size = ax.size_of(axis)
    parts = ax.split(axis, (size // inner, inner))
    assume(parts is not None)
    assert [ax.size_of(part) for part in parts] == [size // inner, inner]
    assert labels([*parts[0], *parts[1]]) == labels(axis)


@settings(max_examples=300)
@given(axes(), axes())
def test_unified_axes_have_the_same_labels_or_none(a: Axis, b: Axis):
    ax.unify(a, b)
    assert labels(a, free=True) == labels(b, free=True)


@given(st.permutations(range(4)), st.data())
def test_unification_does_not_depend_on_its_order(order: list[int], data: st.DataObject):
    """Heads meet features, a fused projection, its halves and a concatenation: one group whatever comes first."""
    heads, flat, fused, joined = Symbol(4), Symbol(12), Symbol(24), [Symbol(12), Symbol(12)]
    steps = [
        lambda: ax.unify([heads, *ax.fresh(3)], [flat]),
        lambda: [ax.unify(piece, [flat]) for piece in ax.cut([fused], (12, 12)) or []],
        lambda: ax.unify([fused], ax.concat([[joined[0]], [joined[1]]])),
        lambda: ax.unify([joined[0]], [joined[1]]),
    ]
    for i in order:
        steps[i]()
    found = [(leaf, block, offset) for leaf, block, offset in ax.occurrences([fused])]
    outer = heads.root
    assert [(block, offset) for leaf, block, offset in found if leaf is outer] == [(3, 0), (3, 12)]


def test_a_symbol_on_both_sides_is_split_once():
    """(a, 3) and (3, a) of the same a: what one side learns of it, the other must not overwrite."""
    a, c, d = Symbol(12), Symbol(3), Symbol(3)
    ax.unify([a, c], [d, a])
    assert labels([a, c], free=True) == labels([d, a], free=True)


def test_a_pin_reaches_whatever_the_axis_is_made_of():
    a, b = Symbol(4), Symbol(6)
    axis = [*ax.concat([[a], [b]]), *ax.fresh(2)]
    ax.unify(axis, [Symbol(20, "an output")])
    assert a.root.pinned == b.root.pinned == "an output"


def test_inner_factors_are_units_only_where_the_outer_one_is_told_apart():
    qkv = Symbol(3 * 4 * 5)
    three, heads, features = (part[0] for part in ax.split([qkv], (3, 4, 5)) or [])
    ax.pin([three], ax.PICKED_APART)
    ax.pin_inner([[qkv]])
    assert heads.root.pinned is None and features.root.pinned is not None
    plain = Symbol(12)
    outer, inner = (part[0] for part in ax.split([plain], (4, 3)) or [])
    ax.pin_inner([[plain]])
    assert outer.root.pinned is None and inner.root.pinned is not None


def test_as_many_as_are_chosen_from_an_axis_must_stay_in_what_it_becomes():
    one, other, third = Symbol(12), Symbol(12), Symbol(12)
    ax.require([one], 5)
    ax.require([third], 7)
    ax.unify([one], [other])
    ax.unify([other], [third])
    assert one.root is third.root and one.root.least == 7
    groups, inside = (part[0] for part in ax.split([one], (4, 3)) or [])
    assert groups.root.least == 3 and inside.root.least == 2, "three groups of three hold seven, so do four of two"
    later = Symbol(12)
    outer, _ = (part[0] for part in ax.split([later], (4, 3)) or [])
    ax.require([later], 4)
    assert outer.root.least == 2


def test_entries_of_a_concatenation_are_not_chosen_by_position():
    a, b, chosen = Symbol(4), Symbol(6), Symbol(10)
    ax.require([chosen], 2)
    ax.unify(ax.concat([[a], [b]]), [chosen])
    assert a.root.pinned and b.root.pinned
    cut = Symbol(10)
    ax.require([cut], 2)
    assert all(piece[0].pinned for piece in ax.cut([cut], (4, 6)) or [])


def test_axes_of_size_one_are_nothing():
    assert ax.fresh(1) == [] and ax.size_of([]) == 1
    assert ax.concat([[Symbol(0)], [leaf := Symbol(3)]]) == [leaf]
    assert torch.Size([ax.size_of(part) for part in ax.split([Symbol(6)], (1, 6, 1)) or []]) == (1, 6, 1)
