"""FSDP2 on one process with CPUOffloadPolicy: parameters, gradients and optimizer on the host, each layer fetched when
it computes."""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.peers.sizes import Size, architecture, fill, materialise, save_activations
from benchmarks.peers.trainer import ADAMW, Trainer, data, job_of_one, numel, ordinary_step


def start(size: Size, device: torch.device) -> Trainer:
    """As torchtitan sets it up: built on meta, one unit a layer, bf16 compute with fp32 gradients, pinned memory,
    the optimizer's fused step on the host.

    Over the link by design: `FSDPParam.all_gather_inputs` copies the fp32 shard and rounds it on the device, once for
    the forward and, resharded after it, once for the backward (what a checkpointed layer computes again uses the
    same); gradients come down in fp32. The root's own tensors (embedding, head, last norm) are not resharded after the
    forward: they cross once.
    """
    job_of_one()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (1,))
    policy = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    }
    model = architecture(size)
    save_activations(model, size)
    total, within = numel(model), numel(model.model.layers)
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    materialise(model, torch.device("cpu"), buffers=device)
    fill((p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()), device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return Trainer(
        ordinary_step(model, optimizer, data(size, device), None),
        parameters=total,
        trained=total,
        link_bytes=lambda: 4 * (2 * total + within),
        link_source="by design: fp32 weights up for the forward and, but for embedding and head, again for the "
        "backward; fp32 gradients down",
        recipe={"param_dtype": "bfloat16", "reduce_dtype": "float32", "pin_memory": device.type == "cuda"},
        close=distributed.destroy_process_group,
    )
