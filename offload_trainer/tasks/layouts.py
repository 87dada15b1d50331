"""Where stored tensors go in a transformers model, by transformers' own tables of older names and layouts.

transformers keeps the experts of a layer in one tensor, which most files hold as a tensor per expert and projection.
Merging them needs no memory: each stored tensor is a region of the model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from offload_trainer.files.reading import Stored

Region = tuple[int | slice, ...]
"""Index of a part of a tensor: `tensor[region]`; () is all of it."""


@dataclass(frozen=True)
class Place:
    """A region of a tensor of the model."""

    name: str
    region: Region = ()


def places(stored: Sequence[Stored], model: Any, tensors: Mapping[str, Tensor]) -> list[Place | None]:
    """For each stored tensor its place among the model's `tensors`; None for one that has none.

    A merged tensor of which parts are not stored, or one too many, counts as having no place for any of them.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    found: dict[str, Place] = {}
    merged: dict[str, dict[str, list[Stored]]] = {}  # name in the model → pattern in the files → parts in order
    # The order in which transformers meets the names counts for some renamings, and for the numbers of experts.
    for one in sorted(stored, key=lambda one: dot_natural_key(one.name)):
        name, pattern = rename_source_key(one.name, renamings, converters, model.base_model_prefix, dict(tensors))
        if name not in tensors and one.name in tensors:
            name, pattern = one.name, None  # stored as the model has it, though a rename would apply
        if name not in tensors:
            continue
        if pattern is None:
            found[one.name] = Place(name)
        else:
            merged.setdefault(name, {}).setdefault(pattern, []).append(one)
    for name, parts in merged.items():
        converter = next(entry for entry in converters if set(parts) <= set(entry.source_patterns))
        found |= _merge(
            name, tensors[name], [parts.get(pattern, []) for pattern in converter.source_patterns], converter
        )
    return [found.get(one.name) for one in stored]


def _merge(name: str, tensor: Tensor, parts: list[list[Stored]], converter: WeightConverter) -> dict[str, Place]:
    """The places of the parts of one tensor: of experts (axis 0) each with its projections one after the other."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) or tensor.ndim < 2:
        return {}
    experts = tensor.shape[0]
    widths = [pattern[0].shape[0] if pattern and pattern[0].shape else 0 for pattern in parts]
    if any(len(pattern) != experts for pattern in parts) or sum(widths) != tensor.shape[1]:
        return {}
    found: dict[str, Place] = {}
    for i, pattern in enumerate(parts):
        start = sum(widths[:i])
        for expert, one in enumerate(pattern):
            found[one.name] = Place(name, (expert, slice(start, start + widths[i])))
    return found
