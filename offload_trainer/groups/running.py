"""Run a model on example inputs, knowing which module is at work when something goes wrong."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves, tree_map

from offload_trainer.errors import UserError

Inputs = tuple | Mapping[str, Any]


class ModuleError(UserError):
    """What is wrong with one module of a model; without the groups that meet in it, the rest may be right."""


class Watch:
    """Context manager over a model: `where` names the module whose forward is running, innermost."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._active: list[tuple[str, nn.Module]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "Watch":
        for path, module in self._model.named_modules():
            entry = (path, module)
            self._handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: self._active.append(entry)))
            self._handles.append(module.register_forward_hook(lambda *_: self._active.pop() and None))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def path(self) -> str:
        return self._active[-1][0] if self._active else ""

    @property
    def stored(self) -> str:
        return stored_around(self._model, self.path)

    @property
    def module(self) -> nn.Module:
        return self._active[-1][1] if self._active else self._model

    @property
    def where(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__name__})"


def stored_around(model: nn.Module, path: str) -> str:
    """The whole numbers beside its tensors that the module of this path stores, or the first around it that is not one
    of torch's layers, whose widths are known: where a width without a rule hides. As words to end a line with."""
    while True:
        module = model.get_submodule(path)
        numbers = {k: v for k, v in vars(module).items() if type(v) is int and v > 1 and not k.startswith("_")}
        if numbers and not type(module).__module__.startswith("torch."):
            return f" ({path or 'the model'} stores {', '.join(f'{k}={v}' for k, v in numbers.items())})"
        if not path:
            return ""
        path = path.rpartition(".")[0]


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """model(*inputs) or model(**inputs)."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def run_watched(model: nn.Module, inputs: Inputs, failure: str) -> Any:
    """`run_model`; an exception becomes one line, a `ModuleError`: `failure`, the module, and the message."""
    with Watch(model) as watch:
        try:
            return run_model(model, inputs)
        except UserError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"raised {type(error).__name__}: {lines[0]}{watch.stored}"
            if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
                reason = (
                    f"asks what is in a tensor ({lines[0]}), as `if`, .item() and nonzero() do, and a trace has no"
                    " values: keep that out of forward, or trace the model with it switched off"
                )
            raise ModuleError(f"{failure}: {watch.where} {reason}") from error


@contextmanager
def plain_attention() -> Iterator[None]:
    """Context: nn.MultiheadAttention's fused inference path hides its axes; the plain one computes the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs, every tensor replaced."""
    plain = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)  # a tokenizer's encoding is a Mapping
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, plain)


def tensors_of(outputs: Any) -> list[Tensor]:
    """Every tensor in what a model returned: in containers, mappings, dataclasses, or the attributes of one object."""
    if not isinstance(outputs, Tensor | tuple | list | Mapping) and hasattr(outputs, "__dict__"):
        outputs = vars(outputs)
    found: list[Tensor] = []
    for leaf in tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping) or is_dataclass(leaf):
            found += tensors_of(leaf)
    return found


def is_floating(tensor: Tensor) -> bool:
    """Whether it holds plain floating-point numbers (the eight-bit kinds have no arithmetic)."""
    return tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
