"""Which processes and devices the launcher was asked for, and whether they are there."""

import os

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from offload_trainer.errors import UserError


def require_devices() -> None:
    """Raise `UserError` for what was asked of the launcher and would not be done.

    An engine that is not supported, or more GPUs than there are, which accelerate passes over in silence.

    Asked for: by `accelerate launch --num_processes N` or `--gpu_ids …`, unless with `--cpu`. `torchrun` alone asks for
    processes; on a machine without GPUs they share its CPU.
    """
    for engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise UserError(f"accelerate was configured for {engine}; start one process or several without it")
    there = torch.cuda.device_count()
    processes = local_processes()
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if os.environ.get("ACCELERATE_USE_CPU") == "True" or (not there and not by_accelerate):
        return
    if by_accelerate:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        processes = max(processes, _launched_with("--num_processes"), len(visible.split(",")) if visible else 0)
    if processes > max(1, there):
        raise UserError(
            f"{processes} GPUs were asked for, one per process, and this machine has {there}"
            + ("" if there else "; on its CPU, start processes with torchrun --nproc_per_node")
        )


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def transfer_threads(device: torch.device, *, overlap: bool) -> int:
    """Threads for the host's part of transfers: beside a GPU this process's share of the cores; on a CPU those of the
    training. In the background half of them, or one on a CPU: a launch that waits for a core makes a GPU wait."""
    if device.type == "cpu":
        return 1 if overlap else torch.get_num_threads()
    return max(1, _cores() // local_processes() // (2 if overlap else 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """Undo accelerate's default of one thread: this process takes its share of the cores, which touch and fill the
    master, and on a CPU train.

    Not if the user chose a number of threads, which the launcher, our parent, then has in its environment.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    try:
        parent = psutil.Process().parent()
        chosen = parent is not None and "OMP_NUM_THREADS" in parent.environ()
    except psutil.Error:
        chosen = True
    if not chosen:
        cores = min(_cores(), psutil.cpu_count(logical=False) or _cores())
        torch.set_num_threads(max(1, cores // local_processes()))


def require_supported(accelerator: Accelerator) -> None:
    """Raise `UserError` for settings of accelerate that would train something else than was asked for."""
    kind, parts = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"accelerate was configured for {kind.value}; start one process or several without it")
    if parts != 1:  # it would divide the loss, and nobody would sum the parts
        raise UserError(
            f"gradient_accumulation_steps ({parts}) must be 1: call loss() and backward several times instead"
        )
    if accelerator.mixed_precision == "fp16":
        raise UserError("mixed_precision (fp16) must be no or bf16: losses are not scaled")


def _launched_with(option: str) -> int:
    """The number that the launcher, our parent process, was given for an option; 0 if none."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return 0
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in (option, option.replace("_", "-")) and (value or following).isdigit():
            return int(value or following)
    return 0
