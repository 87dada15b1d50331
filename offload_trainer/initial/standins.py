"""Kept units stand in for the ones left out: what those contributed, as far as the kept ones can tell it.

A layer y = W x loses W_R x_R with features R of its input. Features are correlated, so a good part of that can be had
from the features S that stay: with C = E x xᵀ over calibration batches, W_R C_RS (C_SS + Λ)⁻¹ added to W_S is nearest,
by ridge regression. The layer keeps its shape, and nothing is added to the export. (The least squares of Optimal Brain
Surgeon, Hassibi & Stork 1993, for all left-out units of a layer at once.)

The left-out weights stay where they are, so the full master counts twice what the kept ones have taken over.

Only linear layers take part, and not where a norm reduces over the units, whose scale changes with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.readers import Reader, find_readers
from offload_trainer.initial.importance import means_over_inputs
from offload_trainer.offloader import LossFn

RIDGE = 0.1
"""Λ, for each feature relative to its mean square: a few batches do not tell all of C, and a few features are huge."""
AT_ONCE = 2 * 2**30
"""Bytes that the products x xᵀ of some layers may take; for the others the batches pass through the model again."""


def stand_in(
    model: nn.Module,
    master: Mapping[str, Tensor],
    plan: Plan,
    batches: Sequence[Any],
    loss_fn: LossFn,
    accelerator: Accelerator,
) -> int:
    """Changes, in the master, the weights by which layers read the plan's kept units. Returns how many layers.

    `batches` are this rank's own. The model may lie in host memory, larger than the device.
    """
    readers = linear_readers(model, plan.groups)
    readers = [reader for reader in readers if plan.index(reader.weight, reader.axis) is not None]
    changed = 0
    for part in in_parts(readers, plan.groups):
        products = means_over_inputs(model, part, batches, loss_fn, accelerator, of=lambda x: x.T @ x)
        for reader in part:
            kept = plan.index(reader.weight, reader.axis)
            # One that is never called is not there: its weight is read elsewhere.
            if kept is None or reader.path not in products:
                continue
            _absorb(master[reader.weight], reader.axis, products.pop(reader.path), kept)
            changed += 1
    return changed


def linear_readers(model: nn.Module, groups: Groups) -> list[Reader]:
    """The layers that can: linear, with a trained weight that no other reads, of units that no norm reduces over."""
    owners = {}
    for path, module in model.named_modules():
        owners |= {f"{path}.{name}".lstrip("."): module for name, _ in module.named_parameters(recurse=False)}
    plain = (nn.Linear, Conv1D, nn.modules.conv._ConvNd, _BatchNorm)
    reduced = {
        group.name
        for group in groups
        for slot in group.slots
        if len(groups.shapes[slot.tensor]) == 1 and slot.tensor in owners and not isinstance(owners[slot.tensor], plain)
    }
    found = [reader for reader in find_readers(model, groups) if reader.features == -1]
    weights = [reader.weight for reader in found]
    embeddings = {name for name, module in owners.items() if isinstance(module, nn.Embedding)}
    return [
        reader
        for reader in found
        if weights.count(reader.weight) == 1
        and owners[reader.weight].weight.requires_grad
        and reader.weight not in embeddings
        and not {group.name for group, _ in groups.by_tensor[reader.weight][reader.axis]} & reduced
    ]


def in_parts(readers: Sequence[Reader], groups: Groups) -> Iterator[list[Reader]]:
    """As many at once as `AT_ONCE` allows, at least one."""
    part: list[Reader] = []
    for reader in readers:
        if part and sum(product_bytes(one, groups) for one in (*part, reader)) > AT_ONCE:
            yield part
            part = []
        part.append(reader)
    if part:
        yield part


def product_bytes(reader: Reader, groups: Groups) -> int:
    """Of x xᵀ, in float32."""
    return 4 * groups.shapes[reader.weight][reader.axis] ** 2


def scratch_bytes(model: nn.Module, plan: Plan) -> tuple[int, int]:
    """On the host, and on the device, at most."""
    groups, host, device = plan.groups, 0, 0
    readers = [r for r in linear_readers(model, groups) if plan.index(r.weight, r.axis) is not None]
    for part in in_parts(readers, groups):
        for reader in part:
            features, kept = groups.shapes[reader.weight][reader.axis], plan.shape(reader.weight)[reader.axis]
            solving = 8 * kept * (2 * features + 2 * kept) + 4 * kept * features
            weights = 4 * groups.shapes[reader.weight].numel() + 8 * plan.shape(reader.weight).numel()
            host = max(host, sum(product_bytes(one, groups) for one in part) + solving + weights)
            device = max(device, product_bytes(reader, groups))
    return host, device


@torch.no_grad()
def _absorb(weight: Tensor, axis: int, products: Tensor, kept: Tensor) -> None:
    """weight: full size, changed in place where its `axis` is kept. products: (n, n), C. kept: indices on the axis."""
    left_out = torch.ones(len(products), dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
    among = products[kept][:, kept].double()
    squares = among.diagonal().clone()
    if not bool(squares.any()):
        return  # nothing that stays ever says anything
    among.diagonal().add_(RIDGE * squares + 1e-6 * squares.mean())
    shares = torch.linalg.solve(among, products[kept][:, left_out].double()).float()  # (kept, left out)
    taken = weight.index_select(axis, left_out).float().movedim(axis, -1) @ shares.T  # (others, kept)
    new = weight.index_select(axis, kept).float() + taken.movedim(-1, axis)
    weight.index_copy_(axis, kept, new.to(weight.dtype))
