"""Checkpoints: folders of safetensors and JSON, written under a temporary name and renamed when complete."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.files.format import DTYPES, readable
from offload_trainer.files.reading import read_header
from offload_trainer.files.writing import dtype_name, file_bytes, file_crc, write_json, write_safetensors
from offload_trainer.master.interrupts import defer_interrupts

META = "checkpoint.json"
FORMAT = 5
_FOLDER = r"step-\d{8,}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its safetensors files, and what its JSON says."""

    path: Path
    files: tuple[str, ...]
    meta: Mapping[str, Any]

    def read_into(self, part: str, targets: Mapping[str, Tensor]) -> None:
        """Copy a part's tensors into existing host tensors. Names, shapes and dtypes must agree exactly."""
        self.check(part, targets)
        stored = read_header(self._file(part))
        with open(self._file(part), "rb", buffering=0) as handle:
            for one in stored:
                one.read_into(handle, targets[one.name])

    def read(self, part: str) -> dict[str, Tensor]:
        targets = {one.name: torch.empty(one.shape, dtype=DTYPES[one.dtype]) for one in read_header(self._file(part))}
        self.read_into(part, targets)
        return targets

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.safetensors"

    def check(self, part: str, targets: Mapping[str, Tensor]) -> None:
        """Raise `UserError` unless the part holds exactly the tensors of `targets` (any device): reads headers only."""
        if self._file(part).name not in self.files:
            raise UserError(f"checkpoint {self.path} has no {self._file(part).name}: it was made with other settings")
        there = {one.name: (one.shape, one.dtype) for one in read_header(self._file(part))}
        for name in [*targets, *there]:
            stored = here = ("absent", "absent")
            if name in targets:
                here = (str(tuple(targets[name].shape)), dtype_name(targets[name].dtype))
            if name in there:
                stored = (str(there[name][0]), there[name][1])
            for was, now in zip(stored, here, strict=True):
                if was != now:
                    raise UserError(f"checkpoint {self.path} is of another model: {name} is {was} there, {now} here")


class CheckpointStore:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, keep_last: int = 2):
        self.folder, self.keep_last = folder, keep_last

    def begin(self, step: int) -> Path | None:
        """A run starts here at `step`: move checkpoints of later steps aside, which an earlier run left.

        They would pass for this run's. Returns the folder they are in now, None if there were none.
        """
        later = [path for path in self._folders() if _step(path) > step]
        if not later:
            return None
        aside = _aside(followed(self.folder))  # on the disk they are on, or they could not be renamed
        try:
            aside.mkdir()
            for path in later:
                os.replace(path, aside / path.name)
        except OSError as error:
            raise UserError(f"cannot move {later[0]} aside, to {aside}: {error.strerror or error}") from error
        return aside

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest. On any error what was there before stays, and nothing half-written.

        Raises `UserError` when the disk is too full, before writing.
        """
        path = self.folder / f"step-{step:08d}"
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed while writing another step
        with whole_folder(path) as writing:
            need = sum(file_bytes(tensors) for tensors in parts.values())
            free = shutil.disk_usage(self.folder).free
            if need > free:
                sizes = f"it needs {readable(need)}, {readable(free)} are free"
                raise UserError(f"no room for a checkpoint in {self.folder}: {sizes}")
            files = {}
            for part, tensors in parts.items():
                size, crc = write_safetensors(writing / f"{part}.safetensors", tensors)
                files[f"{part}.safetensors"] = {"bytes": size, "crc32": crc}
            content = {"format": FORMAT, "step": step, "files": files, **meta}
            write_json(writing / META, {"crc32": _crc(content), "content": content})
        for old in self._folders()[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def has(self, step: int) -> bool:
        return (self.folder / f"step-{step:08d}").exists()

    def is_empty(self) -> bool:
        return not self._folders()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are passed over."""
        for path in reversed(self._folders()):
            try:
                return open_checkpoint(path)
            except UserError:
                continue
        return None

    def newest_folder(self) -> Path | None:
        """Of the newest checkpoint, damaged or not."""
        return self._folders()[-1] if self._folders() else None

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if re.fullmatch(_FOLDER, p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises `UserError` when there is no checkpoint at `path`, or one bit of it is not as it was written."""
    if not (path / META).is_file():
        raise UserError(f"resume: {path} holds no checkpoint (no {META} in it)")
    try:
        outer = json.loads((path / META).read_text())
        content = outer["content"]
        if outer["crc32"] != _crc(content):
            raise ValueError("its checksum does not fit")
        files: dict[str, dict[str, int]] = content["files"]
        if re.fullmatch(_FOLDER, path.name) and _step(path) != content.get("step", _step(path)):
            raise ValueError(f"it is of step {content['step']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"resume: {path / META} is damaged ({error})") from error
    if content.get("format") != FORMAT:
        raise UserError(f"resume: {path} has format {content.get('format')}, this version reads format {FORMAT}")
    for name, written in files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != written["bytes"]:
            raise UserError(f"resume: {file} is damaged: {size} bytes of {written['bytes']}")
        if file_crc(file) != written["crc32"]:
            raise UserError(f"resume: {file} is damaged: its checksum does not fit")
    return Checkpoint(path, tuple(files), content)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, which may also be a run's `out` folder or its `checkpoints`: then the newest in it."""
    if (path / META).is_file():
        return open_checkpoint(path)
    stores = [CheckpointStore(folder) for folder in (path / "checkpoints", path)]
    for store in stores:
        if (newest := store.newest()) is not None:
            return newest
    for store in stores:
        if (damaged := store.newest_folder()) is not None:
            try:
                return open_checkpoint(damaged)
            except UserError as error:
                raise UserError(
                    f"{error}; no older one in {store.folder} is whole: start anew without resume"
                ) from error
    return open_checkpoint(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes the place of `path` when the block ends well and else disappears.

    At no moment is there neither the old nor the new one. A link stays, and what it leads to is replaced. Raises
    `UserError` for what the file system refuses.
    """
    place = followed(path)
    writing, old = place.with_name(f".writing-{place.name}"), place.with_name(f".old-{place.name}")
    try:
        if old.exists() and not place.exists():
            os.replace(old, place)  # of a run that was killed between the two renames
        _remove(writing)  # of a run that was killed while writing
        writing.mkdir(parents=True)
        yield writing
        with defer_interrupts():
            _remove(old)
            if place.exists():
                os.replace(place, old)
            os.replace(writing, place)
            _remove(old)
    except BaseException as error:
        _remove(writing)
        if old.exists() and not place.exists():
            os.replace(old, place)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def set_aside(path: Path, new: Path) -> Path | None:
    """Before `new` takes the place of a folder: if that holds files that `new` does not, other than weights, it is
    renamed, for somebody may have put them there. Returns what it is called now."""
    place = followed(path)
    kept = {file.name for file in place.iterdir()} - {file.name for file in new.iterdir()} if place.is_dir() else ()
    if all(name.endswith((".safetensors", ".safetensors.index.json")) for name in kept):
        return None
    aside = _aside(place)
    os.replace(place, aside)
    return aside


def _aside(folder: Path) -> Path:
    """The first free name of those for what an earlier run left."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    return aside


def followed(path: Path) -> Path:
    """What a link leads to in the end; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _remove(path: Path) -> None:
    """A folder with all that is in it, as far as the file system lets go of it; of a link only the link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _crc(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
