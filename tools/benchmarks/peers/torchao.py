"""torchao's CPUOffloadOptimizer: weights on the device, the optimizer's states and step on the host.

As its documentation advises: gradients leave the device during the backward and are freed there
(`offload_gradients=True`), and the host's step is torch's fused AdamW.
"""

import torch

from benchmarks.peers.sizes import Size, architecture, fill, materialise, save_activations
from benchmarks.peers.trainer import ADAMW, Trainer, data, numel, ordinary_step


def start(size: Size, device: torch.device, dtype: torch.dtype = torch.float32) -> Trainer:
    """The two recipes of its authors: fp32 weights under bf16 autocast, or everything in bf16 (gradients, moments and
    the host's weights as well: no other contender rounds those).

    Over the link by design: each gradient down and each weight up, of tensors of 4,096 elements and more.
    """
    from torchao.optim import CPUOffloadOptimizer  # wanted by this contender alone

    model = architecture(size)
    save_activations(model, size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # on meta; rotary frequencies stay fp32
    materialise(model, device)
    fill(model.parameters(), device)
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, minimal_size=4096, fused=True, **ADAMW
    )
    moved = sum(p.nbytes for p in model.parameters() if p.numel() >= 4096)
    return Trainer(
        ordinary_step(model, optimizer, data(size, device), device.type if dtype == torch.float32 else None),
        parameters=numel(model),
        trained=numel(model),
        link_bytes=lambda: 2 * moved,
        link_source=f"by design: gradients down, weights up, both {dtype}".replace("torch.", ""),
        recipe={"offload_gradients": True, "fused": True, "weights": str(dtype).removeprefix("torch.")},
    )
