"""A master in mapped files: the same run, on the disk."""

import errno
import os
from pathlib import Path

import psutil
import pytest
import torch

from offload_trainer import UserError
from offload_trainer.master import Slab
from offload_trainer.run import main
from tests.runs import config, custom, metrics
from tests.test_bad_input import one_line
from tests.test_offloader import ADAMW, data, network, offloader, run

SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([]), "c": torch.Size([70])}


def mapped_files() -> int:
    """Files without a name that this process has mapped."""
    return sum(line.endswith("(deleted)") for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_slab_is_a_file_without_a_name(tmp_path: Path, dtype: torch.dtype) -> None:
    before = mapped_files()
    slab = Slab(SHAPES, dtype, folder=tmp_path)
    assert mapped_files() == before + 1 and not list(tmp_path.iterdir())
    assert not slab.flat.any() and slab["a"].shape == (3, 5) and slab["b"].shape == ()
    slab["a"].fill_(7)
    assert float(slab.flat.sum()) == 7 * 15
    view = slab["c"]
    del slab
    view += 1  # the file lives as long as a view
    assert bool((view == 1).all())
    del view
    assert mapped_files() == before


def test_a_disk_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot allocate a slab of 0.00 GiB on .*: No space left on device"):
        Slab(SHAPES, torch.float32, folder=tmp_path)


def test_a_mapped_master_trains_as_any_other(tmp_path: Path) -> None:
    ended, before = [], mapped_files()
    for folder in (None, tmp_path):
        with offloader(network(), ADAMW, folder=folder) as trainer:
            torch.manual_seed(5)
            losses = run(trainer, data(21))
            trainer.finish_round()
            ended.append((losses, {name: tensor.clone() for name, tensor in trainer.master.items()}))
            assert (mapped_files() > before) == (folder is not None)
        del trainer
    assert ended[0][0] == ended[1][0]
    assert all(torch.equal(tensor, ended[1][1][name]) for name, tensor in ended[0][1].items())


def test_a_run_with_a_mapped_master(tmp_path: Path) -> None:
    file = str(config(tmp_path, **custom("blobs")))
    (tmp_path / "disk").mkdir()
    assert main(["--config", file, "--out", str(tmp_path / "ram")]) == 0
    mapped = ["--memory.master", "file", "--memory.folder", str(tmp_path / "disk")]
    assert main(["--config", file, "--out", str(tmp_path / "file"), *mapped]) == 0
    one, other = metrics(tmp_path / "ram"), metrics(tmp_path / "file")
    assert [record["loss"] for record in one] == [record["loss"] for record in other]
    assert not list((tmp_path / "disk").iterdir())


def test_what_a_mapped_master_cannot_be_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(config(tmp_path, **custom("blobs")))
    line = one_line(capsys, main(["--config", file, "--memory.folder", str(tmp_path)]))
    assert f"memory.folder ({tmp_path}) needs memory.master (ram) to be file" in line
    nowhere = tmp_path / "nowhere"
    line = one_line(capsys, main(["--config", file, "--memory.master", "file", "--memory.folder", str(nowhere)]))
    assert f"memory.folder ({nowhere}) must be a folder that can be written: No such file or directory" in line
    there = type("Mount", (), {"mountpoint": str(tmp_path), "fstype": "tmpfs"})
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [there])
    line = one_line(capsys, main(["--config", file, "--memory.master", "file"]))
    assert "must be on a disk: it is on a tmpfs, which is memory itself" in line
