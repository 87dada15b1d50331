"""The benchmarks run and write the records they promise, and what they time is what they say it is."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from offload_trainer import Structure, run
from offload_trainer.device.subnet import Subnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups import Plan, random_plan, slice_module
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import Master, Slab, StateSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench
from benchmarks import ledger, overhead, slicing, storage, transfer
from benchmarks.records import Record, Setting, merge, read_records
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, training_step

CASES = {
    "slicing": [
        f"{model} rho={keep}{baseline} quick"
        for model in ("llama", "resnet32")
        for keep in (0.5, 0.25, 0.1)
        for baseline in ("", " masks")
    ],
    "overhead": [f"{model} K=50{how} quick" for model in ("llama", "resnet32") for how in (", overlapped", "")],
    "transfer": [
        f"{what} rho={keep}{way}{where} quick"
        for where in ("", ", mapped files", ", rows alone", ", columns alone")
        for keep in (0.5, 0.25)
        for way in ((", native",) if where == ", mapped files" else ("", ", native"))
        for what in ("gather", "writeback", "both")
    ],
    "load": ["bf16 to fp32 quick", "fp32 to fp32 quick", "bf16 to bf16 quick"],
    "ledger": ["mlp host quick", "mlp device quick"],
    "storage": [f"{name} quick" for name in storage.KINDS],
}


@pytest.fixture
def started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was started before is not started again: a repetition measures the same, here for nothing."""
    start, printed = ledger.child, dict[tuple[str, ...], str]()

    def child(environment: dict[str, str], *arguments: str) -> str:
        if arguments not in printed:
            printed[arguments] = start(environment, *arguments)
        return printed[arguments]

    monkeypatch.setattr(ledger, "child", child)


@pytest.fixture
def runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process five times would prove no more."""

    other = subprocess.run

    def done(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if not command[1].endswith("offload_trainer/run.py"):
            return other(command, **options)  # of a library
        return subprocess.CompletedProcess(command, run.main(command[2:]), "", "")

    monkeypatch.setattr(storage.subprocess, "run", done)


@pytest.mark.usefixtures("started_once", "runs_in_this_process")
@pytest.mark.parametrize("name", CASES)
def test_quick_run_writes_the_records_it_promises(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    assert bench.main([name, "--quick", "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert [record["case"] for record in records] == CASES[name]
    for record in records:
        assert record["name"] == name
        assert set(record) == {
            "name", "case", "value", "unit", "ratio", "against", "device", "versions", "details"
        }  # fmt: skip
        assert record["versions"].keys() == {"python", "torch", "offload_trainer"}
        assert record["versions"]["torch"] == torch.__version__
        assert record["unit"] and record["against"] and record["device"]
        for number in (record["value"], record["ratio"], record["details"]["against_value"]):
            assert math.isfinite(number) and number > 0
        assert record["details"]["repeats"] >= (1 if name == "storage" else 2)
        assert "aim" not in record["details"]  # tiny sizes are not what the aim is about
    shown = capsys.readouterr().out
    assert name in shown and "ratio" in shown
    if name == "storage":
        held = [record["details"]["bytes_per_parameter"] for record in records]
        assert held == pytest.approx([12, 8, 6, 4, 2], rel=0.02)


def test_overhead_says_where_the_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "workloads", lambda _: workloads()[:1])
    monkeypatch.setattr(overhead, "TURNS", {"quick": {6: (2, 1), 5: (1, 2)}})
    records = list(overhead.measure(Setting(Accelerator(), quick=True)))
    assert [record.case.removesuffix(" quick").split("=")[1] for record in records] == [
        "6, overlapped",
        "6",
        "5, overlapped",
        "5",
    ]
    for record in records:
        shares = [record.details[f"{part}_share"] for part in ("gather", "writeback", "reference")]
        assert all(0 < share < 1 for share in shares) and sum(shares) < 1


def workloads() -> list[Workload]:
    return slicing.workloads("quick")


def half(workload: Workload, model: torch.nn.Module, seed: int = 0) -> Plan:
    """Half of every group, but the residual stream whole: a norm over it sees masked zeros."""
    groups = workload.groups(model)
    plan = random_plan(groups, torch.Generator().manual_seed(seed))
    convolutional = workload.name != "llama"
    return Plan(groups, {name: plan[name] for name in plan if convolutional or not name.startswith("residual")})


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload.name)
def test_masked_network_learns_what_the_sliced_one_learns(workload: Workload) -> None:
    torch.manual_seed(0)
    model = workload.build().double()
    plan = half(workload, model)
    sliced = slice_module(model, plan, plan.groups)
    dense = slice_module(model, Plan.whole(plan.groups), plan.groups)
    masked = slicing.Masked(slice_module(model, Plan.whole(plan.groups), plan.groups), plan)
    inputs, targets = workload.batch()
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    losses = [workload.loss_fn(module, batch) for module in (sliced, masked, dense)]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.isclose(losses[0], losses[2])
    losses[0].backward()
    losses[1].backward()
    small = dict(sliced.named_parameters())
    for name, parameter in masked.network.named_parameters():
        assert parameter.grad is not None
        expected = torch.zeros_like(parameter)
        expected[slicing.mask_of(plan, name)] = grad_of(small[name]).flatten()
        torch.testing.assert_close(parameter.grad, expected)


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload.name)
def test_training_step_trains_every_weight(workload: Workload) -> None:
    torch.manual_seed(0)
    module = workload.build()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    batch = workload.batch()
    first = workload.loss_fn(module, batch).detach()
    step = training_step(module, workload, [batch], Accelerator())
    for _ in range(5):
        step()
    assert workload.loss_fn(module, batch) < first
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("keep", transfer.KEEP)
def test_transferred_values_are_the_masters(keep: float) -> None:
    torch.manual_seed(0)
    workload = transfer.workload("quick")
    with torch.device("meta"):
        model = workload.build()
    groups = workload.groups(model)
    master = Master(model, StateSpec({}, {}, None), materialise=transfer.fill)
    assert all(bool(tensor.isfinite().all()) for tensor in master.tensors.values())
    before = {name: tensor.clone() for name, tensor in master.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    plan = random_plan(groups, generator, keep)
    subnet, moves = Subnet(master, plan, torch.device("cpu")), Transfer(torch.device("cpu"))
    moves.fetch(master.tensors, subnet.layouts, subnet.slabs, plan, "weights")
    for name, tensor in named_tensors(subnet.module).items():
        assert torch.equal(tensor.flatten(), before[name][slicing.mask_of(plan, name)])
        tensor.detach().neg_()
    moves.merge(map(Slab.whole, subnet.slabs), master.tensors, plan, delta=True)
    for name, tensor in master.tensors.items():
        mask = slicing.mask_of(plan, name)
        assert torch.equal(tensor, torch.where(mask, -before[name], before[name]))


def test_resident_network_has_the_shapes_of_every_subnet() -> None:
    workload = workloads()[0]
    groups = workload.groups(workload.build())
    structure = Structure(groups, overhead.KEEP)
    top = Plan(groups, structure.top())
    for kept in structure.pair():
        plan = Plan(groups, kept)
        assert all(plan.shape(name) == top.shape(name) for name in groups.shapes)


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    contenders = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = take_turns(contenders, 2, torch.device("cpu"))
    assert "".join(turns) == "ababab"  # one warm-up and two repeats
    assert [len(own) for own in seconds.values()] == [2, 2]
    assert times_faster({"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 4.0]}, "a", "b") == 2.0


def record(name: str = "slicing", case: str = "llama", device: str = "cpu", value: float = 1.0) -> Record:
    return Record(name, case, value, "ms", 2.0, "the full network", device, {"python": "3"})


def test_records_replace_those_of_the_same_case_and_device_only(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    merge(file, [record(), record(device="gpu"), record(case="resnet32")])
    merge(file, [record(value=5.0), record(name="transfer")])
    found = [(r["name"], r["case"], r["device"], r["value"]) for r in read_records(file)]
    assert found == [
        ("slicing", "llama", "cpu", 5.0),
        ("slicing", "llama", "gpu", 1.0),
        ("slicing", "resnet32", "cpu", 1.0),
        ("transfer", "llama", "cpu", 1.0),
    ]
    assert list(tmp_path.iterdir()) == [file]


def test_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    merge(file, [record()])
    before = file.read_text()
    with pytest.raises(ValueError):
        merge(file, [record(value=math.nan)])
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["{", "{}", '[{"name": "slicing"}]', "[1]"])
def test_file_of_something_else_is_refused_before_measuring(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    assert bench.main(["transfer", "--quick", "--json", str(file)]) == 2
    assert str(file) in capsys.readouterr().err and file.read_text() == content


def test_missing_folder_and_unknown_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["transfer", "--quick", "--json", str(tmp_path / "no" / "results.json")]) == 2
    assert "its folder must be there" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench.main(["transfers"])
