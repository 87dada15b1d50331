"""DESIGN §10, 6: rounds whose transfers go on in the background equal those without, bit for bit."""

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from offload_trainer import Offloader, Structure, UserError, find_groups, memory, snapshot
from offload_trainer.device import transfer, workbench
from offload_trainer.device.elements import gather_into, patch
from offload_trainer.device.movers import Plain
from offload_trainer.device.pipeline import Pipeline, in_background
from offload_trainer.device.streams import Event
from offload_trainer.device.swap import Swap
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups import Groups, random_plan
from offload_trainer.groups.slicing import slice_module
from offload_trainer.master import CheckpointStore, checkpoint, find_checkpoint
from offload_trainer.master.precision import Precision
from tests.test_offloader import ADAMW, SGD, data, loss_fn, network, run

BF16 = torch.bfloat16
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"factory": SGD},
    "fused": {"factory": lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.99), fused=True)},
    "reset": {"state": "reset"},
    "vr_pge": {"estimator": "vr_pge", "lr": 0.1},
    "disarm": {"estimator": "disarm", "lr": 0.1},
    "control": {"control": "linear", "lr": 0.1},
    "credit": {"estimator": "credit", "explore": 0.4},
    "every step": {"sync_every": 1, "paired_batches": 1},
    "s stays": {"lr": 0.0},
    "narrow weights": {"precision": Precision(weights=BF16)},
    "narrow moments": {"precision": Precision(moments=BF16)},
    "narrow": {"precision": Precision(BF16, BF16, seed=3), "factory": SGD},
    "one group": {"per_group_keep": {"*0*": 0.5}},
    "keep 1": {"keep": 1.0},
    "little kept": {"keep": 0.15},
    "fresh": {"reference": "fresh"},
    "bernoulli": {"sampler": "bernoulli", "budget": "global"},
    "cubic": {"schedule": "cubic", "start_keep": 1.0, "schedule_steps": 12},
    "clipped": {"clip_norm": 0.1},
    "moved by torch": {"transfer": "plain"},
}


def llama(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=16, tie_word_embeddings=True, attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def text(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(31, (2, 8), generator=generator) for _ in range(count)]


def language_loss(module: nn.Module, tokens: Tensor) -> Tensor:
    return module(input_ids=tokens, labels=tokens, use_cache=False).loss


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], list], Any, Any]] = {
    "cnn": (network, data, loss_fn, (torch.zeros(3, 3, 8, 8),)),
    "llama": (llama, text, language_loss, {"input_ids": torch.zeros(2, 8, dtype=torch.long), "use_cache": False}),
}


def make(kind: str, *, overlap: bool, seed: int = 1, **case: Any) -> Offloader:
    model, _, loss, inputs = MODELS[kind]
    of_offloader = ("state", "precision", "reference", "clip_norm", "sync_every", "transfer")
    options = {"sync_every": 3} | {key: case.pop(key) for key in of_offloader if key in case}
    factory = case.pop("factory", ADAMW)
    full = model(seed)
    groups = find_groups(full, inputs)
    structure = Structure(groups, case.pop("keep", 0.5), paired_batches=case.pop("paired_batches", 2), **case)
    return Offloader(full, groups, loss, optimizer=factory, structure=structure, overlap=overlap, **options)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either side may be late at every hand-over, by more than a round takes. Tensors change places as on a GPU."""
    monkeypatch.setattr(workbench, "Swap", lambda *a, **_: Swap(*a, in_place=False))
    chance = random.Random(0)

    def late(function: Callable[..., Any], *arguments: Any) -> Any:
        time.sleep(chance.choice([0, 0, 0, 0, 0.004]))
        result = function(*arguments)
        time.sleep(chance.choice([0, 0, 0, 0, 0.004]))
        return result

    for name in ("gather", "arrived", "unload", "merge"):
        whole = getattr(Transfer, name)
        monkeypatch.setattr(Transfer, name, lambda *a, _whole=whole, **k: late(partial(_whole, **k), *a))
    whole_do = Pipeline.do
    monkeypatch.setattr(Pipeline, "do", lambda self, work: whole_do(self, partial(late, work)))


def result(trainer: Offloader) -> dict[str, Tensor]:
    """All that a run leaves, but what was timed."""
    held = {f"weights {name}": tensor for name, tensor in trainer.master.items()}
    for moment, tensors in trainer.moments.items():
        held |= {f"{moment} {name}": tensor for name, tensor in tensors.items()}
    held |= {f"structure {name}": tensor for name, tensor in trainer.structure.state_dict().items()}
    return {name: tensor.clone() for name, tensor in held.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("kind", MODELS)
def test_overlapping_rounds_equal_others_bit_for_bit(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, losses, differences, plans = [], [], [], []
    swaps, swap = [], Swap.do
    monkeypatch.setattr(Swap, "do", lambda *arguments: swaps.append(swap(*arguments)))
    for overlap in (False, True):
        with make(kind, overlap=overlap, **CASES[case]) as trainer:
            torch.manual_seed(5)
            losses.append([])
            differences.append([])
            plans.append([])
            for batch in MODELS[kind][1](17):
                losses[-1] += run(trainer, [batch])
                if not trainer.between_rounds:  # nor asked before it has to tell
                    plans[-1].append(trainer.plan.digest)
                    differences[-1].append(trainer.report.difference)
            trainer.finish_round()
            differences[-1].append(trainer.report.difference)
            ended.append(result(trainer))
        assert bool(swaps) == (overlap and case not in ("fresh", "bernoulli", "keep 1"))
    assert losses[0] == losses[1] and differences[0] == differences[1] and plans[0] == plans[1]
    assert_same(*ended)
    if case not in ("keep 1", "one group", "every step"):
        assert len(set(plans[0])) > 3  # rounds of different plans were compared


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("case", ["adamw", "narrow", "credit", "s stays"])
def test_the_trained_tensors_stay_where_cuda_graphs_read_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, places = [], []
    for in_place in (False, True):
        monkeypatch.setattr(workbench, "Swap", lambda *a, **_: Swap(*a, in_place=in_place))  # noqa: B023
        with make("llama", overlap=True, **CASES[case]) as trainer:
            torch.manual_seed(5)
            places.append(set())
            for batch in text(17):
                run(trainer, [batch])
                if not trainer.between_rounds:
                    places[-1].add(next(trainer.subnet.parameters()).data_ptr())
            trainer.finish_round()
            ended.append(result(trainer))
    assert [len(there) for there in places] == [2, 1]
    assert_same(*ended)


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("precision", [Precision(), Precision(BF16, BF16)], ids=["fp32", "bf16"])
def test_a_run_that_settles_and_is_looked_at(precision: Precision) -> None:
    """From importance to a settled plan, exported and looked at between and within rounds."""
    ended, seen = [], []
    for overlap in (False, True):
        with make("cnn", overlap=overlap, precision=precision) as trainer:
            torch.manual_seed(5)
            structure = trainer.structure
            scores = {name: torch.arange(len(s), dtype=torch.float32) for name, s in structure.s.items()}
            trainer.start_from(scores, 0.3)
            looked: list[Tensor] = []
            for step, batch in enumerate(data(44)):
                if step == 26:
                    trainer.settle()
                if step in (8, 14, 27, 40):
                    looked += [p.detach().clone() for p in trainer.export().parameters()]
                if step in (12, 19, 33):
                    looked.append(trainer.master["0.weight"].clone())
                looked.append(torch.tensor(run(trainer, [batch])))
            trainer.finish_round()
            ended.append(result(trainer))
            seen.append(looked)
    assert len(seen[0]) == len(seen[1])
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
    assert_same(*ended)


@pytest.mark.usefixtures("races")
@pytest.mark.parametrize("first", [False, True], ids=["to overlapping", "from overlapping"])
@pytest.mark.parametrize("steps", [3, 8, 11])
def test_a_run_is_resumed_either_way(tmp_path: Path, steps: int, first: bool) -> None:
    """A checkpoint taken at any step, while the background is at work, knows nothing of how the rounds were run."""
    batches = data(18)
    with make("cnn", overlap=first) as whole:
        torch.manual_seed(5)
        run(whole, batches[:steps])
        snapshot.save(whole, CheckpointStore(tmp_path))
        run(whole, batches[steps:])
        whole.finish_round()
        expected = result(whole)
    with make("cnn", overlap=not first, seed=7) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert resumed.steps == steps // 3 * 3
        run(resumed, batches[resumed.steps :])
        resumed.finish_round()
        assert_same(expected, result(resumed))


def test_transfers_are_hidden_behind_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather and write-back may take as long as the round; training does not wait for them."""
    for name in ("gather", "scatter"):

        def slow(whole: Callable[..., Any], pairs: list, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.004 * len(pairs))
            return whole(Plain(), pairs, **options)

        monkeypatch.setattr(Plain, name, partial(slow, getattr(Plain, name)))
    reports = []
    with make("cnn", overlap=True, factory=SGD, transfer="plain") as trainer:
        for batch in data(18):
            time.sleep(0.08)
            run(trainer, [batch])
            if trainer.between_rounds:
                reports.append(trainer.report)
    for report in reports[1:]:
        took, told = report.gather_ms + report.writeback_ms + report.link_ms, report.as_dict()
        assert took > 100 and report.waited_ms < took / 3
        assert told["overlapped_share"] == pytest.approx(1 - report.waited_ms / took)
        assert told["bytes_per_second"] == pytest.approx(1e3 * report.bytes_moved / took)
    total, reported = trainer.transfers.total(), sum(report.bytes_moved for report in reports)
    assert reported < total.bytes_moved < reported * (1 + 1.5 / len(reports))  # the last write-back as well
    assert total.waited_ms >= sum(report.waited_ms for report in reports)


@pytest.mark.usefixtures("races")
def test_a_checkpoint_is_written_while_the_next_round_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what the last round left, whatever the next one does meanwhile, and training does not wait for it."""
    let_go, write = threading.Event(), checkpoint.write_safetensors

    def slow(*arguments: Any) -> Any:
        if in_background():
            assert let_go.wait(60)
        return write(*arguments)

    stores = {overlap: CheckpointStore(tmp_path / str(overlap), keep_last=9) for overlap in (True, False)}
    for overlap, store in stores.items():
        let_go.clear()
        torch.manual_seed(5)
        with make("cnn", overlap=overlap) as trainer:
            run(trainer, data(6))
            monkeypatch.setattr(checkpoint, "write_safetensors", slow)
            snapshot.save_meanwhile(trainer, store)
            run(trainer, data(8)[6:])
            assert store.is_empty() == overlap
            let_go.set()
            run(trainer, data(12)[8:])
            snapshot.save_meanwhile(trainer, store)
    for step in (6, 12):
        found = [find_checkpoint(store.folder / f"step-{step:08d}") for store in stores.values()]
        for part in ("weights", "moments.exp_avg", "moments.exp_avg_sq", "structure", "random"):
            assert_same(*(one.read(part) for one in found))
        assert found[0].meta["offloader"]["delta_norm"] == found[1].meta["offloader"]["delta_norm"]


def test_a_checkpoint_that_fails_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with make("cnn", overlap=True) as trainer:
        run(trainer, data(3))
        snapshot.save_meanwhile(trainer, store)
        run(trainer, data(6)[3:])

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(checkpoint, "write_safetensors", full)
            snapshot.save_meanwhile(trainer, store)
            with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
                run(trainer, data(9)[6:])
        assert find_checkpoint(tmp_path).meta["step"] == 3
        assert trainer.boundary().numbers["steps"] == 6
        assert snapshot.save(trainer, store) == find_checkpoint(tmp_path).path
        trainer._rounds.under_way = None


def test_what_was_not_gathered_is_not_trained() -> None:
    """A failure leaves out what was to follow it. One who goes on all the same finds a subnet that is the master's."""
    with make("cnn", overlap=True) as trainer:
        run(trainer, data(6))
        trainer.at_boundary(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(trainer, data(9)[6:])
        trainer.finish_round()
        trainer.begin_round()
        sliced = slice_module(trainer.model, trainer.plan, trainer.groups).state_dict()
        for name, tensor in trainer.subnet.state_dict().items():
            assert torch.equal(tensor, sliced[name]), name
        run(trainer, data(12)[9:])


@pytest.mark.parametrize("moments", ["carry", "reset"])
@pytest.mark.parametrize("in_place", [False, True])
def test_training_waits_until_all_values_have_left(
    monkeypatch: pytest.MonkeyPatch, in_place: bool, moments: str
) -> None:
    """Those of tensors that no plan slices, too: they are trained where they are, and may leave last."""
    held: list[Event] = []
    wait = Event.wait
    monkeypatch.setattr(Event, "wait", lambda event: (held.append(event), wait(event))[1])
    monkeypatch.setattr(transfer, "PART", 256)
    monkeypatch.setattr(workbench, "Swap", lambda *a, **_: Swap(*a, in_place=in_place))
    with make("llama", overlap=True, state=moments, per_group_keep={"*mlp*": 0.5}) as trainer:
        run(trainer, text(9))
        held.clear()
        trainer.begin_round()
        unloaded = trainer._bench.writeback.unloaded
        assert unloaded.keys() == {"weights", *trainer.moments}
        assert len(set(unloaded["weights"].values())) > 3
        assert held and {event for events in unloaded.values() for event in events.values()} <= set(held)


def test_what_was_begun_is_finished_when_a_loop_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Transfer.merge
    monkeypatch.setattr(Transfer, "merge", lambda *a, **k: (time.sleep(0.05), whole(*a, **k))[1])
    trainer = make("cnn", overlap=True)
    with pytest.raises(RuntimeError, match="of the loop"), trainer:
        run(trainer, data(6))
        snapshot.save_meanwhile(trainer, CheckpointStore(tmp_path))
        raise RuntimeError("of the loop")
    assert find_checkpoint(tmp_path).meta["step"] == 6
    assert trainer.boundary().numbers["steps"] == 6


@pytest.mark.parametrize("step", ["gather", "merge"])
def test_what_the_background_raises_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """With its traceback. A gather that failed has damaged nothing, a write-back has: nothing is saved of that."""
    with make("cnn", overlap=True) as trainer:
        run(trainer, data(6))
        trainer.master  # noqa: B018  the background is done

        def failing_on_purpose(*_: Any, **__: Any) -> None:
            raise OSError("the disk is gone")

        monkeypatch.setattr(Transfer, step, failing_on_purpose)
        with pytest.raises(OSError, match="the disk is gone") as caught:
            run(trainer, data(12))
        assert "failing_on_purpose" in "".join(traceback.format_tb(caught.tb))
        if step == "gather":
            assert trainer.boundary().numbers["steps"] in (6, 9)
            snapshot.save(trainer, CheckpointStore(tmp_path))
            assert find_checkpoint(tmp_path).meta["step"] in (6, 9)
        else:
            with pytest.raises(RuntimeError, match="broken off"):
                snapshot.save(trainer, CheckpointStore(tmp_path))
            with pytest.raises((RuntimeError, OSError)):
                run(trainer, data(12))
        trainer._rounds.under_way = None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("races")
def test_an_interrupt_at_any_moment_neither_hangs_nor_divides_a_write_back(tmp_path: Path) -> None:
    batches = data(60)
    states = {}
    with make("cnn", overlap=True) as whole:
        torch.manual_seed(5)
        for i, batch in enumerate(batches):
            if i % 3 == 0:
                states[i] = result(whole)
            run(whole, [batch])
    chance = random.Random(1)
    for attempt in range(6):
        timer = threading.Timer(chance.uniform(0.05, 0.6), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), make("cnn", overlap=True) as trainer:
            timer.start()
            torch.manual_seed(5)
            try:
                for batch in batches * 100:
                    run(trainer, [batch])
                    if timer.finished.is_set() and not timer.is_alive():
                        raise KeyboardInterrupt  # Python drops one that comes within a weak reference's callback
            except KeyboardInterrupt:
                steps = trainer.boundary().numbers["steps"]
                store = CheckpointStore(tmp_path / str(attempt))
                snapshot.save(trainer, store)
                raise
        if steps in states:
            weights = find_checkpoint(tmp_path / str(attempt)).read("weights")
            for name, tensor in weights.items():
                assert torch.equal(tensor, states[steps][f"weights {name}"]), (steps, name)


@pytest.mark.parametrize("case", ["adamw", "fused"])
def test_steps_that_are_counted_are_those_that_the_optimizer_counts(case: str) -> None:
    """Of parameters that now and then get no gradient, too: on a device nobody reads the optimizer's own."""
    with make("cnn", overlap=True, **CASES[case]) as trainer:
        for i, batch in enumerate(data(20)):
            trainer.accelerator.backward(trainer.loss(batch))
            for j, parameter in enumerate(trainer.subnet.parameters()):
                if (i + j) % 3 == 0 and i:
                    parameter.grad = None
            trainer.step()
            trainer.begin_round()
            subnet = trainer._bench.subnet
            states = {name: subnet.optimizer.state.get(p, {}) for name, p in subnet.parameters.items()}
            own = {name: float(state["step"]) for name, state in states.items() if state}
            assert own and own == {name: subnet._steps[name] for name in own}


def test_nobody_waits_for_the_end_of_a_round_whose_successor_is_foreseen() -> None:
    """It is concluded once the next one has been given its first step, or where somebody asks what it showed."""
    batches = data(24)
    with make("cnn", overlap=True) as trainer:
        every = trainer.sync_every
        run(trainer, batches[: 2 * every])
        assert trainer._rounds._ended is not None and trainer.between_rounds
        trainer.accelerator.backward(trainer.loss(batches[2 * every]))
        assert trainer._rounds._ended is not None  # and the next one is under way
        trainer.step()
        assert trainer._rounds._ended is None
        run(trainer, batches[2 * every + 1 : 3 * every])
        assert trainer._rounds._ended is not None
        assert trainer.report.difference is not None
        assert trainer._rounds._ended is None


def test_a_round_that_ended_reaches_the_master_whatever_ends_the_block() -> None:
    batches = data(24)
    with make("cnn", overlap=True) as whole:
        torch.manual_seed(5)
        run(whole, batches[: 2 * whole.sync_every])
        expected = {name: tensor.clone() for name, tensor in whole.master.items()}
    broken = make("cnn", overlap=True)
    with pytest.raises(ArithmeticError), broken:
        torch.manual_seed(5)
        run(broken, batches[: 2 * broken.sync_every])
        assert broken._rounds._ended is not None
        raise ArithmeticError
    for name, tensor in broken._master.tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_loss_that_is_not_finite_leaves_the_last_round(tmp_path: Path) -> None:
    batches = data(24)
    with make("cnn", overlap=True) as trainer:
        torch.manual_seed(5)
        run(trainer, batches[:12])
        before = result(trainer)
        bad = [(batches[12][0] * float("nan"), batches[12][1])]
        with pytest.raises(UserError, match="the loss is nan at step 13, round 4"):
            run(trainer, bad + batches[13:16])
        assert_same(before, result(trainer))
        assert trainer.steps == 12
        run(trainer, batches[12:])
        ended = result(trainer)
    with make("cnn", overlap=False) as trainer:
        torch.manual_seed(5)
        run(trainer, batches)
        assert_same(ended, result(trainer))


def plans(groups: Groups) -> Iterator[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    for keep in (0.2, 0.5, 0.9, 1.0):
        for other in (0.2, 0.5, 1.0):
            yield random_plan(groups, generator, keep), random_plan(groups, generator, other)


@pytest.mark.parametrize("kind", MODELS)
def test_a_patch_copies_what_two_plans_share_and_nothing_else(kind: str) -> None:
    model = MODELS[kind][0]()
    groups = find_groups(model, MODELS[kind][3])
    for plan, other in plans(groups):
        for name, shape in groups.shapes.items():
            full = torch.arange(shape.numel(), dtype=torch.float32).view(shape)
            small, target = torch.empty(plan.shape(name)), torch.empty(other.shape(name))
            gather_into(small, full, plan.indices(name))
            gather_into(target, full, other.indices(name))
            kept = torch.isin(target, small)
            patch(target, -small - 1, plan.shared(other, name))
            whole = torch.empty(other.shape(name))
            gather_into(whole, full, other.indices(name))
            assert torch.equal(target, torch.where(kept, -whole - 1, whole)), name


def test_memory_does_not_grow_over_200_rounds() -> None:
    with make("cnn", overlap=True, sync_every=1, paired_batches=1) as trainer:
        batches = data(10)
        run(trainer, batches * 5)
        memory.trim_heap()
        before = memory.host_bytes()
        run(trainer, batches * 20)
        memory.trim_heap()
        assert trainer.rounds >= 200
        assert memory.host_bytes() - before < 2**21
