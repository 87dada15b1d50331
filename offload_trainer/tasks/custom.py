"""Task `custom`: whatever a user's own function returns, a model with its data, loss and metric."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offload_trainer.batches import batch_rows, shallow_copy, shard
from offload_trainer.errors import UserError
from offload_trainer.randomness import RandomState
from offload_trainer.tasks.hf_config import save_config, why_no_config
from offload_trainer.tasks.loaders import train_batches, val_batches
from offload_trainer.tasks.task import Task

if TYPE_CHECKING:
    from offload_trainer.config import Custom

_REQUIRED = ("model", "train", "val", "loss")
_OPTIONAL = ("metric", "example_inputs", "unit", "widths")
_EXAMPLE_ROWS = 3


def build(config: "Custom", seed: int) -> Task:
    """Calls `package.module:function` with the arguments of the config; it returns a Task, or a dict with

    - `model`: an nn.Module on the host; `loss`: (module, batch) → scalar tensor;
    - `train`, `val`: a DataLoader, or a sequence or Dataset of batches (of `train` also an endless Dataset: no `len`);
    - optionally `metric`: (module, batch) → dict of scalars, or one scalar; `example_inputs`: by default the first
      rows of a training batch, or of its first element; `unit` ("samples"); `widths` ({}).

    The current folder is importable. Raises UserError, naming the function, if it cannot be found, called or used.
    """
    returned = _call(config.function, config.arguments)
    if isinstance(returned, Task):
        return returned
    who = f"task.function ({config.function})"
    if not isinstance(returned, Mapping):
        keys = ", ".join(_REQUIRED)
        raise UserError(f"{who} must return a Task or a dict with {keys}; it returned {_kind(returned)}")
    for problem, keys in (
        ("lacks", [key for key in _REQUIRED if key not in returned]),
        ("has the unknown", [key for key in returned if key not in _REQUIRED + _OPTIONAL]),
    ):
        if keys:
            allowed = f"{', '.join(_REQUIRED)} and optionally {', '.join(_OPTIONAL)}"
            raise UserError(
                f"{who}: the dict it returned {problem} {', '.join(map(str, keys))}; it must have {allowed}"
            )
    model, loss, metric = returned["model"], returned["loss"], returned.get("metric")
    if not isinstance(model, nn.Module):
        raise UserError(f"{who}: model must be an nn.Module; it is {_kind(model)}")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise UserError(f"{who}: model has tensors on meta; return a Task, whose materialise initialises them")
    for key, value in (("loss", loss), ("metric", metric)):
        if not callable(value) and not (key == "metric" and value is None):
            raise UserError(f"{who}: {key} must be a function of (module, batch); it is {_kind(value)}")
    if not isinstance(returned.get("widths") or {}, Mapping):
        raise UserError(f"{who}: widths must be a dict of rules; it is {_kind(returned['widths'])}")
    train = train_batches(returned["train"], f"{who}: train", seed)
    val = val_batches(returned["val"], f"{who}: val", seed)
    example_inputs = returned.get("example_inputs")
    if example_inputs is None:
        example_inputs = _example_inputs(_first_batch(train, who))
    elif not isinstance(example_inputs, (tuple, dict)):
        raise UserError(f"{who}: example_inputs must be a tuple or a dict of arguments; it is {_kind(example_inputs)}")
    return Task(
        model=model,
        example_inputs=example_inputs,
        loss_fn=_checked_loss(loss, who),
        metrics_fn=_metrics(loss, metric, who),
        train=train,
        val=val,
        unit=returned.get("unit", "samples"),
        count=batch_rows,
        widths=dict(returned.get("widths") or {}),
        # A model of transformers is exported with its config.
        save_export=partial(save_config, inputs=example_inputs) if isinstance(model, PreTrainedModel) else None,
        why_no_config=why_no_config if isinstance(model, PreTrainedModel) else None,
    )


def rehearse(task: Task, module: nn.Module, batch: Any, val_batch: Any, function: str) -> None:
    """The loss of a batch with its gradients, and the metrics of another, as the run will ask for them.

    Raises `UserError`, naming what failed and where, so that a mistake in a user's functions shows before the run.
    module: a slice of the model, where the batches are; it is changed. Random numbers are drawn from states of its own.
    """
    who = f"task.function ({function})"
    with RandomState(0).installed():
        _rehearse(task, module, batch, val_batch, who)


def rehearse_narrow(task: Task, module: nn.Module, val_batch: Any, function: str) -> None:
    """The metrics of a batch, of a module whose weights are stored in bfloat16, as the full master's may be."""
    with RandomState(0).installed(), torch.no_grad():
        try:
            task.metrics_fn(module.eval(), val_batch)
        except Exception as error:  # whatever cannot compute with both types
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"task.function ({function}): the model does not run with weights stored in bfloat16, so that the full"
                f" master could not be evaluated ({said}): leave memory.weights at fp32"
            ) from error


def _rehearse(task: Task, module: nn.Module, batch: Any, val_batch: Any, who: str) -> None:
    task.model.zero_grad()  # of what its owner has tried
    loss = _told(lambda: task.loss_fn(module.train(), batch), f"{who}: loss")
    if not loss.requires_grad:
        raise UserError(f"{who}: loss does not depend on a trained parameter: it has no gradient")
    _told(loss.backward, f"{who}: the backward pass of loss")
    stray = next((name for name, parameter in task.model.named_parameters() if parameter.grad is not None), None)
    if stray is not None:
        raise UserError(
            f"{who}: loss reaches {stray} of the model itself, not of the module it is given: a function, a hook or a"
            " method that it calls must have kept the model"
        )
    if all(parameter.grad is None for parameter in module.parameters()):
        raise UserError(f"{who}: loss does not depend on a trained parameter of the module it is given")
    if not task.count(val_batch):
        raise UserError(f"{who}: val: its first batch holds no rows")
    with torch.no_grad():
        _told(lambda: task.metrics_fn(module.eval(), val_batch), f"{who}: metric, on a batch of val,")


def _told(work: Callable[[], Any], what: str) -> Any:
    """What the work returns. Raises `UserError` with what and where an error of it was."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:  # a user's function may fail in any way: say where
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{what} raised {said} ({place.filename}, line {place.lineno})") from error


def _call(name: str, arguments: dict[str, Any]) -> Any:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"task.function ({name}) must be package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # a user's module may fail in any way
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"task.function ({name}): {module_name} cannot be imported ({what})") from error
    if not callable(function):
        raise UserError(f"task.function ({name}): {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "none"
        raise UserError(f"task.arguments ({given}) do not fit {name} ({error})") from error
    return _told(lambda: function(**arguments), f"task.function ({name})")


def _checked_loss(loss: Callable[[nn.Module, Any], Any], who: str) -> Callable[[nn.Module, Any], Tensor]:
    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return _scalar(loss(module, shallow_copy(batch)), f"{who}: loss")

    return loss_fn


def _metrics(
    loss: Callable[[nn.Module, Any], Any], metric: Callable[[nn.Module, Any], Any] | None, who: str
) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """The metric's scalars, with `loss` among them: a metric that gives it itself saves a forward."""
    given = getattr(metric, "__name__", "metric")
    name = given if given.isidentifier() else "metric"  # a lambda's is not one

    def metrics_fn(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = {} if metric is None else metric(module, shallow_copy(batch))
        found = found if isinstance(found, Mapping) else {name: found}
        values = {str(key): _scalar(value, f"{who}: metric {key}") for key, value in found.items()}
        if "loss" not in values:
            values = {"loss": _scalar(loss(module, shallow_copy(batch)), f"{who}: loss"), **values}
        return values

    return metrics_fn


def _scalar(value: Any, what: str) -> Tensor:
    if isinstance(value, (int, float)) and what.partition(": ")[2] != "loss":
        return torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.ndim:
        raise UserError(f"{what} must return a scalar tensor; it returned {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _first_batch(train: Any, who: str) -> Any:
    batch = train[0]
    try:
        shard(batch, 0, 1)  # a Dataset of samples, whose labels are plain numbers, is the likely mistake
    except UserError as error:
        raise UserError(f"{who}: train: {error}") from error
    return batch


def _example_inputs(batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The first rows of a batch as arguments of the model: a dict as keywords, else the (first) tensor by position."""
    if isinstance(batch, Mapping):
        return {key: value[:_EXAMPLE_ROWS] if isinstance(value, Tensor) else value for key, value in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return (first[:_EXAMPLE_ROWS] if isinstance(first, Tensor) else first,)
