"""The global generators: put back where they were, and a part of what a round begins from."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offload_trainer import Offloader, Structure, find_groups, snapshot
from offload_trainer.device.pipeline import in_background
from offload_trainer.master import CheckpointStore, find_checkpoint
from offload_trainer.randomness import RandomState, random_state, set_random_state
from tests.test_offloader import ADAMW, data, network, run


def draws() -> list[float]:
    """Of every kind of generator; odd numbers of normal ones, which come in pairs."""
    python = [random.random(), random.gauss(0, 1), float(random.getrandbits(70))]
    return [*python, *np.random.randn(3).tolist(), float(np.random.beta(2, 3)), *torch.rand(2).tolist()]


@pytest.mark.parametrize("before", range(4))
def test_what_was_saved_is_drawn_again(before: int) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for _ in range(before):
        random.gauss(0, 1), np.random.randn()
    state = random_state()
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    expected = draws()
    assert draws() != expected
    set_random_state(state)
    assert draws() == expected


def test_a_state_of_ones_own_leaves_no_trace() -> None:
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    before = random_state()
    own = RandomState(5)
    with own.installed():
        first = draws()
    with own.installed():
        assert draws() != first  # it goes on
    assert all(torch.equal(tensor, random_state()[name]) for name, tensor in before.items())
    with RandomState(5).installed():
        assert draws() == first


def mixed_up(module: nn.Module, batch: Any) -> Tensor:
    """A loss that mixes rows, by chance: both subnets of a pair must see the same."""
    images, labels = batch
    share, place = np.random.beta(0.4, 0.4), random.randrange(len(labels))
    drawn.append((share, place))
    out = module(share * images + (1 - share) * images.roll(place, 0))
    return share * nn.functional.cross_entropy(out, labels) + (1 - share) * nn.functional.cross_entropy(
        out, labels.roll(place, 0)
    )


drawn: list[Any] = []


def trainer(seed: int) -> Offloader:
    model = network(seed=seed)
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    structure = Structure(groups, 0.5, paired_batches=3)
    return Offloader(model, groups, mixed_up, optimizer=ADAMW, structure=structure, sync_every=3)


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    batches = data(12)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    drawn.clear()
    with trainer(1) as whole:
        run(whole, batches[:6])
        snapshot.save(whole, CheckpointStore(tmp_path))
        expected = run(whole, batches[6:])
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    assert len(pairs) == 12 and all(one == other for one, other in pairs)
    random.seed(9), np.random.seed(9)
    with trainer(2) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert run(resumed, batches[6:]) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_the_next_plan_is_drawn_beside_training(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever looks at the structure finds it drawn."""
    where: list[bool] = []
    whole = Structure.look_ahead
    monkeypatch.setattr(Structure, "look_ahead", lambda self: (where.append(in_background()), whole(self))[1])
    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    structure = Structure(groups, 0.5)
    loss = nn.functional.cross_entropy
    with Offloader(
        model,
        groups,
        lambda module, batch: loss(module(batch[0]), batch[1]),
        optimizer=ADAMW,
        structure=structure,
        sync_every=3,
        overlap=overlap,
    ) as offloader:
        states = []
        for batch in data(7):
            run(offloader, [batch])
            states.append(int(offloader.structure.state_dict()["drawn.count"]))
    assert where == [overlap] * 3 and states[0] == 3
