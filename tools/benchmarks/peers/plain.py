"""Plain training: weights, gradients and moments on the device."""

import torch

from benchmarks.peers.sizes import Size, architecture, fill, materialise, save_activations
from benchmarks.peers.trainer import ADAMW, Trainer, data, numel, ordinary_step


def start(size: Size, device: torch.device) -> Trainer:
    """fp32 weights under bf16 autocast, torch's fused AdamW. Nothing crosses the link but the batches."""
    model = architecture(size)
    save_activations(model, size)
    materialise(model, device)
    fill(model.parameters(), device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return Trainer(
        ordinary_step(model, optimizer, data(size, device), device.type),
        parameters=numel(model),
        trained=numel(model),
        link_bytes=lambda: 0.0,
        link_source="by design: nothing but the batches",
    )
