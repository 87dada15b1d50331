"""Who moves elements: the choice, and that it makes no difference to the result."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_trainer import UserError
from offload_trainer.device import movers, native
from offload_trainer.device.movers import Native, Plain, choose_mover
from offload_trainer.device.native import NotCompiled, load_kernels
from tests.runs import ROOT, config, custom

try:
    load_kernels()
    COMPILED = True
except NotCompiled:
    COMPILED = False
compiled = pytest.mark.skipif(not COMPILED, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "choose_mover", choose_mover.__wrapped__)


@compiled
@pytest.mark.parametrize("faster", ["native", "plain"])
def test_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch, faster: str) -> None:
    speeds = {Native: 5e9, Plain: 2e9} if faster == "native" else {Native: 1e9, Plain: 2e9}
    monkeypatch.setattr(movers, "speed", lambda mover: speeds[type(mover)])
    chosen = movers.choose_mover("auto", 1)
    if faster == "native":
        assert isinstance(chosen, Native)
        assert chosen.why == "moved by compiled kernels (5.0 GB/s when tried, 2.0 by torch)"
    else:
        assert isinstance(chosen, Plain)
        assert chosen.why == "moved by torch (2.0 GB/s when tried, 1.0 by compiled kernels)"


@compiled
def test_what_is_asked_for_is_taken() -> None:
    assert isinstance(movers.choose_mover("plain", 1), Plain)
    assert isinstance(movers.choose_mover("native", 2), Native)


def test_without_a_compiler_torch_moves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> native.Kernels:
        raise NotCompiled("no C++ compiler (c++)")

    monkeypatch.setattr(movers, "load_kernels", none)
    chosen = movers.choose_mover("auto", 1)
    assert isinstance(chosen, Plain) and chosen.why == "moved by torch (no C++ compiler (c++))"
    with pytest.raises(NotCompiled):
        movers.choose_mover("native", 1)


def test_kernels_asked_of_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """One line, before anything is written; in a process of its own, since this one has compiled them."""
    file = str(config(tmp_path, **custom("blobs")))
    command = [sys.executable, "offload_trainer/run.py", "--config", file, "--memory.transfer", "native"]
    environment = {"PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin", "CXX": "/nonexistent/c++"}
    environment |= {"HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "the native transfer kernels cannot be compiled: no C++ compiler (/nonexistent/c++)" in line
    assert "memory.transfer: plain does without" in line
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@compiled
def test_what_kernels_cannot_move_goes_the_plain_way() -> None:
    """Halves, which they do not know, beside floats."""
    ended = []
    for mover in (Plain(), Native(load_kernels(), 1)):
        full = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(12.0).view(3, 4).half()}
        index = (torch.tensor([0, 2]), torch.tensor([1, 3]))
        pairs = [(torch.zeros(2, 2, dtype=tensor.dtype), tensor, index) for tensor in full.values()]
        assert Native(load_kernels(), 1)._split(pairs) == ([pairs[0]], [pairs[1]])
        mover.gather(pairs)
        for dense, tensor, _ in pairs:
            assert torch.equal(dense, tensor[::2, 1::2])
            dense += 1
        squared = mover.scatter(pairs, delta=True)
        assert squared == pytest.approx(8) and mover.scatter(pairs, delta=False) == 0
        ended.append(full)
    for name, tensor in ended[0].items():
        assert torch.equal(tensor, ended[1][name])


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match="transfer \\('fast'\\) must be auto, plain, native"):
        movers.choose_mover("fast", 1)  # type: ignore[arg-type]


@compiled
def test_both_can_be_tried() -> None:
    for mover in (Plain(), Native(load_kernels(), 1)):
        assert 1e6 < movers.speed(mover, repeats=1) < 1e13
