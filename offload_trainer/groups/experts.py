"""Mixture-of-experts layers of transformers: the ways in which their experts are computed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from offload_trainer.groups.running import ModuleError

_ROW_BYTES = 16
"""What `torch.nn.functional.grouped_mm` wants every row to be a multiple of."""


def as_batched_products(model: nn.Module) -> None:
    """Have all experts computed as batched matrix products, in place: only there can their axes be followed.

    (The other ways sort the tokens by expert.) Which one a model uses stands in its config, of which a deep copy of the
    model has its own; what they compute is the same.
    """
    for _, _, config in _configured(model):
        config._experts_implementation = "batched_mm"


@contextmanager
def countable_on_fake_tensors(model: nn.Module) -> Iterator[None]:
    """Context in which experts of any dtype run on fake tensors and save for the backward what they save in earnest.

    That is grouped products, by the op that transformers has for where torch's own does not do: fake tensors know
    torch's for bfloat16 alone, and cannot sort tokens by expert one by one (in place: 'eager' becomes 'grouped_mm').
    """
    for _, _, config in _configured(model):
        if config._experts_implementation == "eager":
            config._experts_implementation = "grouped_mm"
    grouped: Any = sys.modules.get("transformers.integrations.moe")  # not imported, so no model of it is there
    if grouped is None:
        yield
        return
    before, grouped._can_use_grouped_mm = grouped._can_use_grouped_mm, lambda *_: False
    try:
        yield
    finally:
        grouped._can_use_grouped_mm = before


def require_rows_for_grouped_products(model: nn.Module) -> None:
    """Raise `ModuleError` for sliced experts that transformers' default way could not compute."""
    for path, module, config in _configured(model):
        if config._experts_implementation != "grouped_mm" or not hasattr(module, "is_transposed"):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            multiple = max(1, _ROW_BYTES // tensor.element_size())
            if tensor.ndim == 3 and any(size % multiple for size in tensor.shape[1:]):
                raise ModuleError(
                    f"{path}.{name} is sliced to {tuple(tensor.shape)}, and grouped products need multiples of "
                    f"{multiple}: set structure.multiple_of, or config._experts_implementation to 'eager'"
                )


def _configured(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, module, config) of every module with a config that says how experts are computed."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            yield path, module, config
