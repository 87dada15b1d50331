"""How much each unit of a pretrained model contributes, measured on a few batches of the user's own data.

A unit is seen by the layers that read it. What such a layer, y = W x, loses without unit u is W restricted to u's
columns times x restricted to u's features; the mean square of that, features taken as uncorrelated, is
Σ_{j∈u} ‖W_{:,j}‖² · E x_j². (Wanda, Sun et al. 2023, scores single weights by the same product |W_ij| · ‖x_j‖.)
Divided by its sum over the layer, it is the share of the layer's output that u accounts for. A unit's score is the
mean share over its readers, so scores compare between layers of a kind.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from offload_trainer.device import ranks
from offload_trainer.errors import UserError
from offload_trainer.evaluation import streamed
from offload_trainer.groups import Groups
from offload_trainer.groups.readers import Reader, find_readers, read_slots
from offload_trainer.offloader import LossFn


def importance(
    model: nn.Module,
    groups: Groups,
    names: Iterable[str],
    batches: Sequence[Any],
    loss_fn: LossFn,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], list[str]]:
    """Name of each of the groups → (units,) float32 scores on the CPU; and the groups judged by their weights alone.

    A group is judged by weights alone where no linear or convolution layer reads it: the score is the share of its
    matrices' squared norm. `batches` are this rank's own; the model may lie in host memory, larger than the device.
    """
    readers = find_readers(model, groups)
    read = {name: read_slots(readers, groups, name) for name in names}
    watched = {reader.path: reader for pairs in read.values() for reader, _ in pairs}
    squares = means_over_inputs(model, list(watched.values()), batches, loss_fn, accelerator, of=_squares)
    tensors = dict(model.named_parameters())
    scores = {}
    for name, pairs in read.items():
        pairs = [(reader, slot) for reader, slot in pairs if reader.path in squares]
        shares = [(slot, _share(tensors[slot.tensor], slot.axis, squares[reader.path])) for reader, slot in pairs]
        if not pairs:
            read[name] = []
            slots = [slot for slot in groups.slots(name) if slot.tensor in tensors]
            matrices = [slot for slot in slots if tensors[slot.tensor].ndim > 1]
            shares = [(slot, _share(tensors[slot.tensor], slot.axis, None)) for slot in matrices or slots]
        units = groups[name].units
        per_unit = [
            share.narrow(0, slot.offset, units * slot.block).view(units, slot.block).sum(1) for slot, share in shares
        ]
        scores[name] = torch.stack(per_unit).mean(0).float()
        if not bool(scores[name].isfinite().all()):
            raise UserError(
                f"the importance of group {name!r} is not finite: a weight that reads it, or what the model computes on"
                " the calibration batches, is not"
            )
    return scores, [name for name, pairs in read.items() if not pairs]


@torch.no_grad()
def means_over_inputs(
    model: nn.Module,
    readers: list[Reader],
    batches: Sequence[Any],
    loss_fn: LossFn,
    accelerator: Accelerator,
    *,
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Path of each reader → what `of` makes of its inputs x, (rows, features), per row: a mean over all ranks, on the
    CPU. `of` sums over the rows it is given. A reader that is never given any is left out."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((reader.path for reader in readers), 0)

    def watch(reader: Reader) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (inputs[0] if inputs else next(iter(named.values()))).detach().movedim(reader.features, -1)
            x = x.reshape(-1, x.shape[-1]).float()  # (rows, features)
            total = of(x).cpu()
            sums[reader.path] = sums[reader.path].add_(total) if reader.path in sums else total
            counts[reader.path] += len(x)

        return add

    with streamed(model, accelerator) as module:
        training = module.training
        module.eval()
        handles = [module.get_submodule(r.path).register_forward_pre_hook(watch(r), with_kwargs=True) for r in readers]
        for batch in batches:
            loss_fn(module, send_to_device(batch, accelerator.device))
        for handle in handles:
            handle.remove()
        module.train(training)
    # A rank whose batches did not reach a reader takes its part in the mean all the same.
    everywhere = ranks.gather(accelerator, {path: (total.shape, total.dtype) for path, total in sums.items()})
    means = {}
    for path, (shape, dtype) in {path: like for found in everywhere for path, like in found.items()}.items():
        total = sums.pop(path, None)
        total = (torch.zeros(shape, dtype=dtype) if total is None else total).to(accelerator.device)  # to be exchanged
        rows = torch.tensor(counts[path], dtype=dtype, device=accelerator.device)
        ranks.average_(accelerator, [total, rows])
        if rows:
            means[path] = total.div_(rows).cpu()
    return means


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(0).double()


def _share(weight: Tensor, axis: int, squares: Tensor | None) -> Tensor:
    """(size of the axis,) float64, sum 1: ‖W restricted to an element of the axis‖², times the mean of x² if given."""
    weight, others = weight.detach(), [other for other in range(weight.ndim) if other != axis]
    kind = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight, dim=others, dtype=kind) if others else weight.abs()
    energy = norms.double().square()
    if squares is not None:
        energy = energy * squares
    return energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
