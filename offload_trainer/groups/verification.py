"""The proof that a model is sliced rightly: sliced output = the full model's output with the same units gated to zero.

The gated model (`groups.gating`) is never sliced, so the two agree only if groups, slots and width rules are right.
"""

from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from offload_trainer.errors import UserError
from offload_trainer.groups.gating import Gate
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.running import Inputs, is_floating, run_model, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, slice_module, with_tensors
from offload_trainer.groups.tracing import plain_attention

_BROKEN = "a sliced subnetwork of this model does not run"


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
    full = with_tensors(model, _random_tensors(model, groups, generator)).eval()
    inputs = tree_map(lambda x: _on_cpu(x) if isinstance(x, Tensor) else x, example_inputs)
    with plain_attention():
        _require_reach(full, groups, inputs, tolerance, generator)
        uneven = (random_plan(groups, generator, spread=0.3) for _ in range(plans))
        return max(_verify(full, plan, groups, inputs, tolerance) for plan in uneven)


def random_plan(groups: Groups, generator: torch.Generator, keep: float = 0.5, *, spread: float = 0.0) -> Plan:
    """About `keep` of each group's units, at least one, chosen at random; for each group its own ratio ± `spread`."""
    kept = {}
    for group in groups:
        ratio = keep + spread * (2 * torch.rand((), generator=generator).item() - 1)
        count = min(group.units, max(1, round(ratio * group.units)))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return Plan(groups, kept)


def _require_reach(
    full: nn.Module, groups: Groups, inputs: Inputs, tolerance: float, generator: torch.Generator
) -> None:
    """Raise unless the outputs depend on every group, to first order or when half of it is gated."""
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

    for parameter in full.parameters():
        parameter.requires_grad_(is_floating(parameter))
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    outputs = tensors_of(run_watched(full, inputs, "the model does not run on random weights"))
    outputs = [output for output in outputs if is_floating(output) and output.numel()]
    finite = [output.masked_fill(~output.isfinite(), 0) for output in outputs]
    scale = max((output.detach().abs().max().item() for output in finite), default=0.0)
    if scale == 0 or any(output.isnan().any() for output in outputs):
        raise UserError("the model's outputs are zero or not a number on random weights, so nothing can be verified")
    with suppress(RuntimeError):  # outputs without a gradient: gating has to tell
        sum((torch.randn(output.shape, generator=generator) * output).sum() for output in finite).backward()
    full.requires_grad_(False)
    for group in groups:
        if reach[group.name] > tolerance * scale:
            continue
        with Gate(full, Plan(groups, {group.name: torch.arange((group.units + 1) // 2)}), groups), torch.no_grad():
            gated = [output for output in tensors_of(run_model(full, inputs)) if is_floating(output) and output.numel()]
        if all(_difference(mine, theirs) <= tolerance for mine, theirs in zip(gated, outputs, strict=True)):
            raise UserError(
                f"the model's outputs do not depend on group {group.name!r} (first slot {group.slots[0]}) with random "
                "weights and these inputs, so nothing shows that it is sliced rightly"
            )


@torch.no_grad()
def _verify(full: nn.Module, plan: Plan, groups: Groups, inputs: Inputs, tolerance: float) -> float:
    sliced = slice_module(full, plan, groups)
    by_module: dict[str, list[list[Tensor]]] = defaultdict(list)
    handles = _hook(sliced, lambda path, output: by_module[path].append(tensors_of(output)))
    result = tensors_of(run_watched(sliced, inputs, _BROKEN))
    gate = Gate(full, plan, groups)
    differing: list[str] = []

    def compare(path: str, output: Any) -> None:
        """Note the first module whose gated output, or what is kept of it, is not the sliced one's."""
        mine, theirs = by_module[path].pop(0) if by_module[path] else [], tensors_of(output)
        if not differing and len(mine) == len(theirs):
            differing.extend(
                path
                for one, other in zip(mine, theirs, strict=True)
                if not _difference(one, gate.kept_part(other)) <= tolerance
            )

    handles += _hook(full, compare)
    with gate:
        expected = tensors_of(run_model(full, inputs))
    for handle in handles:
        handle.remove()
    if len(result) != len(expected):
        raise UserError(f"a sliced subnetwork returns {len(result)} tensors, the full model {len(expected)}")
    worst = max(_difference(mine, theirs) for mine, theirs in zip(result, expected, strict=True))
    if not worst <= tolerance:
        where = f"first seen in {differing[0] or 'the output'}" if differing else "seen in the output alone"
        raise UserError(
            f"sliced and gated outputs differ by {worst:.1e} of the largest value, {where}: "
            "a slot or a width rule of this model is wrong or missing"
        )
    return worst


def _hook(model: nn.Module, seen: Any) -> list[Any]:
    """Call `seen(path, output)` after the forward of every module."""
    return [
        module.register_forward_hook(lambda _, __, output, path=path: seen(path, output))
        for path, module in model.named_modules()
    ]


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


def _on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if is_floating(tensor) else tensor


def _random_tensors(model: nn.Module, groups: Groups, generator: torch.Generator) -> dict[str, Tensor]:
    """Random where it matters: parameters, buffers that are sliced, and what has no values yet (the meta device)."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        shape = tensor.shape
        kept = not isinstance(tensor, nn.Parameter) and name not in groups.by_tensor and not tensor.is_meta
        if kept or not is_floating(tensor):
            tensors[name] = torch.zeros(shape, dtype=tensor.dtype) if tensor.is_meta else _on_cpu(tensor).clone()
        elif tensor.ndim > 1:
            fan_in = tensor[0].numel() if id(tensor) in convolutions else max(shape[1:])
            tensors[name] = torch.randn(shape, generator=generator) / max(1, fan_in) ** 0.5
        else:  # scales, biases, means and variances alike
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
    return tensors
