"""Names of groups, from the modules that produce their units."""

from collections import Counter
from collections.abc import Mapping
from itertools import takewhile

import torch

from offload_trainer.groups.axes import Symbol
from offload_trainer.groups.plan import Group, Slot


def name_groups(found: Mapping[Symbol, list[Slot]], shapes: Mapping[str, torch.Size]) -> tuple[Group, ...]:
    """One group per leaf.

    A stream that blocks add to is `residual` (`residual.<first producer>` where a model has several); any other group
    bears the name of the module that produces its units, or of the module that holds all of several producers
    (`layers.0.mlp` for gate and up). Experts are named after their router.
    """
    streams = sum(_is_stream(leaf, slots, shapes) for leaf, slots in found.items())
    groups: list[Group] = []
    taken: Counter[str] = Counter()
    for leaf, slots in found.items():
        producers = _producers(slots, shapes, chosen=leaf.chosen)
        if _is_stream(leaf, slots, shapes):
            name = "residual" if streams == 1 else f"residual.{producers[0]}"
        else:
            name = _shared_module(producers)
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append(Group(name, leaf.size, tuple(slots), leaf.least, leaf.chosen))
    return tuple(groups)


def _is_stream(leaf: Symbol, slots: list[Slot], shapes: Mapping[str, torch.Size]) -> bool:
    # Rotary embeddings add heads to heads: there a unit is a block of features.
    blocks = {slot.block for slot in slots if slot.axis == 0 and len(shapes[slot.tensor]) > 1}
    return leaf.residual and len(_producers(slots, shapes)) > 1 and blocks <= {1}


def _producers(slots: list[Slot], shapes: Mapping[str, torch.Size], *, chosen: bool = False) -> list[str]:
    """Modules whose weight has the units on its output axis; norms and biases only if there is nothing else.

    chosen: units that are chosen by position: of the router that scores them, not the stacks that are then read.
    """
    matrices = [slot.tensor for slot in slots if len(shapes[slot.tensor]) > 1]
    if chosen:
        stacks = {_module(tensor) for tensor in matrices if len(shapes[tensor]) > 2}
        matrices = [tensor for tensor in matrices if _module(tensor) not in stacks] or matrices
    first = {tensor: min(slot.axis for slot in slots if slot.tensor == tensor) for tensor in matrices}
    produced = [tensor for tensor in dict.fromkeys(matrices) if first[tensor] == 0]
    best = produced or matrices or [slot.tensor for slot in slots]
    return list(dict.fromkeys(_module(tensor) for tensor in best))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _shared_module(modules: list[str]) -> str:
    """The innermost module that holds all of them."""
    if len(modules) == 1:
        return modules[0]
    levels = takewhile(
        lambda level: len(set(level)) == 1, zip(*(module.split(".") for module in modules), strict=False)
    )
    return ".".join(level[0] for level in levels) or modules[0]
