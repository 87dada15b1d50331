"""A module of a plan: the same modules, smaller dense tensors, and every attribute that stores a width made to fit."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Groups, Plan

WIDTHS: dict[type, dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._BatchNorm: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_groups": ("weight", 0), "num_channels": ("weight", 0)},
    nn.LayerNorm: {"normalized_shape": ("weight", -1)},
    nn.RMSNorm: {"normalized_shape": ("weight", -1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}
"""Module type → {attribute: (tensor, axis)}: the attribute scales as that axis of that tensor does.

Convolutions need a look at `groups` first: `_convolution_widths`. Models add their own types with
`find_groups(…, widths={Attention: {"num_heads": ("qkv.weight", 0)}})`; names are relative to the module.
"""


def take(tensor: Tensor, plan: Plan, name: str) -> Tensor:
    """The part of a full-size tensor that the plan keeps: a new tensor, or the same one when all of it is kept."""
    for axis, index in enumerate(plan.indices(name)):
        if index is not None:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, in the module's order; tied ones once, under their first name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def slice_module(module: nn.Module, plan: Plan, groups: Groups) -> nn.Module:
    """The sliced module of a plan, with tensors of its own. Nothing full-size is copied on the way.

    Raises `UserError` when a module stores a width that no rule covers.
    """
    small = {name: take(tensor.detach(), plan, name) for name, tensor in named_tensors(module).items()}
    full = named_tensors(module)
    small = {
        name: tensor.clone() if tensor.data_ptr() == full[name].data_ptr() else tensor for name, tensor in small.items()
    }
    return rebuild(module, small, plan, groups)


def rebuild(module: nn.Module, tensors: Mapping[str, Tensor], plan: Plan, groups: Groups) -> nn.Module:
    """A copy of the module whose parameters and buffers are `tensors`, its width attributes fitted to the plan."""
    copied = with_tensors(module, tensors)
    fit_widths(copied, plan, groups)
    return copied


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy in which each parameter and buffer is replaced. Ties survive: one tensor, one replacement."""
    memo: dict[int, Any] = {}
    for name, old in named_tensors(module).items():
        new = tensors[name]
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    return copy.deepcopy(module, memo)


def fit_widths(module: nn.Module, plan: Plan, groups: Groups) -> None:
    """Rescale, in place, every attribute that stores a width of an axis the plan slices."""
    canonical = _canonical_names(module)
    for path, child in module.named_modules():
        for attribute, (tensor, axis) in _rules_for(child, groups).items():
            name = canonical.get(f"{path}.{tensor}" if path else tensor)
            if name is None:
                continue  # an affine-free norm, a tensor that this instance does not have
            full = groups.shapes[name]
            before, after = full[axis], plan.shape(name)[axis]
            if before != after:
                setattr(child, attribute, _scaled(getattr(child, attribute), before, after, f"{path}.{attribute}"))


def _canonical_names(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    both = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in both:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _rules_for(module: nn.Module, groups: Groups) -> Mapping[str, tuple[str, int]]:
    for kind in type(module).__mro__:
        if kind in groups.widths:
            return groups.widths[kind]
        if kind in WIDTHS:
            return WIDTHS[kind]
        if kind is nn.modules.conv._ConvNd:
            return _convolution_widths(module)
    return {}


def _convolution_widths(module: nn.Module) -> Mapping[str, tuple[str, int]]:
    into, out = (0, 1) if getattr(module, "transposed", False) else (1, 0)
    if module.groups == 1:
        return {"in_channels": ("weight", into), "out_channels": ("weight", out)}
    # Whole convolution groups are units: everything scales with their number, which axis 0 holds.
    return {"in_channels": ("weight", 0), "out_channels": ("weight", 0), "groups": ("weight", 0)}


def _scaled(value: Any, before: int, after: int, where: str) -> Any:
    """`value` × after / before; the last entry of a tuple (`normalized_shape`)."""
    if isinstance(value, tuple | list):
        return (*value[:-1], _scaled(value[-1], before, after, where))
    scaled, rest = divmod(value * after, before)
    if rest:
        raise UserError(
            f"{where} ({value}) does not scale to a whole number when its axis goes from {before} to {after}"
        )
    return scaled
