"""Language models for tests: a tiny Llama, its task's section of a config, text to train on."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def lm_config(data, **changes) -> SimpleNamespace:
    fields = {"model": LLAMA, "data": str(data), "tokenizer": None, "sequence": 16, "batch_size": 4}
    return SimpleNamespace(**{**fields, "val_fraction": 0.25, "val_batches": 3, **changes})


def write_texts(folder: Path) -> Path:
    """20 files of text, each with a letter of its own, and two files that are not to be read."""
    for number in range(20):
        file = folder / f"part{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([65 + number]) * (90 + number))
    (folder / ".hidden").write_text("hidden")
    (folder / "binary.bin").write_bytes(b"a\0b" * 50)
    return folder


def message(error) -> str:
    """The text of a raised UserError, which must be one line."""
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def with_memory(model: nn.Module) -> nn.Module:
    """The model off meta, ties kept, every tensor full of what no initialisation leaves behind."""
    memory: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    filled = torch.full(tensor.shape, 77, dtype=tensor.dtype)
                    filled = nn.Parameter(filled) if isinstance(tensor, nn.Parameter) else filled
                    tensors[name] = memory.setdefault(id(tensor), filled)
    return model
