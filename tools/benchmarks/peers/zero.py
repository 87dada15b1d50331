"""DeepSpeed on one process: ZeRO-Offload (stage 2, the optimizer on the host) and ZeRO-3 with parameters there too."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.sizes import Size, architecture, fill, loss_fn, materialise, save_activations
from benchmarks.peers.trainer import ADAMW, Trainer, data, job_of_one

PINNED = {"device": "cpu", "pin_memory": True}


def stage_2(size: Size) -> dict[str, Any]:
    """The config of DeepSpeed's ZeRO-Offload tutorial. Buckets are a tenth of the default of 500 million elements, as
    is advised for small cards: on one process they are only memory."""
    return _config(
        size,
        stage=2,
        offload_optimizer=PINNED,
        contiguous_gradients=True,
        overlap_comm=True,
        reduce_bucket_size=50_000_000,
        allgather_bucket_size=50_000_000,
    )


def stage_3(size: Size) -> dict[str, Any]:
    """Stage 3 with the sizes that transformers' integration fills in for "auto"."""
    return _config(
        size,
        stage=3,
        offload_optimizer=PINNED,
        offload_param=PINNED,
        contiguous_gradients=True,
        overlap_comm=True,
        reduce_bucket_size=size.hidden**2,
        stage3_prefetch_bucket_size=int(0.9 * size.hidden**2),
        stage3_param_persistence_threshold=10 * size.hidden,
    )


def _config(size: Size, **zero: Any) -> dict[str, Any]:
    """AdamW becomes DeepSpeedCPUAdam (in its AdamW mode) where the optimizer is offloaded."""
    return {
        "train_micro_batch_size_per_gpu": size.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "zero_optimization": zero,
    }


def start_offload(size: Size, device: torch.device) -> Trainer:
    """Over the link by design (`async_inplace_copy_grad_to_fp32_buffer_from_gpu` and `step` in `stage_1_and_2.py`):
    each gradient down, widened to fp32 on the device before it goes, and each weight up in bf16.
    """
    job_of_one()
    model = architecture(size)
    save_activations(model, size)
    materialise(model, torch.device("cpu"))
    fill(model.parameters(), device)
    return _start(model, stage_2(size), size, device, 4 + 2, "fp32 gradients down, bf16 weights up")


def start_stage_3(size: Size, device: torch.device) -> Trainer:
    """Over the link by design (`partition_grads` and `_offload_grad_partition_at_boundary` in `stage3.py`): bf16
    weights up for the forward and again for the backward (once more where a checkpointed layer computes again after
    they were released: not counted); each bf16 gradient into a buffer on the host, back up, widened on the device and
    down again in fp32.
    """
    import deepspeed

    job_of_one()
    config = stage_3(size)
    with deepspeed.zero.Init(config_dict_or_path=config):  # never whole on the device, nor in fp32 on the host
        model = LlamaForCausalLM(LlamaConfig(use_cache=False, **size.as_config())).train()
    save_activations(model, size)
    fill(gathered(model), device)
    how = "bf16 weights up twice; gradients down in bf16, up again and down in fp32"
    return _start(model, config, size, device, 2 * 2 + 2 + 2 + 4, how)


def gathered(model: nn.Module) -> Iterator[Tensor]:
    """Each parameter of stage 3, whole on the device while it is looked at; what is written to it stays."""
    import deepspeed

    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            yield parameter


def _start(
    model: nn.Module, config: dict[str, Any], size: Size, device: torch.device, bytes_per_parameter: int, how: str
) -> Trainer:
    import deepspeed

    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    batches = data(size, device)

    def step() -> Tensor:
        loss = loss_fn(engine, next(batches))
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Trainer(
        step,
        parameters=total,
        trained=total,
        link_bytes=lambda: bytes_per_parameter * total,
        link_source=f"by design: {how}",
        recipe=config["zero_optimization"] | {"version": deepspeed.__version__},
        close=engine.destroy,
    )
