"""The proof that a model is sliced rightly: sliced output = the full model's output with the same units gated to zero.

The gated model (`groups.gating`) is never sliced, so the two agree only if groups, slots and width rules are right.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.gating import Gate
from offload_trainer.groups.plan import Group, Groups, Plan
from offload_trainer.groups.running import Inputs, is_floating, map_inputs, run_model, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, slice_module, with_tensors
from offload_trainer.groups.tracing import plain_attention


def verify_groups(
    model: nn.Module,
    groups: Groups,
    example_inputs: Inputs,
    *,
    plans: int = 3,
    seed: int = 0,
    tolerance: float = 2e-4,
) -> float:
    """Raise `UserError`, naming the first module whose output differs, unless sliced equals gated on random plans.

    Runs on the CPU in float32 on random weights (zeros at initialisation would hide a wrong slot), so it works for a
    model on the meta device and costs one temporary copy of the model. `tolerance` is relative to the largest output;
    a group on which the outputs do not depend by more than it is an error as well: it would pass for anything.
    Returns the largest relative difference seen.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(model)
    full = with_tensors(model, {name: _float_copy(tensor) for name, tensor in tensors.items()}).eval()
    # Random wherever it matters: parameters, buffers that are sliced, and what has no values yet.
    drawn = {n for n, t in tensors.items() if isinstance(t, nn.Parameter) or t.is_meta or n in groups.by_tensor}
    drawn = {name for name in drawn if is_floating(tensors[name])}
    inputs = map_inputs(_float_copy, example_inputs)
    unseen = {group.name: group for group in groups}
    worst = 0.0
    with plain_attention():
        for _ in range(plans):
            _randomise(full, drawn, generator)
            for name in _reached(full, unseen, groups, inputs, tolerance, generator):
                del unseen[name]
            plan = random_plan(groups, generator, spread=0.3)
            worst = max(worst, _verify(full, plan, groups, inputs, tolerance))
    for name, group in unseen.items():
        raise UserError(
            f"the model's outputs do not depend on group {name!r} (first slot {group.slots[0]}) with random weights "
            "and these inputs, so nothing shows that it is sliced rightly"
        )
    return worst


def random_plan(groups: Groups, generator: torch.Generator, keep: float = 0.5, *, spread: float = 0.0) -> Plan:
    """About `keep` of each group's units, at least one, chosen at random; for each group its own ratio ± `spread`."""
    kept = {}
    for group in groups:
        ratio = keep + spread * (2 * torch.rand((), generator=generator).item() - 1)
        count = min(group.units, max(1, round(ratio * group.units)))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return Plan(groups, kept)


def _reached(
    full: nn.Module,
    unseen: Mapping[str, Group],
    groups: Groups,
    inputs: Inputs,
    tolerance: float,
    generator: torch.Generator,
) -> list[str]:
    """Those of the unseen groups that the outputs depend on: to first order, or when half of their units are gated."""
    names = {id(tensor): name for name, tensor in named_tensors(full).items()}
    reach: dict[str, float] = defaultdict(float)

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        effect = (parameter.grad * parameter.detach()).nan_to_num()
        parameter.grad = None  # one gradient at a time: no second copy of the model
        for axis, entries in groups.by_tensor.get(names[id(parameter)], {}).items():
            for group, slot in entries:
                part = effect.narrow(axis, slot.offset, group.units * slot.block)
                reach[group.name] = max(reach[group.name], part.norm().item())

    floating = [parameter for parameter in full.parameters() if is_floating(parameter)]
    handles = [parameter.requires_grad_().register_post_accumulate_grad_hook(note) for parameter in floating]
    outputs = _floats(run_watched(full, inputs, "the model does not run on random weights"))
    finite = [output.masked_fill(~output.isfinite(), 0) for output in outputs]  # masked logits are infinite
    scale = max((output.detach().abs().max().item() for output in finite), default=0.0)
    if scale == 0 or any(output.isnan().any() for output in outputs):
        raise UserError("the model's outputs are zero or not a number on random weights, so nothing can be verified")
    with suppress(RuntimeError):  # outputs without a gradient: gating has to tell
        noise = [torch.randn(output.shape, generator=generator) for output in finite]
        torch.stack([(output * other).sum() for output, other in zip(finite, noise, strict=True)]).sum().backward()
    for handle in handles:
        handle.remove()
    full.requires_grad_(False)
    reached = [name for name in unseen if reach[name] > tolerance * scale]
    for name in unseen.keys() - reached:
        half = Plan(groups, {name: torch.arange((groups[name].units + 1) // 2)})
        with torch.no_grad(), Gate(full, half, groups):
            gated = _floats(run_model(full, inputs))
        if any(_difference(mine, theirs) > tolerance for mine, theirs in zip(gated, outputs, strict=True)):
            reached.append(name)
    return reached


def _floats(outputs: Any) -> list[Tensor]:
    return [output for output in tensors_of(outputs) if is_floating(output) and output.numel()]


@torch.no_grad()
def _verify(full: nn.Module, plan: Plan, groups: Groups, inputs: Inputs, tolerance: float) -> float:
    mine = _record(slice_module(full, plan, groups), inputs)
    with Gate(full, plan, groups) as gate:
        theirs = _record(full, inputs)
    result, expected = mine[-1][1], theirs[-1][1]
    if len(result) != len(expected):
        raise UserError(f"a sliced subnetwork returns {len(result)} tensors, the full model {len(expected)}")
    worst = max(_difference(one, other) for one, other in zip(result, expected, strict=True))
    if not worst <= tolerance:
        where = next(
            path
            for (path, ours), (_, others) in zip(mine, theirs, strict=False)
            for one, other in zip(ours, others, strict=False)
            if not _difference(one, gate.kept_part(other)) <= tolerance
        )
        raise UserError(
            f"sliced and gated outputs differ by {worst:.1e} of the largest value, first seen in "
            f"{where or 'the output alone'}: a slot or a width rule of this model is wrong or missing"
        )
    return worst


def _record(model: nn.Module, inputs: Inputs) -> list[tuple[str, list[Tensor]]]:
    """The outputs of every call of a module, by path, in order; the model's own last, as path ""."""
    seen: list[tuple[str, list[Tensor]]] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: seen.append((path, tensors_of(output))))
        for path, module in model.named_modules()
    ]
    try:
        run_watched(model, inputs, "a sliced subnetwork of this model does not run")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes disagree or one is not a number."""
    if mine.shape != theirs.shape:
        return float("inf")
    if not is_floating(mine) or mine.numel() == 0:
        return 0.0 if torch.equal(mine, theirs) else float("inf")
    mine, theirs = mine.double(), theirs.double()
    gap = (mine - theirs).abs().masked_fill(mine == theirs, 0.0)  # equal infinities: masked logits
    scale = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
    gap = torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf"))
    return gap.max().item() / max(scale, 1e-12)


def _float_copy(tensor: Tensor) -> Tensor:
    """On the CPU, floating-point values as float32; zeros for what lies on the meta device."""
    tensor = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu().clone()
    return tensor.float() if is_floating(tensor) else tensor


def _randomise(model: nn.Module, names: Collection[str], generator: torch.Generator) -> None:
    """Weights as He et al. (2015) initialise them and small biases: the end of a deep network hears its beginning."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for name, tensor in named_tensors(model).items():
        if name not in names:
            continue
        value = tensor.data.normal_(generator=generator)
        if tensor.ndim > 1:
            fan_in = tensor[0].numel() if id(tensor) in convolutions else max(tensor.shape[1:])
            value.mul_((2 / max(1, fan_in)) ** 0.5)
        elif name.endswith(("bias", "mean")):
            value.div_(4)
        else:  # scales and variances: away from zero, and variances positive
            sign = value.sign() if isinstance(tensor, nn.Parameter) else 1
            value.uniform_(0.5, 1.5, generator=generator).mul_(sign)
