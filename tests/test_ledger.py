"""DESIGN §10, 8: what the ledger predicts is what the allocator then gives out, and what a process then takes."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from offload_trainer import Offloader, Structure, find_groups, memory, verify_groups
from offload_trainer.batches import batch_rows, pieces
from offload_trainer.evaluation import evaluate_full
from offload_trainer.forecast.footprint import (
    LiveBytes,
    forward_footprint,
    optimizer_cost,
    skeleton,
    training_footprint,
)
from offload_trainer.forecast.ledger import Ledger, Phase
from offload_trainer.forecast.passes import Passes
from offload_trainer.forecast.predictor import PROVED_WHOLE, Predictor
from offload_trainer.groups import Groups, Plan, slice_module
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import StateSpec, probe_optimizer
from offload_trainer.master.precision import FP32, Precision
from offload_trainer.result import recalibrate_master
from offload_trainer.run import main
from offload_trainer.structure import effects
from tests.runs import config, launch, metrics

CPU = torch.device("cpu")
Case = tuple[nn.Module, Any, tuple | dict, Callable[[nn.Module, Any], Tensor]]
BF16 = Precision(torch.bfloat16, torch.bfloat16)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-4)


def on_labels(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(module(batch[0]), batch[1])


def on_tokens(module: nn.Module, batch: Tensor) -> Tensor:
    logits = module(input_ids=batch[:, :-1], use_cache=False).logits.float().flatten(0, 1)
    return cross_entropy(logits, batch[:, 1:].flatten())


def mlp() -> Case:
    """Weights and moments decide."""
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, (torch.randn(512, 64), torch.randint(10, (512,))), (torch.zeros(3, 64),), on_labels


def convolutional() -> Case:
    """Activations decide; BatchNorm keeps buffers, and a branch is frozen."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model[0].requires_grad_(False)
    return model, (torch.randn(16, 3, 24, 24), torch.randint(10, (16,))), (torch.zeros(3, 3, 8, 8),), on_labels


def llama() -> Case:
    """Grouped-query attention, tied embeddings, a long-vocabulary loss."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 8}
    settings = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True)
    tokens = torch.randint(512, (4, 65))
    inputs = {"input_ids": torch.arange(33).view(3, 11), "use_cache": False}
    return LlamaForCausalLM(settings), tokens, inputs, on_tokens


CASES = {"mlp": mlp, "convolutional": convolutional, "llama": llama}


def training(ledger: Ledger) -> Phase:
    return next(phase for phase in ledger.phases if phase.name == "optimizer step")


def sliced(plan: Plan) -> frozenset[str]:
    return plan.groups.sliced_by([group.name for group in plan.groups])


def half(model: nn.Module, inputs: tuple | dict) -> tuple[Groups, Plan]:
    groups = find_groups(model, inputs)
    return groups, Plan(groups, Structure(groups, 0.5).top())


def allocated(run: Callable[[], object]) -> int:
    """Most bytes that torch's own CPU allocator gives out at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# A forward and a backward


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_take_what_real_ones_take(name: str, autocast: bool) -> None:
    model, batch, inputs, loss_fn = CASES[name]()
    groups, plan = half(model, inputs)
    predicted = training_footprint(skeleton(model, plan, CPU), loss_fn, batch, autocast=autocast)
    assert 0 <= predicted.gradients < predicted.peak and 0 < predicted.heap <= predicted.peak

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(real, batch)
        loss.backward()

    real = slice_module(model, plan, groups).train()
    step()  # what oneDNN prepares once
    real.zero_grad()
    measured = allocated(step)
    if not autocast:  # bfloat16 kernels have scratch of their own, which is large beside tensors as small as these
        assert predicted.peak == pytest.approx(measured, rel=0.05)
    real.zero_grad()
    leaves = batch if isinstance(batch, tuple) else (batch,)
    with LiveBytes([*named_tensors(real).values(), *leaves]) as live:
        step()
    assert predicted.peak == pytest.approx(live.peak, rel=0.005)


def test_a_numbered_cpu_is_the_cpu() -> None:
    """As a process of several has it."""
    model, batch, inputs, loss_fn = llama()
    _, plan = half(model, inputs)
    taken = [
        training_footprint(skeleton(model, plan, device), loss_fn, batch, autocast=False)
        for device in (CPU, torch.device("cpu", 0))
    ]
    assert taken[0] == taken[1]


@pytest.mark.parametrize("name", CASES)
def test_a_forward_alone_keeps_nothing(name: str) -> None:
    model, batch, inputs, loss_fn = CASES[name]()
    groups, plan = half(model, inputs)
    predicted = forward_footprint(skeleton(model, plan, CPU), loss_fn, batch, autocast=False)
    real = slice_module(model, plan, groups).eval()
    with torch.no_grad():
        loss_fn(real, batch)
        measured = allocated(lambda: loss_fn(real, batch))
    assert predicted.peak <= measured <= predicted.peak + predicted.largest  # a kernel's own scratch is not seen
    training = training_footprint(skeleton(model, plan, CPU), loss_fn, batch, autocast=False)
    assert predicted.peak < training.peak and predicted.gradients == 0


def test_nothing_is_allocated_for_a_model_of_any_size() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 2**20), nn.ReLU(), nn.Linear(2**20, 2**14), nn.ReLU(), nn.Linear(2**14, 5))
    _, plan = half(model, (torch.zeros(3, 64),))
    batch = (torch.randn(8, 64), torch.randint(5, (8,)))
    measured = allocated(lambda: training_footprint(skeleton(model, plan, CPU), on_labels, batch, autocast=False))
    assert measured < 2**24  # the subnet's gradients alone are 17 GiB


def test_live_bytes_are_those_of_storages_that_live() -> None:
    outside = torch.zeros(1000)
    with LiveBytes([outside]) as live:
        outside.view(10, 100).add_(1)
        assert live.now == 0
        one = outside + 1
        view = one[:10]
        assert live.now == 4000
        del one
        assert live.now == 4000  # the view keeps it
        del view
        assert (live.now, live.peak, live.largest) == (0, 4000, 4000)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float, float, float]] = {
    # One after the other: √v, the denominator, and the denominator of the one before.
    "adamw": (adamw, 2, 3, 0),
    "adamw foreach": (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), 2, 0, 1),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 2, 0, 0),
    "sgd": (sgd, 1, 1, 0),  # the gradient with its decay
    "sgd foreach": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-4, foreach=True), 1, 0, 1),
    "plain sgd": (lambda p: torch.optim.SGD(p, lr=1e-2), 0, 0, 0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cost_of_an_optimizer(name: str) -> None:
    factory, state, one, together = OPTIMIZERS[name]
    cost = optimizer_cost(factory, torch.float32, CPU)
    assert (cost.state, cost.one, cost.together) == (state, one, together)


# A run


def predictor(case: Case, groups: Groups, factory: Callable, carry: bool, precision: Precision = FP32) -> Predictor:
    model, batch, _, loss_fn = case
    state_spec = probe_optimizer(factory, torch.float32, CPU) if carry else StateSpec({}, {}, None)
    passes = Passes(model, groups, precision, loss_fn, loss_fn, batch, batch, CPU, autocast=False)
    return Predictor(passes, state_spec, factory, process=0)


@pytest.mark.parametrize("control", ["none", "linear"])
@pytest.mark.parametrize("state", ["carry", "reset"])
@pytest.mark.parametrize(("name", "factory"), [("mlp", adamw), ("convolutional", sgd), ("llama", adamw)])
def test_device_peak_of_a_run(
    name: str, factory: Callable, state: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "REMEMBERED", (16, 16))  # of the host, but a CPU is both
    case = CASES[name]()
    model, batch, inputs, loss_fn = case
    groups, plan = half(model, inputs)
    own = replace(predictor(case, groups, factory, state == "carry"), credits=control == "linear")
    ledger = own.ledger(plan, reference=True, sampled=sliced(plan))
    training = [p for p in ledger.phases if p.name in ("forward and backward", "credit", "optimizer step")]
    assert ("credit" in {phase.name for phase in training}) == (control == "linear")
    predicted = max(phase.device_bytes - phase.device["batch"] for phase in training)
    structure = Structure(groups, 0.5, paired_batches=1, control=control)
    accelerator = Accelerator(cpu=True)
    with Offloader(
        model,
        groups,
        loss_fn,
        optimizer=factory,
        structure=structure,
        sync_every=3,
        state=state,
        accelerator=accelerator,
        overlap=False,
    ) as offloader:

        def two_rounds() -> None:
            for _ in range(6):
                offloader.loss(batch).backward()
                offloader.step()

        measured = allocated(two_rounds)
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_master_takes_no_more_of_the_device_than_training() -> None:
    """However wide: batches pass through it in parts. The allocator says so, too."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1)),
        *(nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
    )
    batch = torch.randn(96, 3, 12, 12), torch.randint(10, (96,))
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    whole = replace(predictor((model, batch, (), on_labels), groups, sgd, True), calibration=True)
    told = replace(whole, passes=replace(whole.passes, parted=True))
    accelerator = Accelerator(cpu=True)
    for keep, expected in ((0.9, None), (1 / 8, (16, 48))):
        plan = Plan(groups, Structure(groups, keep).top())
        ledger = told.ledger(plan, reference=False, sampled=sliced(plan))
        phases = {phase.name: phase.device_bytes for phase in ledger.phases}
        limit = phases["forward and backward"]
        assert max(phases["master evaluated"], phases["calibration"]) <= limit == ledger.device_peak_bytes
        if expected is None:
            assert ledger.rows is None
            continue
        assert whole.ledger(plan, reference=False, sampled=sliced(plan)).rows is None  # unless it cannot be parted
        assert ledger.rows is not None and expected[0] <= ledger.rows <= expected[1]
        parts = pieces(batch, ledger.rows)

        def evaluated(parts: list[Any]) -> None:
            recalibrate_master(model, parts, on_labels, accelerator)
            evaluate_full(model, parts, lambda module, part: {"loss": on_labels(module, part)}, batch_rows, accelerator)

        assert allocated(lambda parts=parts: evaluated(parts)) <= limit < allocated(lambda: evaluated([batch]))


def test_batches_are_not_parted_for_less_than_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a layer of the master passes through; parts mean more passes, and save activations alone."""
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    batch = torch.randn(256, 64), torch.randint(10, (256,))
    groups = find_groups(model, (torch.zeros(3, 64),))
    told = predictor((model, batch, (), on_labels), groups, adamw, True)
    told = replace(told, passes=replace(told.passes, parted=True))
    plan = Plan(groups, Structure(groups, 1 / 32).top())
    assert (told.ledger(plan, reference=False, sampled=sliced(plan)).rows or 256) < 64
    monkeypatch.setattr(Predictor, "_on_host", False)
    assert replace(told).ledger(plan, reference=False, sampled=sliced(plan)).rows is None


@pytest.mark.parametrize("overlap", [False, True], ids=["one after another", "overlapping"])
@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["convolutional", "llama"])
def test_master_link_and_staging_are_what_the_offloader_takes(name: str, precision: Precision, overlap: bool) -> None:
    case = CASES[name]()
    model, batch, inputs, loss_fn = case
    groups, plan = half(model, inputs)
    told = replace(predictor(case, groups, adamw, True, precision), overlap=overlap)
    ledger = told.ledger(plan, reference=True, sampled=sliced(plan), ahead=overlap)
    structure = Structure(groups, 0.5, paired_batches=1)
    with Offloader(
        model,
        groups,
        loss_fn,
        optimizer=adamw,
        structure=structure,
        sync_every=1,
        precision=precision,
        overlap=overlap,
    ) as offloader:
        for _ in range(4):
            offloader.loss(batch).backward()
            offloader.step()
        # Not of the first round, in which there are no moments to gather.
        assert sum(ledger.link.values()) == offloader.report.bytes_moved
        held = sum(t.nbytes for t in offloader.master.values())
        held += sum(t.nbytes for tensors in offloader.moments.values() for t in tensors.values())
        host = training(ledger).host
        assert host.get("staging", 0) == offloader._bench.transfer.staging_bytes
    predicted = sum(size for name, size in host.items() if name.startswith("master "))
    assert held <= predicted <= held + 64 * 3 * len(groups.shapes)  # views start on whole cache lines


def test_frozen_parameters_have_neither_gradients_nor_moments() -> None:
    case = mlp()
    model, _, inputs, _ = case
    groups, plan = half(model, inputs)
    whole = predictor(case, groups, adamw, True).ledger(plan, reference=False, sampled=sliced(plan))
    model.requires_grad_(False)
    model[-1].requires_grad_(True)
    frozen = predictor(case, groups, adamw, True).ledger(plan, reference=False, sampled=sliced(plan))
    before, after = (next(p for p in one.phases if p.name == "optimizer step") for one in (whole, frozen))
    last = 4 * (256 * 10 + 10)
    assert after.device["gradients"] == pytest.approx(last, abs=128)
    assert after.device["subnet exp_avg"] == pytest.approx(last, abs=128)
    assert after.host["master exp_avg"] < before.host["master exp_avg"] / 50
    assert after.host["master weights"] == before.host["master weights"]


def test_the_proof_of_a_large_model_takes_a_stand_in() -> None:
    assert inspect.signature(verify_groups).parameters["narrow_above"].default == PROVED_WHOLE
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 2**16), nn.ReLU(), nn.Linear(2**16, 2**14), nn.ReLU(), nn.Linear(2**14, 5))
    case = (model, (torch.randn(8, 64), torch.randint(5, (8,))), (torch.zeros(3, 64),), on_labels)
    groups, plan = half(model, case[2])
    proof = predictor(case, groups, sgd, True).ledger(plan, reference=True, sampled=sliced(plan)).phases[1]
    assert proof.name == "proof" and proof.host_bytes < 4 * PROVED_WHOLE


def test_savings_are_those_of_the_options() -> None:
    case = mlp()
    groups, plan = half(case[0], case[2])

    def master(carry: bool = True, precision: Precision = FP32) -> int:
        ledger = predictor(case, groups, adamw, carry, precision).ledger(plan, reference=True, sampled=sliced(plan))
        return sum(size for name, size in training(ledger).host.items() if name.startswith("master "))

    now = master()
    assert predictor(case, groups, adamw, True).savings() == {
        "optimizer.state: reset": now - master(carry=False),
        "memory.moments: bf16": now - master(precision=Precision(moments=torch.bfloat16)),
        "memory.weights: bf16": now - master(precision=Precision(weights=torch.bfloat16)),
        "memory.master: file": now,
    }
    assert replace(predictor(case, groups, adamw, False, BF16), mapped=True).savings() == {}


def test_several_processes_hold_the_message_of_their_gradients() -> None:
    case = mlp()
    groups, plan = half(case[0], case[2])
    one = predictor(case, groups, sgd, True)
    phases = {
        phase.name: phase
        for phase in replace(one, processes=2).ledger(plan, reference=True, sampled=sliced(plan)).phases
    }
    assert (
        phases["gradients averaged"].device["message and its mean"] == 2 * phases["optimizer step"].device["gradients"]
    )
    assert "gradients averaged" not in {
        phase.name for phase in one.ledger(plan, reference=True, sampled=sliced(plan)).phases
    }


def test_a_loss_that_looks_at_values_is_said_not_to_be_counted() -> None:
    model, batch, inputs, _ = mlp()

    def looks(module: nn.Module, batch: Any) -> Tensor:
        loss = on_labels(module, batch)
        return loss * 2 if loss.item() > 1 else loss

    groups, plan = half(model, inputs)
    ledger = predictor((model, batch, inputs, looks), groups, adamw, True).ledger(
        plan, reference=True, sampled=sliced(plan)
    )
    assert len(ledger.notes) == 1 and "the loss does not run on fake tensors" in ledger.notes[0]
    told = predictor(mlp(), groups, adamw, True)
    metric = replace(told, passes=replace(told.passes, metrics_fn=looks))
    assert metric.ledger(plan, reference=True, sampled=sliced(plan)) == predictor(mlp(), groups, adamw, True).ledger(
        plan, reference=True, sampled=sliced(plan)
    )


def test_phases_follow_one_another() -> None:
    early = Phase("early", {"process": 10, "weights": 5}, {"subnet": 1})
    late = Phase("late", {"process": 10}, {"subnet": 4, "activations": 3})
    ledger = Ledger((early, late), {"checkpoints": 8, "export": 1}, {"gathered": 2}, on_host=False)
    assert (ledger.host_peak, ledger.host_peak_bytes) == (early, 15)
    assert (ledger.device_peak, ledger.device_peak_bytes) == (late, 7)
    shared = Ledger((early, late), {}, {}, on_host=True).with_larger_process(100)
    assert (shared.host_peak.name, shared.host_peak_bytes) == ("late", 117)
    written = json.loads(json.dumps(ledger.as_dict()))
    assert written["host_peak"] == {"phase": "early", "process": 10, "weights": 5}
    assert written["phases"]["late"] == {"host_bytes": 10, "device_bytes": 7}


def test_disk_is_what_a_run_leaves(tmp_path: Path) -> None:
    """And a checkpoint that is there for the time of the last being written."""
    assert main(["--config", str(config(tmp_path, **{"export.full": True, "checkpoint.keep_last": 2}))]) == 0
    out = tmp_path / "out"
    predicted = json.loads((out / "summary.json").read_text())["ledger"]["predicted"]["disk"]
    checkpoint = max(out.glob("checkpoints/step-*"))
    for name, folder, count in (("checkpoints", checkpoint, 3), ("export", out / "export", 1)):
        written = count * sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert predicted[name] == pytest.approx(written, rel=0.2)  # tiny tensors: headers and padding show
    assert metrics(out)[-1]["step"] == 12


HUNDRED_MIB = {"task": {"kind": "custom", "function": "tests.runs:wide", "arguments": {"width": 1536}}}


def test_host_peak_of_a_process(tmp_path: Path) -> None:
    """Of a real run; with an allocator that gives back what is freed, so that nothing has to be guessed."""
    file = str(config(tmp_path, **HUNDRED_MIB, steps=6, sync_every=2, **{"structure.paired_batches": 1}))
    done = launch("python", "offload_trainer/run.py", "--config", file, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "out" / "summary.json").read_text())["ledger"]
    predicted, measured = ledger["predicted"]["host_peak_bytes"], ledger["measured"]["host_peak_bytes"]
    assert measured == pytest.approx(predicted, rel=0.05)
    assert predicted - ledger["predicted"]["host_peak"]["process"] > 150 * 2**20
    assert f"predicted (×{measured / predicted:.2f})" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "factory"), [("convolutional", sgd), ("llama", adamw)])
def test_device_peak_of_a_run_on_a_gpu(name: str, factory: Callable) -> None:
    cuda = torch.device("cuda")
    model, batch, inputs, loss_fn = CASES[name]()
    moved = tuple(x.to(cuda) for x in batch) if isinstance(batch, tuple) else batch.to(cuda)
    groups, plan = half(model, inputs)
    state_spec = probe_optimizer(factory, torch.float32, cuda)
    passes = Passes(model, groups, FP32, loss_fn, loss_fn, moved, moved, cuda, autocast=False)
    told = Predictor(passes, state_spec, factory, process=0).ledger(plan, reference=True, sampled=sliced(plan))
    training = [phase for phase in told.phases if phase.name in ("forward and backward", "optimizer step")]
    predicted = max(phase.device_bytes for phase in training)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(x.nbytes for x in (moved if isinstance(moved, tuple) else (moved,)))
    with Offloader(
        model, groups, loss_fn, optimizer=factory, structure=Structure(groups, 0.5), sync_every=3
    ) as offloader:
        for _ in range(6):
            offloader.loss(moved).backward()
            offloader.step()
    measured = (memory.device_peak(cuda) or 0) - before
    # These are small, and the libraries' workspace may have been taken by an earlier test.
    assert measured <= 1.05 * predicted
    assert measured >= 0.95 * (predicted - memory.workspace_bytes(cuda))
