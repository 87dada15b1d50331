"""Write safetensors tensor by tensor, in one file or in shards.

`safetensors.torch.save_file` first copies every tensor into one buffer each, all at once: a second full copy. The
format is a length, a JSON header and the raw values, so writing it in order needs no copy at all.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import ENOLCK, ENOTSUP
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.files.format import DTYPES, INDEX, WEIGHTS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Context: raise `UserError` where another process is within one for the same folder (which must be there). On a
    file system without locks, such as some that are mounted over a network, nothing is noticed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"out ({folder}): another run writes there; wait for its end, or use another") from error
        except OSError as error:
            if error.errno not in (ENOLCK, ENOTSUP):  # a file system without locks: then it is up to the user
                raise
        yield
    finally:
        os.close(handle)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_size: int) -> None:
    """Write tensors of any device into an existing folder as transformers does, one of them at a time on the host.

    One `model.safetensors` if they fit `shard_size` bytes, else `model-00001-of-00003.safetensors` and so on with an
    index. A tensor larger than that has a shard to itself.
    """
    shards = split(tensors, shard_size)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        return
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}
    for file, names in files.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        },
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    with open(folder / INDEX, "w") as file:
        json.dump(index, file, indent=2)


def split(tensors: Mapping[str, Tensor], shard_size: int) -> list[list[str]]:
    """The names in each shard, in order: as many to a shard as have at most `shard_size` bytes, but at least one."""
    shards: list[list[str]] = [[]]
    room = shard_size
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """Write tensors to a new file, flushed to disk; returns its size in bytes and its CRC-32."""
    header = _header(tensors, metadata)
    crc = 0
    with open(path, "wb") as file:
        for part in (len(header).to_bytes(8, "little"), header):
            file.write(part)
            crc = zlib.crc32(part, crc)
        for tensor in tensors.values():
            # A view of the same bytes: numpy has no bfloat16.
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(values)
            crc = zlib.crc32(values, crc)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), crc


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """A block that writes records of a run to `path`. Raises `UserError` for what the file system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; checkpoints and earlier records are kept: mend that and "
            "go on with --resume auto"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Likewise. Raises `ValueError` for NaN and infinity."""
    replace_text(path, json.dumps(content, indent=1, allow_nan=False))


def file_crc(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            crc = zlib.crc32(chunk, crc)
    return crc


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors calls it. Raises `UserError` for one it is not written as here."""
    if dtype not in _NAMES:
        raise UserError(f"tensors of {dtype} cannot be saved; known are {', '.join(str(known) for known in _NAMES)}")
    return _NAMES[dtype]


def require_savable(tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for the first tensor of a type that cannot be written."""
    for name, tensor in tensors.items():
        try:
            dtype_name(tensor.dtype)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file `write_safetensors` would write."""
    return 8 + len(_header(tensors, None)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # values start on 8 bytes, as the library aligns them
