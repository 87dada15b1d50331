"""A module of a plan: the same modules, smaller dense tensors, and every attribute that stores a width made to fit."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.experts import as_batched_products, require_rows_for_grouped_products
from offload_trainer.groups.plan import Group, Groups, Plan, Slot
from offload_trainer.groups.widths import fit_widths


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

    Raises `UserError` when a module stores a width that no rule covers, or the groups are another model's.
    """
    for one in (groups, plan.groups):
        require_of(module, one)
    small: dict[str, Tensor] = {}
    for name, tensor in named_tensors(module).items():
        part = take(tensor.detach(), plan, name)
        small[name] = part if plan.slices(name) else part.clone()
    return rebuild(module, small, plan, groups)


def require_of(model: nn.Module, groups: Groups) -> None:
    """Raise `UserError` for groups of another model, or a model of which a slice would not train alike."""
    require_no_hooks(model)
    tensors = named_tensors(model)
    for name, shape in groups.shapes.items():
        here = tensors[name].shape if name in tensors else None
        if here != shape:
            there = "is not in this model" if here is None else f"is {tuple(here)} in this model"
            raise UserError(f"these groups are another model's: {name} is {tuple(shape)} in theirs and {there}")


def require_no_hooks(model: nn.Module) -> None:
    """Raise `UserError` for a hook on a parameter: it belongs to the full tensor, and a slice has none of it."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"{name} has a hook (register_hook, register_post_accumulate_grad_hook), which its slices would not"
                " have: remove it, and do in the loss or in the training loop what it does"
            )


def rebuild(module: nn.Module, tensors: Mapping[str, Tensor], plan: Plan, groups: Groups) -> nn.Module:
    """A copy of the module whose parameters and buffers are `tensors`, its width attributes fitted to the plan."""
    copied = with_tensors(module, tensors)
    fit_widths(copied, plan, groups)
    require_rows_for_grouped_products(copied)
    return copied


def sliced_groups(plan: Plan) -> Groups:
    """The groups of the sliced module of a plan: the same, of the units that are kept."""
    groups = tuple(
        replace(group, units=len(plan[group.name]), slots=tuple(_moved(slot, group, plan) for slot in group.slots))
        for group in plan.groups
    )
    return Groups(groups, {name: plan.shape(name) for name in plan.groups.shapes}, plan.groups.widths)


def _moved(slot: Slot, group: Group, plan: Plan) -> Slot:
    """Where the slot lies once the plan has sliced its axis."""
    index = plan.index(slot.tensor, slot.axis)
    if index is None:
        return slot
    first = slot.offset + int(plan[group.name][0]) * slot.block
    offset, start, end = torch.searchsorted(index, torch.tensor([slot.offset, first, first + slot.block])).tolist()
    return Slot(slot.tensor, slot.axis, end - start, offset)


def narrowed(model: nn.Module, groups: Groups, units: int, generator: torch.Generator) -> tuple[nn.Module, Groups]:
    """The same model with `units` units of every group (all where there are fewer), and its groups.

    The units are drawn at random. Parameters lie on the meta device: nothing is copied but buffers. Experts are
    computed as batched products, which take any width.
    """
    kept = {}
    for group in groups:
        count = min(group.units, max(units, group.least + 2))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    plan = Plan(groups, kept)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: torch.empty(plan.shape(name), dtype=old.dtype, device="meta")
        if name in parameters
        else take(old, plan, name)
        for name, old in named_tensors(model).items()
    }
    narrow = with_tensors(model, tensors)
    as_batched_products(narrow)
    fit_widths(narrow, plan, groups)
    return narrow, sliced_groups(plan)


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy in which each parameter and buffer is replaced. Ties survive: one tensor, one replacement.

    Raises `UserError` for a module that Python cannot copy (open files, `torch.nn.utils.weight_norm` of old).
    """
    memo: dict[int, Any] = {}
    for name, old in named_tensors(module).items():
        new = tensors[name]
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hooks = [hook for part in module.modules() for hook in part._forward_pre_hooks.values()]
        if any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
            reason += "; use torch.nn.utils.parametrizations instead of weight_norm and spectral_norm of old, and"
            reason += " prune.remove after pruning"
        raise UserError(f"{type(module).__name__} cannot be copied, as slicing it needs: {reason}") from error
