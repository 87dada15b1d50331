"""Find the groups of a model: run it on fake tensors and follow its axes through every op; then trace half of it."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_trainer.errors import UserError
from offload_trainer.groups.experts import as_batched_products
from offload_trainer.groups.naming import name_groups
from offload_trainer.groups.observing import Observer, fake, forgetful
from offload_trainer.groups.plan import Groups, Plan, Widths
from offload_trainer.groups.running import Inputs, ModuleError, map_inputs
from offload_trainer.groups.slicing import named_tensors, rebuild, sliced_groups, with_tensors

_ADVICE = "add a rule (widths=…), or leave it unsliced (pin_unknown)"


def find_groups(
    model: nn.Module, example_inputs: Inputs, *, widths: Widths | None = None, pin_unknown: bool = False
) -> Groups:
    """What can be sliced of `model`, found by running it on fake tensors: no memory, no arithmetic.

    `model` may lie on any device, the meta device included. `example_inputs` is a tuple of arguments or a dict of
    keyword arguments, on the CPU; odd sizes (batch 3, sequence 11) keep its axes apart from the model's own.
    `widths` adds attribute rules for the model's own module types (see `groups.widths`).

    The groups are then held against a sliced copy, which is traced as well: it must show the same groups, smaller.

    Raises `UserError`, naming the op and the module, for an op without a rule, for a width stored where no rule looks,
    and when nothing can be sliced. `pin_unknown=True` leaves unsliced what such an op touches, and the groups inside
    modules of a type that stores such a width (all that touch them, where that does not help).
    """
    _require_plain(model)
    if not isinstance(example_inputs, (tuple, dict)):
        kind = type(example_inputs).__name__
        raise UserError(f"example_inputs ({kind}) must be a tuple of arguments or a dict of keyword arguments")
    mode, originals = FakeTensorMode(allow_non_fake_inputs=True), named_tensors(model)
    skeleton = with_tensors(model, {n: fake(t.shape, t.dtype, mode) for n, t in originals.items()})
    as_batched_products(skeleton)
    inputs = map_inputs(lambda x: fake(x.shape, x.dtype, mode), example_inputs)
    failures: list[UserError] = []
    with forgetful(model):
        # The size of a constant is taken for that of an axis it meets; where that does not work, for a number in the
        # code.
        for open_constants, drop in ((True, False), (False, False), (True, True))[: 3 if pin_unknown else 2]:
            try:
                return _found(
                    skeleton, Observer(mode, inputs, pin_unknown, open_constants, originals), widths or {}, drop=drop
                )
            except UserError as error:
                failures.append(error)
    raise failures[0]


def _require_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            where = f"{path or 'the model'} ({type(module).__name__})"
            raise UserError(f"{where} is compiled, and its axes cannot be followed: pass the module it was made of")
    for name, tensor in named_tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{name} of a lazy module has no shape yet: call the model once before")


def _found(skeleton: nn.Module, observer: Observer, widths: Widths, *, drop: bool) -> Groups:
    trace = observer.observe(skeleton, "the model cannot be traced")
    found = trace.sliceable()
    if not found:
        why = sorted({leaf.pinned for leaf, _ in trace.slots() if leaf.pinned})
        name = type(skeleton).__name__
        raise UserError(f"no group of units found in {name}: every axis is pinned ({'; '.join(why)})")
    shapes = {name: torch.Size(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
    groups = Groups(name_groups(found, shapes), shapes, widths)
    while True:
        try:
            _trace_sliced(skeleton, groups, observer, must_train=trace.trains)
            return groups
        except ModuleError as error:
            fewer = _without(groups, skeleton, error.path) if drop else None
            if fewer is None:
                raise
            groups = fewer


def _trace_sliced(skeleton: nn.Module, groups: Groups, observer: Observer, *, must_train: bool) -> None:
    """Trace a sliced copy: a width that is stored where no rule looks breaks it, or shows as other groups."""
    # Neighbours get different widths, so that a `chunk(2)` of two groups does not pass for right.
    halves = {g.name: (g.units + 1) // 2 + (i % 2 and g.units > 3) for i, g in enumerate(groups)}
    kept = {g.name: torch.arange(min(g.units - 1, max(g.least + 1, halves[g.name]))) for g in groups}
    plan = Plan(groups, kept)
    tensors = {n: fake(plan.shape(n), t.dtype, observer.mode) for n, t in named_tensors(skeleton).items()}
    sliced = rebuild(skeleton, tensors, plan, groups)
    trace = observer.observe(sliced, f"a sliced subnetwork does not run; {_ADVICE}", must_train=must_train)
    again = {frozenset(slots) for slots in trace.sliceable().values()}
    for group in sliced_groups(plan):
        slots = frozenset(group.slots)
        if group.units > group.least and slots not in again:  # what is kept whole is no group any more
            near = max(again, key=lambda other: len(slots & other), default=frozenset())
            where = min(slots - near, key=str).tensor.rpartition(".")[0]
            raise ModuleError(
                f"group {group.name!r} is not the same in a sliced subnetwork: {where or 'the model'} or a module "
                f"around it stores a width that no rule covers; {_ADVICE}",
                _own(skeleton, where),
            )


def _without(groups: Groups, model: nn.Module, path: str) -> Groups | None:
    """The groups, less those that are sliced inside the module of that path or any of its type.

    Those that lie wholly inside; without any, those inside the module around it; without any, all that touch it; then
    the same from the module around it. None when no group would be left.
    """
    while path:
        around = path.rpartition(".")[0]
        for where, test in ((path, all), (around, all), (path, any)):
            kind = type(model.get_submodule(where))
            inside = tuple(f"{name}." for name, module in model.named_modules() if type(module) is kind)
            dropped = {g.name for g in groups if test(slot.tensor.startswith(inside) for slot in g.slots)}
            if where and dropped:
                rest = tuple(group for group in groups if group.name not in dropped)
                return Groups(rest, groups.shapes, groups.widths) if rest else None
        path = around
    return None


def _own(model: nn.Module, path: str) -> str:
    """The module of that path, or around it, whose forward is not torch's own."""
    while path and type(model.get_submodule(path)).__module__.startswith("torch."):
        path = path.rpartition(".")[0]
    return path
