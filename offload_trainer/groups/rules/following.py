"""Which rule an op has, and what becomes of the positions that its tensors hold."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from offload_trainer.groups import axes as ax
from offload_trainer.groups.rules.call import RULES, Call, pin_all
from offload_trainer.groups.rules.elementwise import pointwise

_MOVING = ("view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "unsqueeze", "squeeze")
_MOVING += ("expand", "repeat", "clone", "detach", "alias", "slice", "select", "split", "unbind", "contiguous")
_PICKING = ("index", "_unsafe_index", "index_select", "gather")
_WRITING = ("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
_WRITING += ("index_add", "index_add_", "index_copy", "index_copy_")

CARRYING = {f"aten::{name}" for name in _MOVING + _PICKING}
"""Ops whose output holds entries of their first tensor."""
ADDRESSING = {f"aten::{name}" for name in (*_PICKING, *_WRITING, "embedding")}
"""Ops whose rules ask where the positions in their `index` or `indices` point (`Call.address`)."""


def rule_of(func: Any) -> Callable[[Call], None] | None:
    """The rule of an op: its own, or `pointwise` where torch tags the op, or what it does in place, as that."""
    name: str = func._overloadpacket._qualified_op_name
    if name in RULES:
        return RULES[name]
    packets = [func._overloadpacket]
    if name.startswith("aten::") and name.endswith("_"):
        packets.append(getattr(torch.ops.aten, name[6:-1], func._overloadpacket))
    # Tags belong to overloads, and not every overload of a pointwise op has it (`div.out`).
    tagged = any(torch.Tag.pointwise in getattr(packet, each).tags for packet in packets for each in packet.overloads())
    return pointwise if tagged else None


def follow(call: Call) -> bool:
    """Apply the op's rule; without one, pin all that the op touches and return False if that cost anything."""
    rule = rule_of(call.func)
    harmless = True
    if rule is not None:
        rule(call)
    else:
        harmless = all(ax.is_pinned(axis) for tensor in call.tensors() for axis in call.axes_of(tensor))
        pin_all(call, f"{call.name} has no rule")
    _follow_positions(call)
    return harmless


def _follow_positions(call: Call) -> None:
    """Positions that are only moved still point where they did; an axis whose positions are computed with is pinned."""
    addresses = [leaf for name in ("index", "indices") for leaf in tree_leaves(call[name])]
    for tensor in call.tensors():
        target = call.axes.target(tensor)
        if target is None:
            continue
        if call.name in CARRYING and tensor is call.input:
            for out in call.outputs():
                call.axes.point(out, target)
        elif call.name not in ADDRESSING or not any(tensor is address for address in addresses):
            ax.pin(target, f"{call.name} computes with positions in it")
