"""Task `custom`: whatever a user's own function returns, a model with its data, loss and metric."""

import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from offload_trainer.errors import UserError
from offload_trainer.tasks.task import Task, batch_rows, random_stream

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
            raise UserError(f"{who}: the dict it returned {problem} {', '.join(map(str, keys))}; it must have {allowed}")
    model, loss, metric = returned["model"], returned["loss"], returned.get("metric")
    if not isinstance(model, nn.Module):
        raise UserError(f"{who}: model must be an nn.Module; it is {_kind(model)}")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise UserError(f"{who}: model has tensors on meta; return a Task, whose materialise initialises them")
    for key, value in (("loss", loss), ("metric", metric)):
        if not callable(value) and not (key == "metric" and value is None):
            raise UserError(f"{who}: {key} must be a function of (module, batch); it is {_kind(value)}")
    train = _train_batches(returned["train"], f"{who}: train", seed)
    example_inputs = returned.get("example_inputs")
    return Task(
        model=model,
        example_inputs=_example_inputs(train[0]) if example_inputs is None else example_inputs,
        loss_fn=_checked_loss(loss, who),
        metrics_fn=_metrics(loss, metric, who),
        train=train,
        val=_val_batches(returned["val"], f"{who}: val", seed),
        unit=returned.get("unit", "samples"),
        count=batch_rows,
        widths=dict(returned.get("widths") or {}),
    )


def _call(name: str, arguments: dict[str, Any]) -> Any:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"task.function ({name}) must be package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except ImportError as error:
        raise UserError(f"task.function ({name}): {module_name} cannot be imported ({error})") from error
    if not callable(function):
        raise UserError(f"task.function ({name}): {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        given = ", ".join(arguments) or "none"
        raise UserError(f"task.arguments ({given}) do not fit {name} ({error})") from error
    return function(**arguments)


def _checked_loss(loss: Callable[[nn.Module, Any], Any], who: str) -> Callable[[nn.Module, Any], Tensor]:
    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        return _scalar(loss(module, batch), f"{who}: loss")

    return loss_fn


def _metrics(
    loss: Callable[[nn.Module, Any], Any], metric: Callable[[nn.Module, Any], Any] | None, who: str
) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """The metric's scalars, with `loss` among them: a metric that gives it itself saves a forward."""
    given = getattr(metric, "__name__", "metric")
    name = given if given.isidentifier() else "metric"  # a lambda's is not one

    def metrics_fn(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        found = {} if metric is None else metric(module, batch)
        found = found if isinstance(found, Mapping) else {name: found}
        values = {str(key): _scalar(value, f"{who}: metric {key}") for key, value in found.items()}
        if "loss" not in values:
            values = {"loss": _scalar(loss(module, batch), f"{who}: loss"), **values}
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


def _example_inputs(batch: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The first rows of a batch as arguments of the model: a dict as keywords, else the (first) tensor by position."""
    if isinstance(batch, Mapping):
        return {key: value[:_EXAMPLE_ROWS] if isinstance(value, Tensor) else value for key, value in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return (first[:_EXAMPLE_ROWS] if isinstance(first, Tensor) else first,)


def _train_batches(batches: Any, who: str, seed: int) -> Dataset[Any]:
    if isinstance(batches, DataLoader):
        return LoaderBatches(batches, who, seed)
    if hasattr(batches, "__getitem__") and not isinstance(batches, (Mapping, str, Tensor)):
        return batches if not hasattr(batches, "__len__") else Cycle(_not_empty(batches, who))
    if isinstance(batches, Iterable) and not isinstance(batches, (Mapping, str, Tensor, Iterator)):
        return LoaderBatches(batches, who, seed)
    raise UserError(f"{who} must be a DataLoader, or a sequence or Dataset of batches; it is {_kind(batches)}")


def _val_batches(batches: Any, who: str, seed: int) -> Sequence[Any]:
    train = _train_batches(batches, who, seed)
    if isinstance(train, Cycle):
        return train.batches
    if isinstance(train, LoaderBatches):
        return ValLoader(train)
    raise UserError(f"{who} must end: an endless Dataset ({_kind(batches)}, without len) cannot validate")


def _not_empty(batches: Any, who: str) -> Any:
    if not len(batches):
        raise UserError(f"{who} is empty")
    return batches


class Cycle(Dataset[Any]):
    """A sequence of batches, over and over in its own order."""

    def __init__(self, batches: Sequence[Any]):
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]


class LoaderBatches(Dataset[Any]):
    """A DataLoader (or another iterable of batches) as `train[step]`: the same batch for the same (seed, step).

    Epoch e is iterated with torch's, NumPy's and Python's random state set from (seed, e), so shuffling and
    augmentation repeat; what the training itself draws in between has no influence, and feels none. Steps in a row cost
    nothing extra. Any other step, the first after a resume say, iterates from the beginning of its epoch up to it (or
    from step 0, if the loader does not know its length).
    """

    def __init__(self, loader: Iterable[Any], who: str, seed: int):
        self.loader, self.who, self.seed = loader, who, seed
        try:
            self.length: int | None = len(_not_empty(loader, who))
        except TypeError:
            self.length = None  # an IterableDataset: known when its first epoch ends
        self._epoch, self._state = 0, _RandomState(0)
        self._next_step, self._batches = 0, iter(())
        self._last: tuple[int, Any] = (-1, None)

    def __getitem__(self, step: int) -> Any:
        if step == self._last[0]:
            return self._last[1]
        epoch = step // self.length if self.length else 0
        if step < self._next_step or epoch > self._epoch or not self._next_step:
            self._begin(epoch, epoch * (self.length or 0))
        while self._next_step <= step:
            batch = self._advance()
        self._last = (step, batch)
        return batch

    def _begin(self, epoch: int, first_step: int) -> None:
        self._epoch, self._next_step = epoch, first_step
        self._state = _RandomState(int(random_stream(self.seed, 2, epoch).integers(2**31)))
        sampler = getattr(self.loader, "sampler", None)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)
        with self._state.installed():
            for generator in (getattr(self.loader, "generator", None), getattr(sampler, "generator", None)):
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(torch.initial_seed())
            self._batches = iter(self.loader)

    def _advance(self) -> Any:
        first_of_epoch = self._next_step
        for _ in range(2):
            try:
                with self._state.installed():
                    batch = next(self._batches)
                self._next_step += 1
                return batch
            except StopIteration:
                if self.length is not None and self._next_step % self.length:
                    raise UserError(f"{self.who} ended after {self._next_step % self.length} batches; its len is {self.length}")
                self._begin(self._epoch + 1, first_of_epoch)
        raise UserError(f"{self.who} is empty")


class ValLoader(Sequence[Any]):
    """The first epoch of a loader as a sequence, the same at every evaluation, one batch in memory at a time."""

    def __init__(self, batches: LoaderBatches):
        self.batches = batches
        length = batches.length
        if length is None:
            with _RandomState(0).installed():
                length = sum(1 for _ in batches.loader)
        batches.length = self.length = length
        if not length:
            raise UserError(f"{batches.who} is empty")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(self.length)[index]]
        return self.batches[range(self.length)[index]]


class _RandomState:
    """A state of the three global random generators of its own, put in their place for a while."""

    def __init__(self, seed: int):
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.numpy, self.python = np.random.RandomState(seed).get_state(), random.Random(seed).getstate()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Goes on from where the last use ended; the generators outside are as before."""
        outside = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self._install(self.torch, self.numpy, self.python)
        try:
            yield
        finally:
            self.torch, self.numpy, self.python = torch.get_rng_state(), np.random.get_state(), random.getstate()
            self._install(*outside)

    @staticmethod
    def _install(torch_state: Tensor, numpy_state: Any, python_state: Any) -> None:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
