"""What is exchanged between processes, without others: several real ones are in test_run.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload_trainer.device import ranks


class Pair:
    """This rank, and another one that has `theirs` wherever this one exchanges something."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, theirs: float):
        self.theirs, self.messages = theirs, list[tuple[torch.dtype, int]]()

    def reduce(self, flat: Tensor, reduction: str) -> Tensor:
        self.messages.append((flat.dtype, flat.numel()))
        return (flat + self.theirs) / (2 if reduction == "mean" else 1)


def test_tensors_are_averaged_in_messages_of_one_type_and_some_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BUCKET", 40)
    tensors = [torch.full((n,), float(n)) for n in (3, 6, 4, 30, 2)] + [torch.ones(2, 2, dtype=torch.float64)]
    expected, pair = [(tensor + 1) / 2 for tensor in tensors], Pair(1.0)
    ranks.average_(pair, tensors)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))
    single, double = torch.float32, torch.float64
    assert sorted(pair.messages, key=str) == [(single, 13), (single, 2), (single, 30), (double, 4)]


@pytest.mark.parametrize("theirs", [0.0, 2.0])
def test_a_parameter_that_no_rank_reached_stays_without_a_gradient(theirs: float) -> None:
    reached, not_here = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    reached.grad = torch.ones(2)
    ranks.average_gradients(Pair(theirs), {"a": reached, "b": not_here})  # type: ignore[arg-type]
    assert reached.grad.tolist() == [(1 + theirs) / 2] * 2
    assert not_here.grad is None if not theirs else not_here.grad is not None and not_here.grad.tolist() == [1.0] * 3


def test_nobody_is_asked_where_every_parameter_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(_: Tensor) -> Any:
        raise AssertionError("the host waits for the device")

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    for name in ("tolist", "item", "cpu", "__bool__"):
        monkeypatch.setattr(Tensor, name, asked)
    ranks.average_gradients(Pair(0.0), {"a": parameter})  # type: ignore[arg-type]


def test_one_process_exchanges_nothing() -> None:
    alone: Any = SimpleNamespace(num_processes=1)
    ranks.average_gradients(alone, {"a": nn.Parameter(torch.zeros(2))})
    assert ranks.anywhere(alone, True) and not ranks.anywhere(alone, False)
