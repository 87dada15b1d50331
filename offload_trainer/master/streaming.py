"""Write safetensors tensor by tensor.

`safetensors.torch.save_file` first copies every tensor into one buffer each, all at once: a second full copy. The
format is a length, a JSON header and the raw values, so writing it in order needs no copy at all. Reading is
`safetensors.safe_open`.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from offload_trainer.errors import UserError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """Write host tensors to a new file, flushed to disk; returns its size in bytes and its CRC-32."""
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
