"""What safetensors files are called and how they name types, for reading and writing alike; and sizes, in words."""

import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""How transformers calls the only file of a model, and the list of its shards where there are several."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Names of the dtypes that are read and written; others (8 bits and less) store quantized weights."""


def readable(size: float) -> str:
    """Bytes in a unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.{0 if unit == 'B' else 1}f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
