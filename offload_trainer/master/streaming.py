"""Write safetensors tensor by tensor.

`safetensors.torch.save_file` first copies every tensor into one buffer each, all at once: a second full copy. The
format is a length, a JSON header and the raw values, so writing it in order needs no copy at all. Reading is
`safetensors.safe_open`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write host tensors to a new file, flushed to disk; returns its size in bytes."""
    header = _header(tensors, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            # A view of the same bytes: numpy has no bfloat16.
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy())  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file `write_safetensors` would write."""
    return 8 + len(_header(tensors, None)) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # values start on 8 bytes, as the library aligns them
