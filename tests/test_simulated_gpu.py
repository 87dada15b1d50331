"""What goes on beside training on a GPU, in every order that its streams and events allow: see tests/simulated.

DESIGN §10, 6, and what can be had of 2 and 8 without a GPU; test_gpu.py has them on a real one.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from offload_trainer import Structure, evaluation, find_groups, making
from offload_trainer import train as run
from offload_trainer.config import parse
from offload_trainer.device import elements, swap, transfer, workbench
from offload_trainer.device.streams import Event, HostCopy, SideStream
from offload_trainer.device.swap import Swap
from offload_trainer.device.transfer import Transfer
from offload_trainer.device.writeback import WriteBack
from offload_trainer.forecast import sizes
from offload_trainer.forecast.predictor import Predictor
from offload_trainer.forecast.sizes import Sizes
from offload_trainer.master import Precision, Slab, probe_optimizer
from offload_trainer.offloader import Offloader
from offload_trainer.tasks import causal_lm
from tests.runs import config, metrics
from tests.simulated import CUDA, Gpu, Simulated, simulated
from tests.test_any_order import compare
from tests.test_ledger import CASES as CASES_OF_LEDGER
from tests.test_ledger import adamw, half, predictor, sgd, sliced
from tests.test_offloader import ADAMW, data
from tests.test_pipeline import CASES, MODELS, assert_same, language_loss, llama, make, result, text


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    with simulated(monkeypatch, seed=getattr(request, "param", 0)) as gpu:
        yield gpu


def on_gpu(batch: Any) -> Any:
    return tuple(part.to(CUDA) for part in batch) if isinstance(batch, tuple) else batch.to(CUDA)


def train(trainer: Offloader, batches: list[Any]) -> list[Tensor]:
    """Losses, which nobody waits for: else streams could not get far apart."""
    losses = []
    for batch in batches:
        loss = trainer.loss(on_gpu(batch))
        trainer.accelerator.backward(loss)
        trainer.step()
        losses.append(loss.detach())
    return losses


def be_late(gpu: Gpu, trainer: Offloader, late: str) -> None:
    bench = trainer._bench
    streams = {"leaving": bench.transfer._down._stream, "arriving": bench._swap._link._stream}
    gpu.late = streams.get(late, gpu.default)  # type: ignore[assignment]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """To its last list comes all that the master holds after each write-back: what one spoils, the next may mend."""
    lists: list[list[Tensor]] = []
    whole = WriteBack._merged

    def noted(writeback: WriteBack) -> None:
        whole(writeback)
        for held in (writeback._master.tensors, *writeback._master.moments.values()):
            lists[-1] += [tensor.clone() for tensor in held.values()]

    monkeypatch.setattr(WriteBack, "_merged", noted)
    return lists


def test_it_computes_as_the_cpu_does(gpu: Gpu) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    there = torch.nn.Linear(4, 3).to(CUDA)
    there.load_state_dict(layer.state_dict())
    optimizers = [torch.optim.AdamW(one.parameters(), fused=fused) for one, fused in ((layer, False), (there, True))]
    for _ in range(3):
        layer(x).square().sum().backward()
        there(x.to(CUDA)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(there.weight, Simulated) and there.weight.device == CUDA
    torch.testing.assert_close(there.weight.cpu(), layer.weight, rtol=1e-6, atol=1e-6)
    assert there.weight.grad is not None and torch.equal(there.weight.grad.cpu(), layer.weight.grad)


def test_streams_wait_for_nothing_but_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the host that is on its way, another stream's values, and values whose memory was let go."""
    assert all(hand_over(monkeypatch, seed, "memory", "stream", "host") == [3.0] * 4 for seed in range(30))
    for left_out in ("memory", "stream", "host"):
        waits = {"memory", "stream", "host"} - {left_out}
        assert any(hand_over(monkeypatch, seed, *waits) != [3.0] * 4 for seed in range(30)), left_out


def hand_over(monkeypatch: pytest.MonkeyPatch, seed: int, *waits: str) -> list[float]:
    """2 x + 1 by way of two streams and back; x is 1."""
    with monkeypatch.context() as patch, simulated(patch, seed):
        lane, slab = SideStream(CUDA), Slab({"x": torch.Size([4])}, torch.float32, pin=True)
        slab.flat.fill_(1.0)
        sent = slab["x"].to(CUDA, non_blocking=True)
        if "memory" in waits:
            Event(CUDA).synchronize()
        slab.flat.fill_(7.0)
        doubled = sent * 2
        with lane.after(Event(CUDA)) if "stream" in waits else lane.open():
            more = doubled + 1
            done = Event(CUDA)
        if "stream" in waits:
            done.wait()
        del doubled
        back = HostCopy({"x": more}, CUDA)
        found = (back.result() if "host" in waits else back._values)["x"].tolist()
        slab.close()
        return found


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        *[(case, False) for case in ("adamw", "fused", "sgd", "every step", "narrow", "one group", "bernoulli")],
        *[(case, in_place) for case in ("credit", "s stays") for in_place in (False, True)],
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_overlapping_rounds_equal_others_bit_for_bit(
    kind: str, case: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART", 2**12)  # what is sent in one part goes in several, as a large network's does
    monkeypatch.setattr(elements, "PATCH", 2**10)
    monkeypatch.setattr(swap, "ARRIVING", 2**10)
    monkeypatch.setattr(workbench, "Swap", lambda *arguments, **_: Swap(*arguments, in_place=in_place))
    swaps, do = [], Swap.do
    monkeypatch.setattr(Swap, "do", lambda *arguments: swaps.append(do(*arguments)))
    ended = []
    for overlap in (False, True):
        with (
            monkeypatch.context() as patch,
            simulated(patch, seed=len(case)) as gpu,
            make(kind, overlap=overlap, **CASES[case]) as trainer,
        ):
            torch.manual_seed(5)
            losses = train(trainer, MODELS[kind][1](20))
            trainer.finish_round()
            shown = {f"loss {i}": loss.cpu() for i, loss in enumerate(losses)}
            ended.append(result(trainer) | shown | {"delta": torch.tensor(trainer._bench.writeback.delta_norm)})
            assert type(next(trainer.subnet.parameters())) is Simulated
        assert not gpu.pinned
        assert bool(swaps) == (overlap and case != "bernoulli")
    assert_same(*ended)


@pytest.mark.parametrize("late", ["training", "leaving", "arriving"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("factory", [ADAMW, lambda params: torch.optim.SGD(params, lr=0.05)], ids=["adamw", "sgd"])
def test_one_stream_is_late(
    factory: Callable[[Any], torch.optim.Optimizer],
    in_place: bool,
    late: str,
    written: list[list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As late as can be, which chance rarely has. What leaves last is of tensors that no plan slices: they are trained
    where they are, and the next round mends in the master what this one spoils."""
    monkeypatch.setattr(transfer, "PART", 2**10)
    monkeypatch.setattr(workbench, "Swap", lambda *arguments, **_: Swap(*arguments, in_place=in_place))
    torch.manual_seed(0)
    parts = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64)]
    model, batches = nn.Sequential(*parts), torch.randn(12, 4, 8)
    groups = find_groups(model, (torch.zeros(3, 8),))
    for overlap in (False, True):
        written.append([])
        structure = Structure(groups, 0.5, per_group_keep={"0": 0.5})
        made = {"optimizer": factory, "structure": structure, "sync_every": 2, "overlap": overlap}
        loss = lambda module, x: module(x).square().mean()  # noqa: E731
        with (
            monkeypatch.context() as patch,
            simulated(patch, seed=0) as gpu,
            Offloader(copy.deepcopy(model), groups, loss, **made) as trainer,
        ):
            be_late(gpu, trainer, late)
            train(trainer, list(batches))
            trainer.finish_round()
    assert len(written[0]) == len(written[1]) and trainer.rounds == 6
    assert all(map(torch.equal, *written))


@pytest.mark.parametrize("late", ["training", "leaving"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_settled_run_equals_one_that_does_not_overlap(
    kind: str, late: str, written: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that trains the last one's plan trains the very tensors whose values may still be leaving: nobody has
    asked for them yet, for the background is late as well."""
    whole = Transfer.merge
    monkeypatch.setattr(Transfer, "merge", lambda *a, **k: (time.sleep(0.1), whole(*a, **k))[1])
    for overlap in (False, True):
        written.append([])
        with monkeypatch.context() as patch, simulated(patch, 0) as gpu, make(kind, overlap=overlap) as trainer:
            torch.manual_seed(5)
            batches = MODELS[kind][1](12)
            train(trainer, batches[:6])
            trainer.settle()
            be_late(gpu, trainer, late)
            train(trainer, batches[6:])
            trainer.finish_round()
    assert len(written[0]) == len(written[1])
    assert all(map(torch.equal, *written))


@pytest.mark.parametrize("seed", range(40, 52))
def test_whatever_is_done_rounds_that_overlap_change_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated(monkeypatch, seed):
        compare(seed, tmp_path, monkeypatch, place=on_gpu)


@pytest.mark.parametrize("case", ["adamw", "fused", "sgd", "reset", "narrow", "credit", "control"])
def test_the_host_waits_once_in_a_round(case: str, gpu: Gpu) -> None:
    """For what the last one showed, when it has given the device the first step of this one."""
    with make("cnn", overlap=True, sync_every=6, **CASES[case]) as trainer:
        train(trainer, data(13))
        for _ in range(3):
            steps = []
            for batch in data(6):
                batch, before = on_gpu(batch), gpu.waited
                trainer.accelerator.backward(trainer.loss(batch))
                trainer.step()
                steps.append(gpu.waited - before)
            assert sorted(steps)[:-1] == [0] * 5 and max(steps) <= 1, steps


class Residual(nn.Module):
    """Two weights a block, sliced on one axis each."""

    def __init__(self, blocks: int):
        super().__init__()
        parts = [nn.Linear(16, 24, bias=False), nn.ReLU(), nn.Linear(24, 16, bias=False)]
        self.blocks = nn.ModuleList([nn.Sequential(*copy.deepcopy(parts)) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def chain(layers: int) -> nn.Module:
    """A weight a layer, sliced on both axes, and a bias."""
    hidden = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 16))


@pytest.mark.parametrize(("network", "launches"), [(Residual, 8 + 8), (chain, 20 + 8)])
def test_a_swap_is_few_launches(
    network: Callable[[int], nn.Module], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of AdamW, two moments, for one more block or layer: what the host does before a round's first forward."""
    counts, do = [], Swap.do
    for blocks in (4, 8):
        model, batches = network(blocks), torch.randn(12, 4, 16)
        groups = find_groups(model, (torch.zeros(3, 16),))
        with monkeypatch.context() as patch, simulated(patch, 0) as gpu:

            def counted(*arguments: Any, gpu: Gpu = gpu) -> None:
                before = gpu.launched
                do(*arguments)
                counts.append(gpu.launched - before)

            patch.setattr(Swap, "do", counted)
            loss = lambda module, x: module(x).square().mean()  # noqa: E731
            made = {"optimizer": ADAMW, "structure": Structure(groups, 0.5), "sync_every": 3}
            with Offloader(model, groups, loss, **made) as trainer:
                train(trainer, list(batches))
    assert len(counts) == 6 and counts[5] - counts[2] == 4 * launches


@pytest.mark.parametrize("precision", [Precision(), Precision(torch.bfloat16, torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", [Residual, chain])
def test_what_a_swap_takes_on_the_device_is_foreseen(
    network: Callable[[int], nn.Module], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LINK_CHUNK", 2**6)
    for module, name, size in ((swap, "ARRIVING", 600), (elements, "PATCH", 64)):
        monkeypatch.setattr(module, name, size)
        monkeypatch.setattr(sizes, name, size)
    model, batches = network(6), torch.randn(18, 4, 16)
    groups = find_groups(model, (torch.zeros(3, 16),))
    structure = Structure(groups, 0.5)
    took, do = [], Swap.do

    def measured(*arguments: Any) -> None:
        before = gpu.peak = gpu.allocated
        do(*arguments)
        took.append(gpu.peak - before)

    with simulated(monkeypatch, 0) as gpu:
        monkeypatch.setattr(Swap, "do", measured)
        state_spec = probe_optimizer(ADAMW, torch.float32, CUDA, carry=True)
        loss = lambda module, x: module(x).square().mean()  # noqa: E731
        with Offloader(
            model, groups, loss, optimizer=ADAMW, structure=structure, sync_every=3, precision=precision
        ) as trainer:
            plan = trainer.plan
            train(trainer, list(batches))
    predicted = Sizes(network(6), state_spec, precision, plan, groups.sliced_by(structure.names))
    foreseen = predicted.arriving(on_host=False)
    assert len(took) == 5 and foreseen / 2 < max(took) <= foreseen, (took, foreseen)


@pytest.mark.parametrize(("name", "factory"), [("mlp", adamw), ("convolutional", sgd), ("llama", adamw)])
def test_the_peak_of_overlapping_rounds_is_foreseen(
    name: str, factory: Callable[..., torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last plans share entries is on the device as well: less than a hundredth here."""
    case = CASES_OF_LEDGER[name]()
    model, batch, inputs, loss_fn = case
    groups, plan = half(model, inputs)
    monkeypatch.setattr(Predictor, "_on_host", False)
    told = replace(predictor(case, groups, factory, True), overlap=True)
    ledger = told.ledger(plan, reference=True, sampled=sliced(plan), ahead=True)
    names = ("forward and backward", "optimizer step", "write-back", "swap")
    foreseen = max(p.device_bytes - p.device["batch"] for p in ledger.phases if p.name in names)
    structure = Structure(groups, 0.5)
    with (
        simulated(monkeypatch, 0) as gpu,
        Offloader(model, groups, loss_fn, optimizer=factory, structure=structure, sync_every=2) as trainer,
    ):
        there = on_gpu(batch)
        held = gpu.allocated
        train(trainer, [there] * 7)
        assert foreseen <= gpu.peak - held <= 1.01 * foreseen
        assert trainer._bench.ahead is not None


def test_a_language_model_keeps_nobody_waiting(gpu: Gpu) -> None:
    """transformers' own forward does, once; the loss is the same."""
    torch.manual_seed(0)
    model, tokens = llama().to(CUDA).eval(), text(1)[0].to(CUDA)
    waited = []
    for loss in (lambda: language_loss(model, tokens), lambda: causal_lm.loss(model, tokens)):
        gpu.synchronize()
        before, value = gpu.waited, loss()
        value.backward()
        waited.append(gpu.waited - before)
    assert waited == [1, 0]
    assert causal_lm.loss(model, tokens).item() == language_loss(model, tokens).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `run.py` does on a GPU, with validations and checkpoints between and beside its rounds."""
    monkeypatch.setattr(making, "stay_near", lambda _: None)
    monkeypatch.setattr(evaluation, "cpu_offload", lambda module, device: module.to(device))
    left = []
    for overlap in (False, True):
        (folder := tmp_path / str(overlap)).mkdir()
        changes = {"track.eval_every": 8, "memory.overlap": overlap, "structure.settle": 0.3, "checkpoint.every": 4}
        file = str(config(folder, steps=20, **changes))
        with monkeypatch.context() as patch, simulated(patch, seed) as gpu:
            run.train(parse(["--config", file]))
        assert gpu.launched and not gpu.pinned
        shown = [{key: r.get(key) for key in ("step", "loss", "val_loss", "keep")} for r in metrics(folder / "out")]
        exported = load_file(folder / "out" / "export" / "model.safetensors")
        left.append((shown, exported))
    assert left[0][0] == left[1][0]
    assert_same(left[0][1], left[1][1])


def test_memory_does_not_grow(gpu: Gpu) -> None:
    with make("cnn", overlap=True, sync_every=1, paired_batches=1) as trainer:
        train(trainer, data(40))
        trainer.finish_round()
        before, pinned = gpu.allocated, sum(gpu.pinned.values())
        train(trainer, data(40))
        trainer.finish_round()
        assert trainer.rounds == 80
        assert gpu.allocated <= before + 2**10  # where the last plans share entries
        assert sum(gpu.pinned.values()) == pinned
