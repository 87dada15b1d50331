"""What is measured of a contender, the same of all."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.peers.sizes import Size
from benchmarks.peers.trainer import Trainer
from offload_trainer import memory

Shape = tuple[int, ...]
"""(batch, heads, tokens, features of a head)."""
LEAST, MOST = 3, 30
"""Timed turns."""


def _attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(q, _repeated(k, q), _repeated(v, q))


def _attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, q, _repeated(k, q), _repeated(v, q))


def _repeated(shared: Shape, q: Shape) -> Shape:
    """Keys or values with a head for each of the queries, which share them."""
    return (shared[0], q[1], *shared[2:])


KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{direction}"): formula
    for kernel in KERNELS
    for direction, formula in (("", _attention), ("_backward", _attention_backward))
}
"""torch's counter leaves the CPU's kernel out, and refuses heads of queries that share keys and values."""


def measured(trainer: Trainer, size: Size, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time first, with nothing watching; then the peaks; last what slows a step down to be counted."""
    if trainer.turn == 1:
        trainer.step(), trainer.step()
    trainer.warm()
    times, losses = timed(trainer, device, seconds)
    if not all(torch.isfinite(torch.tensor(losses))):
        raise ArithmeticError(f"the loss is not finite: {losses}")
    found = {
        "seconds_per_step": median(times) / trainer.turn,
        "slowest": max(times) / trainer.turn,
        "fastest": min(times) / trainer.turn,
        "repeats": len(times),
        "steps_per_repeat": trainer.turn,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": trainer.parameters,
        "parameters_in_a_step": trainer.trained,
        "host_peak_bytes": memory.host_peak(),
        "link_bytes_per_step": trainer.link_bytes(),
        "link_source": trainer.link_source,
        "recipe": trainer.recipe,
    }
    if device.type == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["device_reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)
        if trainer.turn == 1:
            add(found, "link_bytes_profiled", lambda: profiled_link_bytes(trainer, device))
    add(found, "flops_per_token", lambda: counted_flops(trainer) / size.tokens)
    return found


def add(found: dict[str, Any], key: str, count: Callable[[], float]) -> None:
    """A number that could not be had costs nothing of what was measured already; why is recorded instead."""
    try:
        found[key] = count()
    except Exception as error:
        found[f"{key}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]


def timed(trainer: Trainer, device: torch.device, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of each turn, and the loss at its end."""
    times: list[float] = []
    losses: list[float] = []
    began = perf_counter()
    while len(times) < LEAST or (len(times) < MOST and perf_counter() - began < seconds):
        memory.synchronize(device)
        start = perf_counter()
        for _ in range(trainer.turn):
            loss = trainer.step()
        memory.synchronize(device)
        times.append(perf_counter() - start)
        losses.append(loss.item())
    return times, losses


def counted_flops(trainer: Trainer) -> float:
    """Floating-point operations of a step's matrix products, all of a turn's, of forwards, backwards and what is
    computed again; elementwise work and the optimizer are not counted."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        for _ in range(trainer.turn):
            trainer.step()
    return counter.get_total_flops() / trainer.turn


def profiled_link_bytes(trainer: Trainer, device: torch.device) -> int:
    """Bytes of the copies between host and device that the CUDA profiler saw in a step."""
    memory.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.step()
        memory.synchronize(device)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return link_bytes_of(json.loads(trace.read_text())["traceEvents"])


def link_bytes_of(events: list[dict[str, Any]]) -> int:
    """Of a trace's events, the bytes of copies from host to device and from device to host."""
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    crossing = [event for event in copies if "HtoD" in event["name"] or "DtoH" in event["name"]]
    if not crossing:
        raise LookupError("the profiler saw no copies")
    return sum(int(event["args"]["bytes"]) for event in crossing)
