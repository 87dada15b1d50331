"""DESIGN §10, 7: a resumed run equals an uninterrupted one, bit for bit."""

import json
import signal
from pathlib import Path

import pytest
import torch

from offload_trainer import UserError, snapshot
from offload_trainer.device import ranks
from offload_trainer.master import CheckpointStore, find_checkpoint
from tests.test_offloader import ADAMW, SGD, data, network, offloader, run

CASES = {
    "adamw carry": {"factory": ADAMW},
    "sgd carry": {"factory": SGD},
    "adamw reset": {"factory": ADAMW, "state": "reset"},
    "bernoulli global": {"factory": ADAMW, "sampler": "bernoulli", "budget": "global"},
    "keep 1": {"factory": ADAMW, "keep": 1.0},
    "disarm": {"factory": ADAMW, "estimator": "disarm"},
    "credit": {"factory": SGD, "estimator": "credit", "explore_steps": 20},
    "control linear": {"factory": ADAMW, "control": "linear"},
    "cubic": {"factory": SGD, "schedule": "cubic", "start_keep": 1.0, "schedule_steps": 20},
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("settled", [False, True], ids=["exploring", "settled"])
def test_resume_equals_uninterrupted(tmp_path: Path, case: str, settled: bool) -> None:
    batches = data(25)
    store = CheckpointStore(tmp_path)
    model = network()
    torch.manual_seed(5)
    with offloader(model, sync_every=5, **CASES[case]) as whole:
        run(whole, batches[:5])
        if settled:
            whole.settle()
        run(whole, batches[5:15])
        snapshot.save(whole, store)
        expected = run(whole, batches[15:])

    torch.manual_seed(99)  # nothing of the new process may matter
    with offloader(network(seed=7), sync_every=5, **CASES[case]) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert (resumed.steps, resumed.rounds, resumed.agenda.settled) == (15, 3, settled)
        assert run(resumed, batches[15:]) == expected
    for name, tensor in whole.master.items():
        assert torch.equal(tensor, resumed.master[name]), name
    for name, tensor in whole.structure.state_dict().items():
        assert torch.equal(tensor, resumed.structure.state_dict()[name]), name


def test_a_checkpoint_holds_no_pickle_and_only_known_files(tmp_path: Path) -> None:
    with offloader(network(), sync_every=5) as trainer:
        run(trainer, data(5))
        path = snapshot.save(trainer, CheckpointStore(tmp_path))
    names = sorted(file.name for file in path.iterdir())
    assert names == [
        "checkpoint.json",
        "moments.exp_avg.safetensors",
        "moments.exp_avg_sq.safetensors",
        "random.safetensors",
        "structure.safetensors",
        "weights.safetensors",
    ]
    json.loads((path / "checkpoint.json").read_text())


@pytest.mark.parametrize("steps", [3, 5, 8, 14])
def test_a_checkpoint_within_a_round_is_of_its_beginning(tmp_path: Path, steps: int) -> None:
    """What Ctrl-C leaves: nothing of the broken round, everything before it."""
    batches = data(20)
    model = network()
    torch.manual_seed(5)
    with offloader(model, sync_every=5) as whole:
        expected = run(whole, batches)
    model = network()
    torch.manual_seed(5)
    with offloader(model, sync_every=5) as broken:
        run(broken, batches[:steps])
        snapshot.save(broken, CheckpointStore(tmp_path))
    with offloader(network(seed=7), sync_every=5) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert resumed.steps == steps // 5 * 5
        assert run(resumed, batches[resumed.steps :]) == expected[steps // 5 * 5 :]


def test_an_interrupt_within_a_write_back_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with offloader(network(), sync_every=5) as trainer:
        end = trainer._bench.writeback.merge

        def interrupted() -> object:
            signal.raise_signal(signal.SIGINT)
            return end()

        monkeypatch.setattr(trainer._bench.writeback, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(trainer, data(5))
            trainer.finish_round()
        assert (trainer.steps, trainer.rounds) == (5, 1)
        assert trainer.boundary().numbers["steps"] == 5


def test_a_checkpoint_of_the_first_round_is_of_the_plan_that_s_starts_from(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    with offloader(network(), sync_every=5) as whole:
        whole.start_from({name: torch.rand(len(s), generator=generator) for name, s in whole.structure.s.items()}, 0.3)
        run(whole, data(2))
        snapshot.save(whole, CheckpointStore(tmp_path))
        plan, losses = whole.plan, run(whole, data(12)[2:])
    with offloader(network(seed=7), sync_every=5) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        run(resumed, data(2))
        assert resumed.plan == plan
        assert run(resumed, data(12)[2:]) == losses


def test_an_interrupt_before_a_write_back_forgets_what_the_round_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with offloader(network(), sync_every=5, control="linear") as trainer:
        run(trainer, data(9))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as once:
            once.setattr(ranks, "average_buffers", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(trainer, data(10)[9:])
        assert trainer.steps == 5
        ended = [run(trainer, data(12)[5:]), trainer.structure.state_dict()]
    with offloader(network(), sync_every=5, control="linear") as trainer:
        run(trainer, data(5))
        assert ended[0] == run(trainer, data(12)[5:])
        assert all(torch.equal(ended[1][name], x) for name, x in trainer.structure.state_dict().items())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_broken_write_back_makes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    with offloader(network(), sync_every=5, overlap=overlap) as trainer:
        monkeypatch.setattr(trainer._bench.transfer, "merge", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(trainer, data(5))
            trainer.finish_round()
        with pytest.raises(RuntimeError, match="broken off"):
            snapshot.save(trainer, CheckpointStore(tmp_path))
        trainer._rounds._ended = None


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    with offloader(network(), sync_every=5) as trainer:
        run(trainer, data(5))
        snapshot.save(trainer, CheckpointStore(tmp_path))
        wider = {"0.weight": torch.zeros(13, 3, 3, 3)}
        with pytest.raises(
            UserError, match=r"is of another model: 0.weight is \(12, 3, 3, 3\) there, \(13, 3, 3, 3\) here"
        ):
            snapshot.check(find_checkpoint(tmp_path), wider, {}, set(), trainer.structure)
