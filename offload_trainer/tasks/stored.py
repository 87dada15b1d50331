"""The tensors of a model folder: where they lie, as headers and index say."""

import json
from collections.abc import Mapping
from pathlib import Path

from offload_trainer.errors import UserError
from offload_trainer.files.format import INDEX, WEIGHTS
from offload_trainer.files.reading import Stored, read_header


def stored_tensors(folder: Path) -> list[Stored]:
    """Every tensor of a model folder, from the headers of its safetensors files alone.

    Raises UserError if there are none, only a pickle, a file that is missing, damaged or truncated, or an index that
    does not say what the files hold.
    """
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if files := sorted(folder.glob("*.safetensors")):
        found: dict[str, Stored] = {}
        for stored in (stored for file in files for stored in _header(file)):
            if (first := found.setdefault(stored.name, stored)) is not stored:
                raise UserError(
                    f"task.model ({folder}): {first.file.name} and {stored.file.name} both hold {stored.name}, and no"
                    f" {INDEX} says which counts: remove one of them"
                )
        return list(found.values())
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"task.model ({folder}) has its weights in {some(pickles)} only, a format that can run code when it is "
            "read: convert them to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"task.model ({folder}) has no weights: no *.safetensors in it (for a new model give its config)")


def _indexed(folder: Path) -> list[Stored]:
    """The tensors of all shards, which must be exactly those that the index assigns to each."""
    where = f"task.model ({folder}): {INDEX}"
    try:
        assigned: Mapping[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in assigned.items():
            by_file.setdefault(file, set()).add(name)
        outside = [file for file in by_file if Path(file).name != file]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{where} is not a safetensors index ({type(error).__name__})") from error
    if not by_file:
        raise UserError(f"{where} lists no tensor")
    if outside:
        raise UserError(f"{where} names a file outside the folder, {outside[0]!r}: shards must lie beside their index")
    if missing := sorted(file for file in by_file if not (folder / file).is_file()):
        raise UserError(f"task.model ({folder}) lacks {some(missing)}, listed in {INDEX}: copy or download it again")
    found: list[Stored] = []
    for file, names in sorted(by_file.items()):
        tensors = _header(folder / file)
        if absent := sorted(names - {stored.name for stored in tensors}):
            raise UserError(f"{where} says that {file} holds {some(absent)}; it does not")
        for stored in tensors:
            if stored.name not in names:
                place = assigned.get(stored.name)
                raise UserError(f"{where} assigns {stored.name} to {place or 'no file'}; {file} holds it")
        found += tensors
    return found


def _header(file: Path) -> list[Stored]:
    try:
        return read_header(file)
    except UserError as error:
        raise UserError(f"task.model: {error}") from error


def some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
