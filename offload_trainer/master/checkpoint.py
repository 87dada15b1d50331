"""Checkpoints: folders of safetensors and JSON, written under a temporary name and renamed when complete."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.master.streaming import file_bytes, write_safetensors

META = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: `files` maps each safetensors file to its size in bytes."""

    path: Path
    files: Mapping[str, int]
    meta: Mapping[str, Any]

    def read_into(self, part: str, targets: Mapping[str, Tensor]) -> None:
        """Copy a part's tensors into existing ones, one at a time. Names, shapes and dtypes must agree exactly."""
        self.check(part, targets)
        with safe_open(self.path / f"{part}.safetensors", framework="pt") as file:
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))

    def read(self, part: str) -> dict[str, Tensor]:
        with safe_open(self.path / f"{part}.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def check(self, part: str, targets: Mapping[str, Any]) -> None:
        """Raise `UserError` unless the part holds exactly the tensors of `targets` (anything with a shape)."""
        file_name = f"{part}.safetensors"
        if file_name not in self.files:
            raise UserError(f"checkpoint {self.path} has no {file_name}: it was made with other settings")
        try:
            with safe_open(self.path / file_name, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {self.path}: {file_name} cannot be read ({error})") from error
        for name in [*targets, *shapes]:
            there = shapes.get(name)
            here = tuple(targets[name].shape) if name in targets else None
            if there != here:
                what = f"{name} is {there or 'absent'} there, {here or 'absent'} here"
                raise UserError(f"checkpoint {self.path} is of another model: {what}")


class CheckpointStore:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, keep_last: int = 2):
        self.folder, self.keep_last = folder, keep_last

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest. On any error what was there before stays, and nothing half-written.

        Raises `UserError` when the disk is too full, before writing.
        """
        path = self.folder / f"step-{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover)  # of a run that was killed while writing
        need, free = (
            sum(file_bytes(tensors) for tensors in parts.values()),
            shutil.disk_usage(self.folder).free,
        )
        if need > free:
            raise UserError(f"no room for a checkpoint in {self.folder}: it needs {_gib(need)}, {_gib(free)} are free")
        with whole_folder(path) as writing:
            files = {}
            for part, tensors in parts.items():
                files[f"{part}.safetensors"] = write_safetensors(writing / f"{part}.safetensors", tensors)
            write_json(writing / META, {"format": FORMAT, "step": step, "files": files, **meta})
        for old in self._folders()[: -self.keep_last]:
            shutil.rmtree(old)
        return path

    def has(self, step: int) -> bool:
        return (self.folder / f"step-{step:08d}").exists()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are passed over."""
        for path in reversed(self._folders()):
            try:
                return open_checkpoint(path)
            except UserError:
                continue
        return None

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises `UserError` when there is no checkpoint at `path`, or it is incomplete or damaged."""
    if not (path / META).is_file():
        raise UserError(f"resume: {path} holds no checkpoint (no {META} in it)")
    try:
        meta = json.loads((path / META).read_text())
        files = dict(meta["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"resume: {path / META} cannot be read ({error})") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"resume: {path} has format {meta.get('format')}, this version reads format {FORMAT}")
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else 0
        if there != size:
            raise UserError(f"resume: {path / name} is damaged: {there} bytes of {size}")
    return Checkpoint(path, files, meta)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which may also be a run's `out` folder or its `checkpoints`: then the newest in it."""
    if (path / META).is_file():
        return open_checkpoint(path)
    for folder in (path / "checkpoints", path):
        newest = CheckpointStore(folder).newest()
        if newest is not None:
            return newest
    return open_checkpoint(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes the place of `path` when the block ends well and else disappears.

    Raises `UserError` for what the file system refuses.
    """
    writing = path.with_name(f".writing-{path.name}")
    try:
        shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed while writing
        writing.mkdir(parents=True)
        yield writing
        if path.exists():
            shutil.rmtree(path)
        os.replace(writing, path)
    except BaseException as error:
        shutil.rmtree(writing, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
