"""The comparison of contenders, on a tiny model: it runs, picks up what is done, and says what it measured."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import runs


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(runs.ROOT / "tools")
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield importlib.import_module("shrink")
    sys.modules.pop("shrink", None)


def test_a_comparison(shrink: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runs.config(tmp_path, **{"structure.start": "importance"})
    arguments = ["--config", str(config), "--quick", "--seeds", "0", "--contenders", "ours", "full", "--points", "3"]
    arguments += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json")]
    arguments += ["--picture", str(tmp_path / "r.svg"), "--task.val_batches", "1"]
    assert shrink.main(arguments) == 0
    ours, full = json.loads((tmp_path / "r.json").read_text())
    assert ours["case"].startswith("ours, seed 0") and full["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["value"] / full["value"])
    assert ours["details"]["parameters"] < full["details"]["parameters"]
    for record in (ours, full):
        steps, seconds, _ = zip(*record["details"]["points"], strict=True)
        assert steps[0] == 0 and list(steps) == sorted(steps) and steps[-1] == record["details"]["steps"]
        assert list(seconds) == sorted(seconds) and seconds[-1] == record["details"]["seconds"]
    assert "<svg" in (tmp_path / "r.svg").read_text()

    monkeypatched = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert shrink.main(arguments) == 0  # nothing is run twice
    assert {path: path.stat().st_mtime_ns for path in monkeypatched} == monkeypatched


def test_a_run_that_fails_is_named(shrink: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runs.config(tmp_path)
    arguments = ["--config", str(config), "--quick", "--contenders", "ours", "--out", str(tmp_path / "runs")]
    assert shrink.main([*arguments, "--task.data", str(tmp_path / "nowhere")]) == 2
    assert "ours, seed 0: error: task.data" in capsys.readouterr().err
