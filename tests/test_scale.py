"""How the full model's size tells, and how long a run takes to start: the records, and what they are made of."""

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench
import tables
from benchmarks import larger, scale, start
from benchmarks.peers.sizes import SIZES, architecture

from offload_trainer.errors import UserError


def test_larger_tells_how_a_large_master_trains(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert bench.main(["larger", "--quick", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())
    found = record["details"]
    assert record["case"] == "llama tiny, 2 bytes quick" and record["ratio"] > 0
    assert found["trained"] < 0.6 * found["parameters"]
    assert all(seconds > 0 for what, seconds in found["seconds"].items() if "link" not in what)
    assert [step for step, _ in found["losses"]] == [1, 8, 11, 16]
    assert all(0 < loss < 8 for _, loss in found["losses"])
    assert len(list(tables.larger([record]))) == 5


def test_the_largest_model_has_40_billion_parameters() -> None:
    assert 40e9 < sum(p.numel() for p in architecture(larger.LARGEST).parameters()) < 41e9


def test_full_models_share_their_subnet(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert bench.main(["scale", "--quick", "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    parts = ("step", "round", "gather", "writeback", "host", "device")
    assert [r["case"] for r in records] == [f"llama {times}x {part} quick" for times in (1, 4) for part in parts]
    found = {record["case"]: record for record in records}
    small, large = (found[f"llama {times}x gather quick"]["details"] for times in (1, 4))
    assert large["parameters"] > 3 * small["parameters"]
    assert large["moved_bytes"] == small["moved_bytes"] > 0
    assert found["llama 4x device quick"]["ratio"] == 1
    for record in records:
        assert record["value"] > 0 and record["ratio"] > 0 and "aim" not in record["details"]
    for times in (1, 4):
        whole = found[f"llama {times}x round quick"]["value"]
        parts_ms = [found[f"llama {times}x {part} quick"]["value"] for part in ("gather", "writeback")]
        assert sum(parts_ms) / 1e3 < 2 * whole
    table = list(tables.lines(records))
    assert any(line.startswith("| 4x | ") for line in table)


def test_full_models_grow_as_they_say() -> None:
    for times, heads in scale.HEADS.items():
        assert (heads / scale.HEADS[1]) ** 2 == pytest.approx(times, rel=0.01)
        assert round(scale.SUBNET / heads * heads) == scale.SUBNET


def test_a_process_that_ends_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.sys, "executable", shutil.which("false"))
    with scale.FullModel(17, scale.SHAPES["quick"], "no") as model, pytest.raises(UserError, match="exit code 1"):
        model.round()


def test_start_says_where_its_seconds_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "built_by_transformers", lambda *_: 4.0)  # tested below, in this process
    file = tmp_path / "results.json"
    assert bench.main(["start", "--quick", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())
    parts = record["details"]["parts"]
    named = [part for part, *_ in start.PHASES]
    assert set(parts) == {"launcher", "imports", *named, "first gather", "first step", "other"}
    assert all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(record["value"])
    assert parts["other"] < 0.3 * record["value"]  # nearly all of it has a name
    assert record["ratio"] == pytest.approx(4.0 / record["value"])
    assert any("first gather" in line for line in tables.lines([record]))


def test_transformers_builds_the_model_that_a_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str]) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", command[2:])
        built.append(runpy.run_module(command[2])["model"])
        return subprocess.CompletedProcess(command, 0)

    built: list[torch.nn.Module] = []
    monkeypatch.setattr(start, "process", here)
    assert start.built_by_transformers("tiny", cuda=False) > 0
    parameters = list(built[0].parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    size = replace(SIZES["tiny"], vocabulary=256)
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in architecture(size).parameters())
