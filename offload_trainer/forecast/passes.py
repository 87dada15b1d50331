"""What the passes of a run take beside weights and batches, counted on fake tensors: of its subnets, of its master."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_trainer.batches import batch_rows, pieces
from offload_trainer.errors import UserError
from offload_trainer.forecast import footprint
from offload_trainer.forecast.footprint import Footprint
from offload_trainer.groups import Groups, Plan
from offload_trainer.groups.observing import quiet
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master.master import stored_weights
from offload_trainer.master.precision import Precision

STATISTICS = 16
"""Rows of the parts of a batch, or half as many where it does not divide, if BatchNorm takes statistics from them."""


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of a model's slices, and of the whole of it, in one process."""

    model: nn.Module
    """Full size; it may lie on the meta device."""
    groups: Groups
    precision: Precision
    """Types in which the master is stored."""
    loss_fn: Callable[[nn.Module, Any], Tensor]
    metrics_fn: Callable[[nn.Module, Any], Any]
    batch: Any
    """This process's share of a training step's batch, on the device."""
    val_batch: Any
    """A validation batch, on the device."""
    device: torch.device
    autocast: bool
    parted: bool = False
    """Whether loss and metrics can take a batch in parts."""

    def training(self, plan: Plan) -> Footprint:
        """Of a subnet's step: forward and backward."""
        return self._counted(
            lambda: footprint.training_footprint(
                footprint.skeleton(self.model, plan, self.device), self.loss_fn, self.batch, autocast=self.autocast
            )
        )

    def validation(self, plan: Plan) -> Footprint:
        return self._validation(self.val_batch, plan)

    def master_training(self, rows: int | None) -> Footprint:
        """Of a training batch's forward through the full master, so many rows at once (None: all)."""
        return self._once(
            ("training", rows), lambda: self._counted(lambda: self._forward(self.loss_fn, pieces(self.batch, rows)[0]))
        )

    def master_evaluation(self, rows: int | None) -> int:
        """Bytes of validation batches, and of those that give BatchNorm its statistics, through the full master."""
        found = self._once(("validation", rows), lambda: self._validation(pieces(self.val_batch, rows)[0])).peak
        return max(found, self.master_training(rows).peak if self._takes_statistics else 0)

    def rows(self) -> Iterator[int | None]:
        """How many rows of a batch could pass through the full master at once: all (None), then ever fewer."""
        yield None
        if not self.parted or self.failures:
            return
        rows = max(batch_rows(self.batch), batch_rows(self.val_batch))
        least = STATISTICS if self._takes_statistics else 1
        while rows > least:
            rows = max(least, -(-rows // 2))
            self.master_evaluation(rows)
            if self.failures:  # it takes whole batches only, after all
                self.failures.clear()
                return
            yield rows

    @cached_property
    def failures(self) -> list[str]:
        """What could not be counted, and why."""
        return []

    @cached_property
    def _takes_statistics(self) -> bool:
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())

    @cached_property
    def _known(self) -> dict[tuple[str, int | None], Footprint]:
        return {}

    def _once(self, key: tuple[str, int | None], count: Callable[[], Footprint]) -> Footprint:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]

    def _forward(self, function: Callable[[nn.Module, Any], Any], batch: Any, plan: Plan | None = None) -> Footprint:
        """Of a forward without gradients; without a plan of the master, in the types that it is stored in."""
        narrow = plan is None and self.precision.weights == torch.bfloat16
        module = footprint.skeleton(self.model, Plan.whole(self.groups) if plan is None else plan, self.device)
        if narrow:
            stored = stored_weights(named_tensors(self.model), self.precision)
            footprint.retype(module, {name: dtype for name, (dtype, _) in stored.items()})
        return footprint.forward_footprint(module, function, batch, autocast=self.autocast or narrow)

    def _validation(self, batch: Any, plan: Plan | None = None) -> Footprint:
        """By the loss, which takes as much, where a metric cannot do without values."""
        try:
            with quiet():
                return self._forward(self.metrics_fn, batch, plan)
        except Exception:
            return self._counted(lambda: self._forward(self.loss_fn, batch, plan))

    def _counted(self, run: Callable[[], Footprint]) -> Footprint:
        try:
            with quiet():
                return run()
        except UserError:
            raise
        except Exception as error:  # a user's function may look at values, and there are none
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.failures.append(f"activations are not counted: the loss does not run on fake tensors ({reason})")
            return Footprint(0, 0, 0, 0)
