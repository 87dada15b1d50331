"""The same invariants with the master pinned on the host and the subnet on a GPU."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from offload_trainer import Group, Groups, Offloader, Plan, Slot, Structure, find_groups, memory, snapshot
from offload_trainer.batches import pinned
from offload_trainer.device import elements, swap, transfer, workbench
from offload_trainer.device.streams import Event, SideStream
from offload_trainer.device.swap import Swap
from offload_trainer.device.transfer import LINK_CHUNK, Transfer
from offload_trainer.device.workbench import Workbench
from offload_trainer.evaluation import evaluate, evaluate_full
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import CheckpointStore, Slab, find_checkpoint
from offload_trainer.master.precision import FP32, Precision
from offload_trainer.result import recalibrate_master
from tests.test_offloader import ADAMW, SGD, Factory, data, loss_fn, network, run
from tests.test_pipeline import CASES, MODELS, assert_same, make, races, result  # noqa: F401
from tests.test_precision import BF16, above, awkward, below, kept, raw

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these small networks send in one part goes in several, as a large one's does."""
    monkeypatch.setattr(transfer, "PART", 2**12)
    monkeypatch.setattr(elements, "PATCH", 2**10)
    monkeypatch.setattr(swap, "ARRIVING", 2**10)


AS_FAR_AS_POSSIBLE = pytest.mark.filterwarnings("ignore:.*eterministic")
"""Some kernels have no deterministic form and say so; at these sizes they are deterministic all the same."""


def on_gpu(batches: list) -> list:
    return [(x.to(CUDA), y.to(CUDA)) for x, y in batches]


def offloader(
    model: nn.Module, factory: Factory, keep: float, sync_every: int, precision: Precision = FP32, **structure
) -> Offloader:
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    made = Structure(groups, keep, **structure)
    return Offloader(
        model, groups, loss_fn, optimizer=factory, structure=made, sync_every=sync_every, precision=precision
    )


def test_batches_are_pinned_as_far_as_they_can_be() -> None:
    sparse, there = torch.eye(4).to_sparse(), torch.ones(4, device=CUDA)
    batch = {"a": torch.arange(8)[2:6], "b": (torch.rand(4, 3), sparse, None), "c": [there]}
    found = pinned(batch)
    assert found["a"].is_pinned() and torch.equal(found["a"], batch["a"])
    assert found["b"][0].is_pinned() and found["b"][1] is sparse and found["b"][2] is None
    assert found["c"][0] is there


def test_a_slab_is_pinned_at_its_exact_size_and_let_go() -> None:
    before = Slab({"a": torch.Size([1100, 77])}, torch.float32, pin=True)
    slab = Slab({"a": torch.Size([1000, 77])}, torch.float32, pin=True, over=before)
    assert slab.flat.data_ptr() == before.flat.data_ptr()
    before.close()  # nothing of it is left to unpin
    assert slab.flat.is_pinned()
    assert slab.nbytes <= 77_000 * 4 + 128
    slab.close()
    assert not slab.flat.is_pinned()


@AS_FAR_AS_POSSIBLE
@pytest.mark.parametrize("factory", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_keep_1_is_plain_training_bit_for_bit(factory: Factory, deterministic: None) -> None:
    plain = network().to(CUDA)
    optimizer = factory(list(plain.parameters()))
    torch.cuda.manual_seed(5)
    for batch in on_gpu(data(20)):
        loss_fn(plain, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.manual_seed(5)
    model = network()
    torch.cuda.manual_seed(5)
    with offloader(model, factory, 1.0, 7) as trainer:
        run(trainer, on_gpu(data(20)))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor.cpu(), trainer.master[name]), name


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
def test_a_round_changes_what_the_plan_keeps_and_nothing_else(sampler: str) -> None:
    with offloader(network(), ADAMW, 0.5, 7, sampler=sampler) as trainer:
        for start in range(0, 28, 7):
            trainer.begin_round()
            plan, subnet = trainer.plan, trainer.subnet
            assert all(p.is_cuda for p in subnet.parameters())
            before = {name: tensor.clone() for name, tensor in trainer.master.items()}
            run(trainer, on_gpu(data(28)[start : start + 7]))
            trained = dict(subnet.named_parameters()) | dict(subnet.named_buffers())
            for name, tensor in trainer.master.items():
                inside = torch.zeros(tensor.shape, dtype=torch.bool)
                kept = zip(plan.indices(name), tensor.shape, strict=True)
                rows = [torch.arange(size) if index is None else index for index, size in kept]
                inside[torch.meshgrid(*rows, indexing="ij") if rows else ()] = True
                assert torch.equal(tensor[~inside], before[name][~inside]), name
                assert torch.equal(tensor[inside], trained[name].detach().cpu().flatten()), name


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_nothing_full_size_touches_the_device(autocast: str) -> None:
    """Training and evaluating a network whose master is far larger than its subnet: the peak says so."""
    hidden = [layer for _ in range(6) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), *hidden, nn.Linear(4096, 5))
    full = sum(p.numel() * 4 for p in model.parameters())
    batches = [(torch.randn(8, 64, device=CUDA), torch.randint(5, (8,), device=CUDA)) for _ in range(10)]
    groups = find_groups(model, (torch.zeros(3, 64),))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    accelerator, structure = Accelerator(mixed_precision=autocast), Structure(groups, 0.125)
    with Offloader(
        model, groups, loss_fn, optimizer=SGD, structure=structure, sync_every=5, accelerator=accelerator
    ) as trainer:
        run(trainer, batches)
        metrics = lambda module, batch: {"loss": loss_fn(module, batch)}  # noqa: E731
        whole = evaluate_full(trainer.model, batches, metrics, lambda _: 8, trainer.accelerator)
        # A layer is a sixth of it, and half that again when narrowed; so is the libraries' workspace, if it is new.
        assert torch.cuda.max_memory_allocated() - start < 0.6 * full
        on_host = [(x.cpu(), y.cpu()) for x, y in batches]
        expected = sum(loss_fn(trainer.model, batch).item() for batch in on_host) / len(on_host)
        assert whole["loss"] == pytest.approx(expected, rel=1e-4 if autocast == "no" else 1e-2)
        assert all(parameter.device.type == "cpu" for parameter in trainer.model.parameters())
        small = trainer.export().to(CUDA)
        evaluate(small, batches, metrics, lambda _: 8, trainer.accelerator)


def test_the_masters_batchnorm_is_recalibrated_on_the_host() -> None:
    """It passes through the device, where its statistics are gathered; they come back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    same = copy.deepcopy(model)
    batches = [torch.randn(4, 3, 5, 5) * (1 + i) for i in range(3)]
    recalibrate_master(model, batches, lambda module, batch: module(batch).mean(), Accelerator())
    with torch.no_grad():
        x = [same[0](batch) for batch in batches]
    norm, near = model[1], {"rtol": 1e-2, "atol": 1e-2}  # convolutions of a device may be of TF32
    assert norm.running_mean.device.type == "cpu" and int(norm.num_batches_tracked) == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([y.mean((0, 2, 3)) for y in x]).mean(0), **near)
    torch.testing.assert_close(norm.running_var, torch.stack([y.var((0, 2, 3)) for y in x]).mean(0), **near)


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])  # rounds that overlap, and others
def test_memory_does_not_grow_over_200_rounds(sampler: str) -> None:
    with offloader(network(), ADAMW, 0.5, 1, sampler=sampler, paired_batches=1) as trainer:
        batches = on_gpu(data(10))
        run(trainer, batches * 20)
        memory.trim_heap()
        before, host = torch.cuda.memory_allocated(), memory.host_bytes()
        run(trainer, batches * 20)
        memory.trim_heap()
        assert trainer.rounds >= 200
        assert torch.cuda.memory_allocated() <= before + 2**16
        assert memory.host_bytes() - host < 2**22


def test_cuda_graphs_train_as_the_module_does() -> None:
    """Also across rounds, whose values arrive where the graphs read them."""
    losses = []
    for compile in (False, "graphs"):
        model = network()
        for dropout in filter(lambda module: isinstance(module, nn.Dropout), model.modules()):
            dropout.p = 0.0  # type: ignore[assignment]  # what is compiled draws other numbers
        groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
        structure = Structure(groups, 0.5, paired_batches=1)
        with Offloader(
            model, groups, loss_fn, optimizer=SGD, structure=structure, sync_every=4, compile=compile
        ) as trainer:
            losses.append(run(trainer, on_gpu(data(20))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    torch._dynamo.reset()


@pytest.fixture
def late_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's streams get ahead of and behind one another, by more than a step takes."""
    chance = random.Random(0)

    def sleep() -> None:
        torch.cuda._sleep(chance.choice([1, 1, 1, 2**20, 2**23]))  # cycles: the last takes some 5 ms

    after, step, arrived = SideStream.after, Workbench.step, Transfer.arrived

    def late_after(self: SideStream, event: Event) -> Any:
        context = after(self, event)
        with self.open():
            sleep()
        return context

    def late(whole: Any, *arguments: Any) -> Any:
        sleep()
        result = whole(*arguments)
        sleep()
        return result

    monkeypatch.setattr(SideStream, "after", late_after)
    monkeypatch.setattr(Workbench, "step", lambda self: late(step, self))
    monkeypatch.setattr(Transfer, "arrived", lambda *arguments: late(arrived, *arguments))


OVERLAPPING = (
    "adamw",
    "fused",
    "sgd",
    "reset",
    "every step",
    "credit",
    "narrow weights",
    "narrow",
    "one group",
    "keep 1",
    "fresh",
)


def to_gpu(batch: Any) -> Any:
    return tuple(part.to(CUDA) for part in batch) if isinstance(batch, tuple) else batch.to(CUDA)


@AS_FAR_AS_POSSIBLE
@pytest.mark.usefixtures("races", "late_streams")
@pytest.mark.parametrize("case", OVERLAPPING)
@pytest.mark.parametrize("kind", MODELS)
def test_overlapping_rounds_equal_others_bit_for_bit(kind: str, case: str, deterministic: None) -> None:
    """Copies that race the training stream would show here, beside what the CPU's test of the same shows."""
    ended, losses = [], []
    for overlap in (False, True):
        with make(kind, overlap=overlap, **CASES[case]) as trainer:
            torch.manual_seed(5)
            losses.append([loss for batch in MODELS[kind][1](17) for loss in run(trainer, [to_gpu(batch)])])
            trainer.finish_round()
            ended.append(result(trainer))
    assert losses[0] == losses[1]
    assert_same(*ended)


@AS_FAR_AS_POSSIBLE
@pytest.mark.usefixtures("late_streams")
def test_a_run_that_settles_equals_one_that_does_not_overlap(deterministic: None) -> None:
    """Memory of the reference is let go while its values may still be leaving."""
    ended = []
    for overlap in (False, True):
        with make("cnn", overlap=overlap) as trainer:
            torch.manual_seed(5)
            for step, batch in enumerate(on_gpu(data(30))):
                if step == 12:
                    trainer.settle()
                run(trainer, [batch])
            trainer.finish_round()
            ended.append(result(trainer))
    assert_same(*ended)


@AS_FAR_AS_POSSIBLE
@pytest.mark.usefixtures("late_streams")
def test_tensors_that_stay_in_place(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs want it, without them."""
    ended = []
    for in_place in (False, True):
        monkeypatch.setattr(workbench, "Swap", lambda *a, **_: Swap(*a, in_place=in_place))  # noqa: B023
        with make("llama", overlap=True) as trainer:
            torch.manual_seed(5)
            run(trainer, [to_gpu(batch) for batch in MODELS["llama"][1](17)])
            trainer.finish_round()
            ended.append(result(trainer))
    assert_same(*ended)


@AS_FAR_AS_POSSIBLE
@pytest.mark.usefixtures("late_streams")
def test_a_checkpoint_of_overlapping_rounds_is_resumed(tmp_path: Path, deterministic: None) -> None:
    batches = on_gpu(data(18))
    with make("cnn", overlap=True) as whole:
        torch.manual_seed(5)
        run(whole, batches[:9])
        snapshot.save_meanwhile(whole, CheckpointStore(tmp_path))
        expected = run(whole, batches[9:])
        whole.finish_round()
        ended = result(whole)
    with make("cnn", overlap=True, seed=7) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert run(resumed, batches[9:]) == expected
        resumed.finish_round()
        assert_same(ended, result(resumed))


@pytest.mark.parametrize("start", [0, 5, 2**33 - 3])
def test_the_device_rounds_as_the_host_does(start: int) -> None:
    values = torch.cat([awkward(), torch.randn(2**17 + 7), torch.tensor([torch.inf, -torch.inf, 3.4e38])])
    for round in range(5):
        rounding = FP32.rounding(round, "weights")
        assert torch.equal(raw(rounding.narrow(values.to(CUDA), start).cpu()), raw(rounding.narrow(values, start)))


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
def test_a_round_rounds_what_the_plan_keeps_and_changes_no_bit_else(sampler: str) -> None:
    with offloader(network(), ADAMW, 0.5, 7, BF16, sampler=sampler) as trainer:
        for start in range(0, 28, 7):
            trainer.begin_round()
            plan, subnet = trainer.plan, trainer.subnet
            stores = {"weights": trainer.master, **trainer.moments}
            before = {kind: {n: t.clone() for n, t in store.items()} for kind, store in stores.items()}
            for name, tensor in named_tensors(subnet).items():
                gathered = trainer.master[name][kept(plan, name, trainer.master[name])]
                assert torch.equal(tensor.detach().cpu().flatten(), gathered.to(tensor.dtype)), name
            run(trainer, on_gpu(data(28)[start : start + 7]))
            trainer.finish_round()
            for kind, store in stores.items():
                for name, tensor in store.items():
                    inside = kept(plan, name, tensor)
                    assert torch.equal(raw(tensor[~inside]), raw(before[kind][name][~inside])), (kind, name)
            for name, trained in named_tensors(subnet).items():
                found = trainer.master[name][kept(plan, name, trainer.master[name])]
                exact = trained.detach().cpu().flatten()
                ends = (below(exact), above(exact)) if found.dtype == torch.bfloat16 else (exact, exact)
                assert bool(((found == ends[0]) | (found == ends[1])).all()), name


@AS_FAR_AS_POSSIBLE
def test_resume_equals_uninterrupted_from_a_narrow_master(tmp_path: Path, deterministic: None) -> None:
    batches, model = on_gpu(data(20)), network()
    torch.cuda.manual_seed(5)
    with offloader(model, ADAMW, 0.5, 5, BF16) as whole:
        whole.settle()
        run(whole, batches[:10])
        snapshot.save(whole, CheckpointStore(tmp_path))
        expected = run(whole, batches[10:])
    with offloader(network(seed=7), ADAMW, 0.5, 5, BF16) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert run(resumed, batches[10:]) == expected
    assert all(torch.equal(raw(whole.master[name]), raw(resumed.master[name])) for name in whole.master)


def test_types_change_on_the_device_in_pieces_and_the_link_carries_the_narrow_one() -> None:
    shape = torch.Size([4 * LINK_CHUNK // 1000 + 1, 1000])
    plan = Plan(Groups((Group("u", shape[0], (Slot("a", 0),)),), {"a": shape}), {"u": list(range(0, shape[0], 2))})
    master = {"a": torch.randn(shape).bfloat16()}
    shapes = {"a": plan.shape("a")}
    slab, layouts = Slab(shapes, torch.float32, CUDA), [(torch.float32, torch.bfloat16, shapes)]
    moves = Transfer(CUDA)
    moves.fetch(master, layouts, [slab], plan, "weights")
    assert torch.equal(slab["a"].cpu(), master["a"][::2].float())
    step = 1e-3 * torch.randn(slab["a"].shape, device=CUDA)
    exact = step.double().square().sum().item()
    slab["a"].add_(step)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    expected, rounding = slab["a"].cpu(), FP32.rounding(3, "weights")
    staged = moves.staging(layouts, [slab], "weights")
    unloading = moves.unload([slab], staged, rounding)
    squared = moves.merge(unloading.parts, master, plan, delta=True) - unloading.excess()
    assert torch.cuda.max_memory_allocated() - held <= 20 * LINK_CHUNK + 2**20
    assert torch.equal(raw(master["a"][::2]), raw(rounding.narrow(expected, 0)))
    assert squared == pytest.approx(exact, rel=0.02)
    assert moves.staging_bytes == slab.nbytes // 2 and moves.work.nbytes == slab.nbytes
    moves.close()
