"""A process stays on the processors next to its GPU."""

import os
from pathlib import Path

import pytest
import torch

from offload_trainer.device import numa


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5\n", {5}), ("\n", set()), (None, set())],
)
def test_processors_are_read_from_the_system(tmp_path: Path, text: str | None, expected: set[int]) -> None:
    if text is not None:
        (tmp_path / "0000:af:00.0").mkdir()
        (tmp_path / "0000:af:00.0" / "local_cpulist").write_text(text)
    assert numa.processors_near("0000:AF:00.0", tmp_path) == expected


@pytest.mark.parametrize("node", ["one", "elsewhere", "unknown"])
def test_only_processors_that_the_process_may_use_are_chosen(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    here = os.sched_getaffinity(0)
    near = {"one": {min(here), 4096}, "elsewhere": {4096}, "unknown": set()}[node]
    monkeypatch.setattr(numa, "_bus_id", lambda device: "0000:af:00.0")
    monkeypatch.setattr(numa, "processors_near", lambda bus_id: near)
    try:
        numa.stay_near(torch.device("cuda", 0))
        assert os.sched_getaffinity(0) == ({min(here)} if node == "one" else here)
    finally:
        os.sched_setaffinity(0, here)


def test_a_cpu_changes_nothing() -> None:
    here = os.sched_getaffinity(0)
    numa.stay_near(torch.device("cpu"))
    assert os.sched_getaffinity(0) == here


@pytest.mark.gpu
def test_the_driver_names_the_device() -> None:
    assert numa._bus_id(torch.device("cuda", 0)).count(":") == 2
    before = os.sched_getaffinity(0)
    try:
        numa.stay_near(torch.device("cuda"))
        assert os.sched_getaffinity(0) <= before
    finally:
        os.sched_setaffinity(0, before)
