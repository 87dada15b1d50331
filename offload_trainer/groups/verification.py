"""The proof that a model is sliced rightly: sliced output = the full model's output with the same units gated to zero.

The gated model is the full one, run op by op: every parameter and buffer enters with its dropped units zero, and
whatever reduces over a sliced axis (a norm over the residual stream) is computed over the kept units alone.
That path never slices a module, so the two agree only if groups, slots and width rules are all right.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload_trainer.errors import UserError
from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis, Symbol
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.rules import Call
from offload_trainer.groups.running import Inputs, is_floating, run_model, run_watched, tensors_of
from offload_trainer.groups.slicing import named_tensors, slice_module, with_tensors
from offload_trainer.groups.tracing import Axes, plain_attention

REDUCTIONS = {
    f"aten::{name}"
    for name in (
        "mean",
        "sum",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "amax",
        "amin",
        "norm",
        "linalg_vector_norm",
    )
} | {"aten::logsumexp", "aten::prod"}


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
    model on the meta device and costs one temporary copy of the model. `tolerance` is relative to the largest output.
    Returns the largest relative difference seen.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random_like(name, t, groups, generator) for name, t in named_tensors(model).items()}
    full = with_tensors(model, tensors).eval()
    inputs = tree_map(lambda x: _cpu(x) if isinstance(x, Tensor) else x, example_inputs)
    worst = 0.0
    for _ in range(plans):
        plan = random_plan(groups, generator)
        worst = max(worst, _verify(full, plan, groups, inputs, tolerance))
    return worst


def random_plan(groups: Groups, generator: torch.Generator, keep: float = 0.5) -> Plan:
    """About `keep` of each group's units, at least one, chosen at random."""
    kept = {}
    for group in groups:
        count = max(1, round(keep * group.units))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return Plan(groups, kept)


@torch.no_grad()
def _verify(full: nn.Module, plan: Plan, groups: Groups, inputs: Inputs, tolerance: float) -> float:
    sliced = slice_module(full, plan, groups)
    with plain_attention():
        by_module = _record(sliced, inputs)
        result = tensors_of(run_watched(sliced, inputs, "a sliced subnetwork of this model does not run"))
        gate = Gate(full, plan, groups)
        differing: list[str] = []
        handles = [
            module.register_forward_hook(
                lambda module, _, output, path=path: gate.compare(
                    output, by_module.get(path), path, differing, tolerance
                )
            )
            for path, module in full.named_modules()
            if path
        ]
        with gate:
            expected = tensors_of(run_model(full, inputs))
        for handle in handles:
            handle.remove()
    worst = 0.0
    for mine, theirs in zip(result, expected, strict=True):
        difference = _difference(mine, theirs)
        worst = max(worst, difference)
        if not difference <= tolerance:
            where = f"first seen in {differing[0]}" if differing else "seen in the output alone"
            raise UserError(
                f"sliced and gated outputs differ by {difference:.1e} of the largest value, {where}: "
                "a slot or a width rule of this model is wrong or missing"
            )
    return worst


def _record(sliced: nn.Module, inputs: Inputs) -> dict[str, list[Tensor]]:
    """The outputs of every module of the sliced model, by path."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, output, path=path: seen.__setitem__(path, tensors_of(output)) or None
        )
        for path, module in sliced.named_modules()
    ]
    try:
        run_watched(sliced, inputs, "a sliced subnetwork of this model does not run")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where shapes disagree or one is not finite."""
    if mine.shape != theirs.shape:
        return float("inf")
    if not is_floating(mine) or mine.numel() == 0:
        return 0.0 if torch.equal(mine, theirs) else float("inf")
    mine, theirs = mine.double(), theirs.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())  # equal infinities: masked logits
    gap = (mine - theirs).abs().masked_fill(same, 0.0)
    scale = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
    gap = torch.nan_to_num(gap, nan=float("inf"), posinf=float("inf"))
    return gap.max().item() / max(scale, 1e-12)


class Gate(TorchDispatchMode):
    """Runs a full-size model as the plan's gated one. Axes are followed as in tracing, starting from the groups."""

    def __init__(self, model: nn.Module, plan: Plan, groups: Groups):
        super().__init__()
        self._axes = Axes()
        self._plan = plan
        self._leaves: dict[str, Symbol] = {group.name: Symbol(group.units) for group in groups}
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        for name, tensor in named_tensors(model).items():
            self._axes[tensor] = [self._axis_of(groups, name, axis) for axis in range(tensor.ndim)]

    def _axis_of(self, groups: Groups, name: str, axis: int) -> Axis:
        """The axis as its slots describe it: runs of (group, block), what lies between them fixed."""
        size = groups.shapes[name][axis]
        slots = sorted(groups.by_tensor.get(name, {}).get(axis, ()), key=lambda entry: entry[1].offset)
        parts: list[Axis] = []
        position = 0
        for group, slot in slots:
            parts.append(ax.fresh(slot.offset - position, "fixed") if slot.offset > position else [Symbol(0)])
            parts.append([self._leaves[group.name], *ax.fresh(slot.block, "inside a unit")])
            position = slot.offset + group.units * slot.block
        parts.append(ax.fresh(size - position, "fixed") if size > position else [Symbol(0)])
        return ax.concat(parts)

    def kept(self, axis: Axis) -> Tensor | None:
        """Kept elements of an axis; None when all of it is."""
        units = {self._leaves[name].root: self._plan[name] for name in self._leaves}
        keep = torch.ones(ax.size_of(axis), dtype=torch.bool)
        for leaf, block, offset in ax.occurrences(axis):
            if leaf in units:
                mask = torch.zeros(leaf.size, dtype=torch.bool)
                mask[units[leaf]] = True
                keep[offset : offset + leaf.size * block] &= mask.repeat_interleave(block)
        return None if bool(keep.all()) else keep.nonzero().flatten()

    def _gated(self, tensor: Tensor) -> Tensor:
        gated = tensor.clone()
        for axis, index in enumerate(self._plan.indices(self._names[id(tensor)])):
            if index is not None:
                dropped = torch.ones(tensor.shape[axis], dtype=torch.bool)
                dropped[index] = False
                gated.index_fill_(axis, dropped.nonzero().flatten(), 0)
        self._axes[gated] = self._axes[tensor]
        return gated

    def compare(
        self, output: Any, sliced: list[Tensor] | None, path: str, differing: list[str], tolerance: float
    ) -> None:
        """Hook: note the module if the kept part of its gated output is not the sliced output."""
        gated = tensors_of(output)
        if differing or sliced is None or len(sliced) != len(gated):
            return
        for mine, theirs in zip(sliced, gated, strict=True):
            for axis, factors in enumerate(self._axes[theirs]):
                index = self.kept(factors)
                if index is not None:
                    theirs = theirs.index_select(axis, index)
            if not _difference(mine, theirs) <= tolerance:
                differing.append(path)
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(
            lambda x: self._gated(x) if isinstance(x, Tensor) and id(x) in self._names else x,
            (args, kwargs or {}),
        )
        name = func._overloadpacket._qualified_op_name
        out = self._over_kept(name, func, args, kwargs) if name in REDUCTIONS | {"aten::native_layer_norm"} else None
        out = func(*args, **kwargs) if out is None else out
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self._axes.follow(Call(func, args, kwargs, out, self._axes.__getitem__, self._axes.__setitem__))
        return out

    def _over_kept(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """A reduction over a sliced axis, over its kept units; None if it reduces over no sliced axis."""
        tensor = args[0]
        call = Call(func, args, kwargs, None, self._axes.__getitem__, self._axes.__setitem__)
        count = len(call["normalized_shape"]) if "layer_norm" in name else 0
        dims = list(range(tensor.ndim - count, tensor.ndim)) if count else call.dims(call["dim"], tensor.ndim)
        indices = {d: index for d in dims if (index := self.kept(self._axes[tensor][d])) is not None}
        if not indices:
            return None
        for d, index in indices.items():
            tensor = tensor.index_select(d, index)
        if not count:
            return func(tensor, *args[1:], **kwargs)
        shape = list(tensor.shape[tensor.ndim - count :])
        affine = []
        for parameter in (call["weight"], call["bias"]):
            for d, index in indices.items():
                parameter = parameter if parameter is None else parameter.index_select(d - tensor.ndim, index)
            affine.append(parameter)
        small, *statistics = func(tensor, shape, *affine, call["eps"])
        out = torch.zeros_like(args[0])
        out[tuple(torch.meshgrid(*[_all(indices.get(d), n) for d, n in enumerate(out.shape)], indexing="ij"))] = small
        return (out, *statistics)


def _all(index: Tensor | None, size: int) -> Tensor:
    return torch.arange(size) if index is None else index


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def _random_like(name: str, tensor: Tensor, groups: Groups, generator: torch.Generator) -> Tensor:
    """Random where it matters: parameters, and buffers that are sliced. Other buffers keep their values."""
    shape = tensor.shape
    if not is_floating(tensor):
        return torch.zeros(shape, dtype=tensor.dtype) if tensor.is_meta else _cpu(tensor).clone()
    if not isinstance(tensor, nn.Parameter) and name not in groups.by_tensor and not tensor.is_meta:
        return _cpu(tensor).float()
    if tensor.ndim > 1:
        fan_in = max(1, tensor[0].numel())
        return torch.randn(shape, generator=generator) / fan_in**0.5
    return torch.rand(shape, generator=generator) + 0.5  # scales, biases, means and variances alike
