"""The comparison with peers: all train the same model on the same data, and none is left out without a word."""

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench
import tables
from benchmarks.peers import Options, child, comparison, torchao, zero
from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.measuring import ATTENTION, KERNELS, counted_flops, link_bytes_of
from benchmarks.peers.sizes import SIZES, architecture
from benchmarks.peers.trainer import Trainer
from benchmarks.records import Record, Setting

TINY = SIZES["tiny"]
HARDWARE = torch.cuda.is_available()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Contender's label → record of a quick run."""
    file = tmp_path_factory.mktemp("peers") / "results.json"
    assert bench.main(["peers", "--quick", "--contenders", "fsdp2", "ours-0.25", "torchao", "--json", str(file)]) == 0
    return {record["details"]["contender"]: record for record in json.loads(file.read_text())}


@pytest.mark.skipif(HARDWARE, reason="a GPU is there: what a CPU run says is not said")
def test_quick_run_measures_the_named_beside_the_baseline(quick: dict[str, dict[str, Any]]) -> None:
    plain, fsdp, torchao, ours = (CONTENDERS[name].label for name in ("plain", "fsdp2", "torchao", "ours-0.25"))
    assert list(quick) == [plain, fsdp, torchao, ours]
    for label in (plain, fsdp, ours):
        record, details = quick[label], quick[label]["details"]
        assert details["outcome"] == "measured" and details["repeats"] >= 3
        assert record["against"] == plain and record["value"] > 0
        assert record["ratio"] == pytest.approx(record["value"] / quick[plain]["value"])
        assert details["seconds_per_token"] == pytest.approx(1 / record["value"])
        assert details["flops_per_second"] == pytest.approx(details["flops_per_token"] * record["value"])
        assert details["note"].startswith("cpu, small") and details["host_peak_bytes"] > 2**27
        assert details["link_source"].startswith(("by design", "counted"))
    assert quick[torchao]["details"]["outcome"] in ("not installed", "not measured")
    assert "another subnetwork" in quick[ours]["details"]["work"]
    assert quick[ours]["details"]["parameters_in_a_step"] < quick[ours]["details"]["parameters"] / 4


@pytest.mark.skipif(HARDWARE, reason="a GPU is there")
def test_peers_train_the_same_model_on_the_same_data(quick: dict[str, dict[str, Any]]) -> None:
    plain, fsdp = (quick[CONTENDERS[name].label]["details"] for name in ("plain", "fsdp2"))
    assert plain["first_loss"] == pytest.approx(fsdp["first_loss"], rel=2e-3)
    fewest = min(plain["repeats"], fsdp["repeats"])
    if plain["repeats"] == fsdp["repeats"]:
        assert plain["last_loss"] == pytest.approx(fsdp["last_loss"], rel=5e-3)
    assert fewest >= 3 and plain["last_loss"] < plain["first_loss"]


@pytest.mark.skipif(HARDWARE, reason="a GPU is there")
def test_operations_are_those_of_the_matrix_products(quick: dict[str, dict[str, Any]]) -> None:
    """6 per weight and token; attention 2 matrix products forward and 5 backward; ours adds J forwards in K steps."""

    def weights(parameters: int, hidden: int) -> int:
        return (
            parameters - TINY.vocabulary * hidden - (2 * TINY.layers + 1) * hidden
        )  # embedding and norms multiply not

    plain, ours = (quick[CONTENDERS[name].label]["details"] for name in ("plain", "ours-0.25"))
    product = 2 * TINY.layers * TINY.sequence * TINY.hidden  # of attention, per token
    assert plain["flops_per_token"] == 6 * weights(plain["parameters"], TINY.hidden) + 7 * product
    assert quick[CONTENDERS["fsdp2"].label]["details"]["flops_per_token"] == plain["flops_per_token"]
    own, product = weights(ours["parameters_in_a_step"], TINY.hidden // 4), product // 2  # one of two key/value heads
    step, forward = 6 * own + 7 * product, 2 * own + 2 * product
    assert ours["flops_per_token"] == pytest.approx(step + ours["recipe"]["paired_batches"] / 50 * forward, rel=1e-12)


def test_everyone_has_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: child.Job) -> dict[str, Any]:
        if job.contender == "plain":
            return {"outcome": "does not fit", "message": "CUDA out of memory"}
        if job.contender == "ours-0.5":
            return {"outcome": "failed", "message": "it did"}
        return {"outcome": "measured", "seconds_per_step": 0.5 if job.contender == "fsdp2" else 0.25}

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    records = {r.details["contender"]: r for r in comparison.measure(cpu(), Options())}
    assert list(records) == [contender.label for contender in CONTENDERS.values()]
    outcomes = {name: records[contender.label].details["outcome"] for name, contender in CONTENDERS.items()}
    assert outcomes["plain"] == "does not fit" and outcomes["ours-0.5"] == "failed"
    assert outcomes["resident"] == "not measured"
    assert all(outcomes[n] == "not installed" for n in ("zero-offload", "zero-3", "torchao", "torchao-bf16"))
    assert "pip install --no-deps torchao" in records[CONTENDERS["torchao"].label].details["message"]
    for name, contender in CONTENDERS.items():  # the first that runs stands in for a baseline that does not
        record = records[contender.label]
        if outcomes[name] == "measured":
            assert record.against == CONTENDERS["fsdp2"].label
            assert record.ratio == (1 if name == "fsdp2" else 2)
        else:
            assert record.value == record.ratio == 0 and record.against == outcomes[name]
    table = "\n".join(tables.lines([as_json(record) for record in records.values() if not record.value]))
    assert "does not fit (CUDA out of memory)" in table and "failed (it did)" in table and "not installed" in table


def cpu() -> Setting:
    return Setting(Accelerator(cpu=True))


def as_json(record: Record) -> dict[str, Any]:
    return json.loads(json.dumps(vars(record), allow_nan=False))


def test_what_compiles_is_not_run_quickly_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "find_spec", lambda name: name)
    quick = Setting(Accelerator(cpu=True), quick=True)
    why = comparison.cannot_run(quick, Options(), "zero-3")
    assert why is not None and why["outcome"] == "not measured"
    assert comparison.cannot_run(quick, Options(contenders=("zero-3",)), "zero-3") is None


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(torch.OutOfMemoryError("CUDA out of memory.\nMore"), "does not fit"), (ValueError("no"), "failed")],
)
def test_a_contender_that_breaks_says_how(
    error: Exception, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(size: Any, device: torch.device) -> Trainer:
        raise error

    monkeypatch.setattr(child, "CONTENDERS", {"broken": Contender("broken", start, "fp32")})
    job = child.Job("broken", "tiny", batch=1, cuda=False, cap=None, seconds=1)
    child.main(job.as_json(), str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == outcome and str(error).splitlines()[0] in result["message"]


def test_a_process_that_ends_without_a_word_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = child.Job("plain", "tiny", batch=1, cuda=False, cap=None, seconds=1)
    for script, outcome in (("echo why >&2; exit 3", "failed"), ("kill -9 $$", "does not fit")):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(comparison.sys, "executable", str(program))
        result = comparison.run(job)
        assert result["outcome"] == outcome
    assert "killed" in result["message"]


def test_a_process_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, pid = tmp_path / "python", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\nsleep 60 & echo $! > {pid}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(comparison.sys, "executable", str(program))
    monkeypatch.setattr(comparison, "START", 0.5)
    result = comparison.run(child.Job("plain", "tiny", batch=1, cuda=False, cap=None, seconds=0))
    assert result["outcome"] == "failed" and "took more than" in result["message"]
    state = Path(f"/proc/{pid.read_text().strip()}/stat")  # what it started is ended with it
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_deepspeed_knows_every_setting() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    for settings in (zero.stage_2(TINY), zero.stage_3(TINY)):
        asked = settings["zero_optimization"]
        read = config.DeepSpeedZeroConfig(**asked)  # refuses a key that it does not know
        assert read.stage == asked["stage"] and read.overlap_comm and read.contiguous_gradients
        assert read.offload_optimizer.device == "cpu" and read.offload_optimizer.pin_memory
        assert (read.offload_param is not None) == (asked["stage"] == 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_is_handed_the_model_in_its_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizer, which runs on a GPU only, stood in for by the one that it wraps."""
    given: list[torch.nn.Parameter] = []

    def optimizer(parameters: Any, kind: Any, *, offload_gradients: bool, minimal_size: int, **settings: Any) -> Any:
        given.extend(parameters)
        assert offload_gradients
        return kind(given, **settings)

    stub = ModuleType("torchao.optim")
    stub.CPUOffloadOptimizer = optimizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", stub)
    trainer = torchao.start(TINY, torch.device("cpu"), dtype)
    losses = [trainer.step().item() for _ in range(9)]
    assert losses[-1] < losses[0] and {p.dtype for p in given} == {dtype}
    small = sum(p.numel() for p in given if p.numel() < 4096)  # stays on the device
    assert 0 < small < trainer.parameters
    assert trainer.link_bytes() == 2 * (trainer.parameters - small) * dtype.itemsize


def test_link_counts_what_crosses_it() -> None:
    def copy(name: str, size: int) -> dict[str, Any]:
        return {"cat": "gpu_memcpy", "name": name, "args": {"bytes": size}}

    events = [
        copy("Memcpy HtoD (Pinned -> Device)", 100),
        copy("Memcpy DtoH (Device -> Pageable)", 20),
        copy("Memcpy DtoD (Device -> Device)", 3000),
        {"cat": "kernel", "name": "gemm", "args": {}},
    ]
    assert link_bytes_of(events) == 120
    with pytest.raises(LookupError):
        link_bytes_of(events[2:])


def test_operations_of_a_turn_are_per_step() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    taken = 0

    def step() -> torch.Tensor:
        nonlocal taken
        taken += 1
        return (torch.eye(8) @ weight).sum() if taken % 2 else torch.zeros(())

    trainer = Trainer(step, parameters=64, trained=64, link_bytes=lambda: 0.0, link_source="", turn=2)
    assert counted_flops(trainer) == 2 * 8**3 / 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_that_share_keys_count_as_if_each_had_its_own(kernel: str) -> None:
    q, shared = (2, 8, 16, 4), (2, 2, 16, 4)
    forward, backward = (getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{way}") for way in ("", "_backward"))
    assert ATTENTION[forward](q, shared, shared) == 2 * (2 * 2 * 8 * 16 * 16 * 4)  # scores, and what they weigh
    assert ATTENTION[backward](q, q, shared, shared) == 5 * (2 * 2 * 8 * 16 * 16 * 4)


def test_sizes_are_what_they_are_called() -> None:
    for name, parameters in (("tiny", 107e3), ("small", 16.8e6), ("1B", 0.98e9), ("3B", 2.97e9)):
        model = architecture(SIZES[name])
        assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_contenders_see_nothing_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    environment = comparison.environment()
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/somewhere"
    assert not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & environment.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not HARDWARE, reason="needs a GPU")
def test_on_a_gpu_the_cap_holds_and_the_link_is_what_the_design_says(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    names = ["plain", "fsdp2", "ours-0.25"]
    command = ["peers", "--size", "small", "--minutes", "0.05", "--json", str(file), "--contenders", *names, "--cap"]
    assert bench.main([*command, "1"]) == 0
    found = {record["details"]["contender"]: record["details"] for record in json.loads(file.read_text())}
    for name in names:
        details = found[CONTENDERS[name].label]
        assert details["outcome"] == "measured" and details["device_reserved_peak_bytes"] <= 2**30
        assert math.isfinite(details["flops_per_token"])
    fsdp = found[CONTENDERS["fsdp2"].label]
    assert fsdp["link_bytes_profiled"] == pytest.approx(fsdp["link_bytes_per_step"], rel=0.1)
    assert bench.main([*command, "0.05"]) == 0
    found = {record["details"]["contender"]: record["details"] for record in json.loads(file.read_text())[len(found) :]}
    assert found[CONTENDERS["plain"].label]["outcome"] == "does not fit"
