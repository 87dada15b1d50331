"""Find the groups of a model: run it on fake tensors and follow its axes through every op; then trace half of it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_trainer.errors import UserError
from offload_trainer.groups.experts import as_batched_products
from offload_trainer.groups.naming import name_groups
from offload_trainer.groups.observing import Observer, fake, forgetful
from offload_trainer.groups.plan import Group, Groups, Plan, Widths
from offload_trainer.groups.running import Inputs, ModuleError, map_inputs, stored_around
from offload_trainer.groups.slicing import named_tensors, rebuild, require_no_hooks, sliced_groups, with_tensors


def find_groups(
    model: nn.Module, example_inputs: Inputs, *, widths: Widths | None = None, pin_unknown: bool = False
) -> Groups:
    """What can be sliced of `model`, found by running it on fake tensors: no memory, no arithmetic.

    `model` may lie on any device, the meta device included. `example_inputs` is a tuple of arguments or a dict of
    keyword arguments, on the CPU; odd sizes (batch 3, sequence 11) keep its axes apart from the model's own.
    `widths` adds attribute rules for the model's own module types (see `groups.widths`).

    The groups are then held against a sliced copy, which is traced as well: it must show the same groups, smaller.

    Raises `UserError`, naming the op and the module, for an op without a rule, for a width stored where no rule looks,
    and when nothing can be sliced. `pin_unknown=True` leaves unsliced what such an op touches, and the groups without
    which the sliced copy does run.
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
        # First a constant's size is believed to come from the axis that it meets; then, to be fixed in the code.
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
    require_no_hooks(model)


def _found(skeleton: nn.Module, observer: Observer, widths: Widths, *, drop: bool) -> Groups:
    trace = observer.observe(skeleton, "the model cannot be traced")
    found = trace.sliceable()
    if not found:
        why = sorted({leaf.pinned for leaf, _ in trace.slots() if leaf.pinned})
        name = type(skeleton).__name__
        raise UserError(f"no group of units found in {name}: every axis is pinned ({'; '.join(why)})")
    shapes = {name: torch.Size(tensor.shape) for name, tensor in named_tensors(skeleton).items()}
    named = name_groups(found, shapes)

    def failure(groups: Sequence[Group]) -> ModuleError | None:
        """Of a copy sliced by these groups alone."""
        try:
            _trace_sliced(skeleton, Groups(tuple(groups), shapes, widths), observer, must_train=trace.trains)
        except ModuleError as error:
            return error
        return None

    groups, error = named, failure(named)
    if error is not None and drop:
        groups = _passing(named, failure)
    if error is not None and (not drop or not groups):
        raise error
    return Groups(tuple(groups), shapes, widths)


def _passing(candidates: Sequence[Group], failure: Callable[[Sequence[Group]], object]) -> list[Group]:
    """As many of the groups as pass together, found by halving: of the others each alone makes those before it fail."""
    passing: list[Group] = []

    def add(some: Sequence[Group]) -> None:
        if failure([*passing, *some]) is None:
            passing.extend(some)
        elif len(some) > 1:
            add(some[: len(some) // 2])
            add(some[len(some) // 2 :])

    half = len(candidates) // 2
    for some in (candidates[:half], candidates[half:]) if half else ():  # all together are known to fail
        add(some)
    return passing


def _trace_sliced(skeleton: nn.Module, groups: Groups, observer: Observer, *, must_train: bool) -> None:
    """Trace a sliced copy: a width that is stored where no rule looks breaks it, or shows as other groups."""
    advice = "add a rule (widths=…)" + ("" if observer.pin_unknown else ", or leave it unsliced (pin_unknown)")
    kept = {g.name: torch.arange(width) for g, width in zip(groups, _trial_widths(groups), strict=True)}
    plan = Plan(groups, kept)
    tensors = {n: fake(plan.shape(n), t.dtype, observer.mode) for n, t in named_tensors(skeleton).items()}
    sliced = rebuild(skeleton, tensors, plan, groups)
    trace = observer.observe(sliced, f"a sliced subnetwork does not run; {advice}", must_train=must_train)
    again = {frozenset(slots) for slots in trace.sliceable().values()}
    for group in sliced_groups(plan):
        slots = frozenset(group.slots)
        if group.units > group.least and slots not in again:  # what is kept whole is no group any more
            near = max(again, key=lambda other: (len(slots & other), sorted(map(str, other))), default=frozenset())
            where = min(slots - near, key=str).tensor.rpartition(".")[0]
            raise ModuleError(
                f"group {group.name!r} is not the same in a sliced subnetwork: {where or 'the model'} or a module "
                f"around it stores a width that no rule covers{stored_around(skeleton, where)}; {advice}"
            )


def _trial_widths(groups: Groups) -> Iterator[int]:
    """Units to keep of each group: about half, another number in each of as many units, so that a `chunk(2)` of two
    groups, or one group's width given to another, does not pass for right."""
    alike: Counter[int] = Counter()
    for group in groups:
        half = (group.units + 1) // 2
        width = half + alike[group.units] % max(1, group.units - half)  # one at least is left out
        alike[group.units] += 1
        yield min(group.units - 1, max(group.least + 1, width))
