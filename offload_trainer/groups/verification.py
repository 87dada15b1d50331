"""The proof that a model is sliced rightly: sliced output = the full model's output with the same units gated to zero.

The gated model (`groups.gating`) is never sliced, so the two agree only if groups, slots and width rules are right.
"""

from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.experts import as_batched_products
from offload_trainer.groups.gating import Gate
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.running import (
    Inputs,
    is_floating,
    map_inputs,
    plain_attention,
    run_model,
    run_watched,
    tensors_of,
)
from offload_trainer.groups.slicing import named_tensors, narrowed, require_of, slice_module, with_tensors

_MORE = 5
"""Further draws of weights, as long as there is a group on which the outputs have not depended yet."""
_FAILURE = "a sliced subnetwork of this model does not run"


def verify_groups(
    model: nn.Module,
    groups: Groups,
    example_inputs: Inputs,
    *,
    plans: int = 3,
    seed: int = 0,
    tolerance: float = 2e-4,
    narrow_above: int = 2**28,
) -> float:
    """Raise `UserError`, naming the first module whose output differs, unless sliced equals gated on random plans.

    Runs on the CPU in float32 on random weights (zeros at initialisation would hide a wrong slot), so it works for a
    model on the meta device and costs one temporary copy of the model. `tolerance` is relative to the largest output;
    a group on which the outputs do not depend by more than it is an error as well: it would pass for anything.
    Returns the largest relative difference seen.

    A model of more than `narrow_above` elements is not copied. In its place stands, for every plan another, the same
    model with 32 units of each group drawn at random (fewer, if that has more than a quarter of `narrow_above`): all
    its modules, layers and unsliced axes, sliced as a subnet is. What is proved is that this narrow model is sliced
    rightly by the same groups and width rules. A slot with a wrong axis, block or offset does not fit the narrow model
    either, or is as wrong in it, and so is a width without a rule. What could pass is what is wrong at the full width
    alone: a branch of forward that is taken at some sizes, a limit on one.
    """
    require_of(model, groups)
    generator = torch.Generator().manual_seed(seed)
    inputs = map_inputs(_float_copy, example_inputs)
    unseen = {group.name: group for group in groups}
    wide = sum(shape.numel() for shape in groups.shapes.values()) > narrow_above
    subject = None if wide else _Subject(model, groups)
    worst = 0.0

    def drawn() -> _Subject:
        made = subject or _Subject(*_narrow_model(model, groups, narrow_above // 4, generator), _FAILURE)
        made.randomise(generator)
        return made

    def prove(on: _Subject) -> float:
        for name in _reached(on, unseen.keys(), inputs, tolerance, generator) if unseen else ():
            del unseen[name]
        return _verify(on, random_plan(on.groups, generator, spread=0.3), inputs, tolerance)

    with plain_attention():
        for number in range(plans + _MORE):
            if number < plans or unseen:
                worst = max(worst, prove(drawn()))
        for _ in range(plans if unseen else 0):  # of what only training runs, such as auxiliary heads
            trained = drawn()
            if trained.trains_alike(inputs):
                worst = max(worst, prove(trained))
    for name, group in unseen.items():
        raise UserError(
            f"the model's outputs do not depend on group {name!r} (first slot {group.slots[0]}) with random weights "
            "and these inputs, so nothing shows that it is sliced rightly: give inputs that need it or, where only "
            "training needs it, do without this proof (config: structure.verify false)"
        )
    return worst


class _Subject:
    """A copy of a model to experiment on: on the CPU, in float32, evaluation mode."""

    def __init__(
        self, model: nn.Module, groups: Groups, failure: str = "the model does not run in float32, on random weights"
    ):
        tensors = named_tensors(model)
        self.groups = groups
        self.failure = failure
        self.model = with_tensors(model, {name: _float_copy(tensor) for name, tensor in tensors.items()}).eval()
        as_batched_products(self.model)
        # Random wherever it matters: parameters, buffers that are sliced, and what has no values yet.
        drawn = {n for n, t in tensors.items() if isinstance(t, nn.Parameter) or t.is_meta or n in groups.by_tensor}
        self._drawn = {name for name in drawn if is_floating(tensors[name])}

    def fresh(self) -> nn.Module:
        """The model with the same tensors, as it was before any forward: some modules keep what they computed."""
        return with_tensors(self.model, named_tensors(self.model))

    def trains_alike(self, inputs: Inputs) -> bool:
        """Puts it into training mode, but for dropout and BatchNorm. Whether two forwards are the same even so."""
        for module in self.model.train().modules():
            if isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
                module.eval()
        return self.repeats(inputs)

    @torch.no_grad()
    def repeats(self, inputs: Inputs) -> bool:
        """Whether it computes the same again."""
        one, other = (_floats(run_watched(self.fresh(), inputs, self.failure)) for _ in range(2))
        return all(map(torch.equal, one, other))

    def randomise(self, generator: torch.Generator) -> None:
        """Weights as He et al. (2015) initialise them, small biases: the end of a deep network hears its beginning."""
        convolutions = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
        for name, tensor in named_tensors(self.model).items():
            if name not in self._drawn:
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


_STAND_IN_UNITS = (32, 16, 8, 4, 2)
"""Units of each group of a stand-in. Norms over few of them amplify rounding errors, a lot in a deep network."""


def _narrow_model(
    model: nn.Module, groups: Groups, elements: int, generator: torch.Generator
) -> tuple[nn.Module, Groups]:
    """The widest of the narrow models that has at most so many elements; the narrowest, if all have more."""
    for units in _STAND_IN_UNITS:
        narrow, its_groups = narrowed(model, groups, units, generator)
        if sum(shape.numel() for shape in its_groups.shapes.values()) <= elements:
            break
    return narrow, its_groups


def random_plan(groups: Groups, generator: torch.Generator, keep: float = 0.5, *, spread: float = 0.0) -> Plan:
    """About `keep` of each group's units, chosen at random, at least its `least`; for each its own ratio ± `spread`."""
    kept = {}
    for group in groups:
        ratio = keep + spread * (2 * torch.rand((), generator=generator).item() - 1)
        count = min(group.units, max(group.least, round(ratio * group.units)))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return Plan(groups, kept)


def _reached(
    subject: _Subject, unseen: Collection[str], inputs: Inputs, tolerance: float, generator: torch.Generator
) -> list[str]:
    """Those of the unseen groups that the outputs depend on: to first order, or when half of their units are gated."""
    full, groups = subject.fresh(), subject.groups
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
    outputs = _floats(run_watched(full, inputs, subject.failure))
    finite = [output.masked_fill(~output.isfinite(), 0) for output in outputs]  # masked logits are infinite
    scale = max((output.detach().abs().max().item() for output in finite), default=0.0)
    if scale == 0 or any(output.isnan().any() for output in outputs):
        raise UserError("the model's outputs are zero or not a number on random weights, so nothing can be verified")
    with suppress(RuntimeError):  # outputs without a gradient: gating has to tell
        noise = [torch.randn(output.shape, generator=generator) for output in finite]
        torch.stack([(output * other).sum() for output, other in zip(finite, noise, strict=True)]).sum().backward()
    for handle in handles:
        handle.remove()
    reached = [name for name in unseen if reach[name] > tolerance * scale]
    for name in [name for name in unseen if name not in reached]:
        half = Plan(groups, {name: torch.arange(max(groups[name].least, (groups[name].units + 1) // 2))})
        full = subject.fresh()
        with torch.no_grad(), Gate(full, half, groups):
            gated = _floats(run_model(full, inputs))
        if any(_difference(mine, theirs) > tolerance for mine, theirs in zip(gated, outputs, strict=True)):
            reached.append(name)
    return reached


def _floats(outputs: Any) -> list[Tensor]:
    return [output for output in tensors_of(outputs) if is_floating(output) and output.numel()]


@torch.no_grad()
def _verify(subject: _Subject, plan: Plan, inputs: Inputs, tolerance: float) -> float:
    sliced, full = slice_module(subject.model, plan, subject.groups), subject.fresh()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mine = _record(sliced, inputs)
        torch.manual_seed(0)
        with Gate(full, plan, subject.groups) as gate:
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
        if not subject.repeats(inputs):
            raise UserError(
                f"the model draws random numbers in its forward (sliced and gated outputs differ first in "
                f"{where or 'the output alone'}), so nothing shows that it is sliced rightly: let it draw none in"
                " evaluation mode, or do without this proof (config: structure.verify false)"
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
        run_watched(model, inputs, _FAILURE)
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
