"""A GPU that is not there, for tests of what depends on when a device does its work.

What it is given waits in the queue of its stream, and runs as late as somebody asks for it or as early as chance has
it: in any order that streams and events allow. A copy from or to pinned memory reads and writes that memory only then.
Memory that the host has let go is filled with NaN in the order of the stream that took it, as if the next one there had
it. So whatever relies on an order that nothing enforces computes with other numbers, and a comparison tells.

Its tensors are CPU tensors inside, which kernels of the CPU compute with: it says nothing about speed, precision, or
kernels of a real device.
"""

import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

CUDA = torch.device("cuda", 0)
aten: Any = torch.ops.aten
ALIASES = (aten._unsafe_view.default, aten.lift_fresh.default)
"""Views whose schema does not say so."""
QUIET = {aten.native_batch_norm.default: (3, 4)}
"""Arguments that an op changes and whose schema does not say so."""
ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Of ops for whose outcome the host waits."""


class Stream:
    """Work in the order in which it was given."""

    def __init__(self, gpu: "Gpu"):
        self._gpu = gpu
        self.queue: deque[Any] = deque()
        self.given = self.done = 0

    def wait_event(self, event: "Event") -> None:
        self._gpu.give(event, self)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> "Event":
        event = Event(self._gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.until(self, self.given)


class Event:
    """A place in a stream."""

    def __init__(self, gpu: "Gpu", **_: Any):
        self._gpu = gpu
        self.stream, self.place = gpu.default, 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.given

    def wait(self, stream: Stream) -> None:
        place = Event(self._gpu)  # the event may be recorded again
        place.stream, place.place = self.stream, self.place
        stream.wait_event(place)

    def synchronize(self) -> None:
        self._gpu.until(self.stream, self.place)

    def elapsed_time(self, _: "Event") -> float:
        return 1.0


class Block:
    """Memory of the device, as long as a tensor on the host knows of it."""

    def __init__(self, gpu: "Gpu", inner: Tensor):
        weakref.finalize(self, gpu.freed, inner, gpu.current).atexit = False


class Gpu:
    """Its streams, its memory. haste: how probable it is that it does something whenever it is given something."""

    def __init__(self, seed: int, haste: float):
        self._chance, self._haste = random.Random(seed), haste
        self._lock, self._local = threading.RLock(), threading.local()
        self.streams: list[Stream] = []
        self.default = self.new_stream()
        self.generator = torch.Generator()
        self.pinned: dict[int, int] = {}
        """Address → bytes of the host's memory."""
        self.allocated = self.peak = self.launched = 0

    def new_stream(self) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        yield
        self._local.stream = before

    def give(self, work: Any, stream: Stream | None = None) -> None:
        """A kernel, or an event to wait for."""
        stream = stream or self.current
        with self._lock:
            stream.queue.append(work)
            stream.given += 1
            self._as_it_likes()

    def until(self, stream: Stream, place: int) -> None:
        with self._lock:
            while stream.done < place:
                head = stream.queue[0]
                if isinstance(head, Event):
                    self.until(head.stream, head.place)
                if stream.done < place:
                    self._run(stream)
                    self._as_it_likes()

    def synchronize(self, *_: Any) -> None:
        for stream in self.streams:
            stream.synchronize()

    def _as_it_likes(self) -> None:
        while self._chance.random() < self._haste:
            stream = self._chance.choice(self.streams)
            head = stream.queue[0] if stream.queue else None
            if head is not None and not (isinstance(head, Event) and head.stream.done < head.place):
                self._run(stream)

    def _run(self, stream: Stream) -> None:
        work = stream.queue.popleft()
        if not isinstance(work, Event):
            with torch.no_grad():
                work()
        stream.done += 1

    def new(self, inner: Tensor) -> "Simulated":
        """Memory that nobody has written to yet."""
        with self._lock:
            self.allocated += inner.nbytes
            self.peak = max(self.peak, self.allocated)
        return Simulated(_spoilt(inner), Block(self, inner))

    def freed(self, inner: Tensor, stream: Stream) -> None:
        with self._lock:
            self.allocated -= inner.nbytes
            stream.queue.append(lambda: _spoilt(inner))
            stream.given += 1

    def is_pinned(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(at <= start and start + tensor.nbytes <= at + size for at, size in self.pinned.items())


def _spoilt(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()


class Simulated(Tensor):
    """A tensor of the device."""

    inner: Tensor
    block: Block
    gpu: Gpu  # the one of the running test

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block) -> "Simulated":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor, block: Block):
        self.inner, self.block = inner, block

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(cls.gpu, func, args, kwargs or {})

    # What torch's C++ would answer of the CPU

    @property
    def device(self) -> torch.device:
        return CUDA

    is_cuda, is_cpu = True, False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "Simulated") -> None:
        assert self.shape == other.shape
        self.inner, self.block = other.inner, other.block

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        copy = options.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*arguments, **options)  # type: ignore[attr-defined]
        if device is not None and device.type == "cpu":
            return aten._to_copy.default(self.detach(), dtype=dtype, device=device, non_blocking=non_blocking)
        return super().to(dtype or self.dtype, copy=copy)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Simulated({self.inner!r})"


def dispatch(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Any:
    """What an op on the device does when it is called; all else is queued."""
    if func is aten._to_copy.default:
        return _copied(gpu, *args, **kwargs)
    if func is aten.copy_.default:
        return _copy(gpu, *args, **kwargs)
    if "device" in kwargs:
        assert kwargs["device"] is None or kwargs["device"].type == "cuda", f"{func} makes a tensor of the host"
        kwargs = {**kwargs, "device": None, "pin_memory": None} if "pin_memory" in kwargs else {**kwargs, "device": None}
    # A number of the host is read when the kernel is launched.
    inner_args, inner_kwargs = tree_map_only(Tensor, _inner, (args, kwargs))
    call = _seeded(gpu, func, lambda: func(*inner_args, **inner_kwargs))
    returns, given = func._schema.returns, (*args, *kwargs.values())
    written = [one for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    if func in ALIASES or (not written and any(one.alias_info is not None for one in returns)):
        blocks = [x.block for x in tree_flatten(given)[0] if isinstance(x, Simulated)]
        return tree_map_only(Tensor, lambda view: Simulated(view, blocks[0]), call())
    if any(tag in func.tags for tag in ASKS):
        gpu.current.synchronize()
        return tree_map_only(Tensor, lambda tensor: _ready(gpu, tensor), call())
    gpu.launched += 1
    if written and all(one.alias_info is not None for one in returns):
        gpu.give(call)
        named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        same = tuple(named[one.name] for one in written)
        return None if not returns else same[0] if len(returns) == 1 else same
    assert not written, f"{func} changes some tensors and makes others"
    trial = list(inner_args)
    for place in QUIET.get(func, ()):
        trial[place] = trial[place].clone() if trial[place] is not None else None
    # Tried at once, whatever numbers are there, for the shapes of what comes out.
    outs = tree_map_only(Tensor, gpu.new, _seeded(gpu, func, lambda: func(*trial, **inner_kwargs))())
    places = [out.inner for out in tree_flatten(outs)[0] if isinstance(out, Simulated)]

    def run() -> None:
        for place, value in zip(places, (x for x in tree_flatten(call())[0] if isinstance(x, Tensor)), strict=True):
            place.copy_(value)

    gpu.give(run)
    return outs


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, Simulated) else tensor.detach().clone()


def _ready(gpu: Gpu, value: Tensor) -> Simulated:
    new = gpu.new(torch.empty_like(value))
    new.inner.copy_(value)
    return new


def _seeded(gpu: Gpu, func: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """An op's random numbers are decided when it is called, as a GPU's are."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return call
    state = gpu.generator.get_state()
    torch.rand(1, generator=gpu.generator)

    def seeded() -> Any:
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(state)
        try:
            return call()
        finally:
            torch.default_generator.set_state(before)

    return seeded


def _copied(gpu: Gpu, source: Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any):
    """Another type, another device, or both."""
    here = isinstance(source, Simulated)
    like = torch.empty_like(source.inner if here else source, dtype=dtype or source.dtype)
    if device is not None and device.type == "cpu":
        target: Tensor = _spoilt(like)
        gpu.pinned[target.data_ptr()] = target.nbytes if non_blocking else 0  # torch takes pinned memory for it
        _copy(gpu, target, source, non_blocking)
        del gpu.pinned[target.data_ptr()]
        return target
    return _copy(gpu, gpu.new(like), source, non_blocking)


def _copy(gpu: Gpu, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    gpu.launched += 1
    to_device, from_device = isinstance(target, Simulated), isinstance(source, Simulated)
    there, here = (x.inner if isinstance(x, Simulated) else x.detach() for x in (target, source))
    host = None if to_device and from_device else here if to_device else there
    alone = host is None or (non_blocking and gpu.is_pinned(host))
    if to_device and not alone:
        here = here.clone()  # the driver has taken it when the call returns
    gpu.give(lambda: there.copy_(here))
    if not alone and not (to_device and non_blocking):
        gpu.current.synchronize()
    return target


class Mode(TorchDispatchMode):
    """For ops that no tensor of the device takes part in: what makes one."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if Simulated in types or (device is not None and device.type == "cuda"):
            return dispatch(self._gpu, func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch, seed: int = 0, haste: float = 0.3) -> Iterator[Gpu]:
    """Context: there is a GPU, which is `CUDA`."""
    gpu = Gpu(seed, haste)
    Simulated.gpu = gpu
    memory = {"memory_allocated": lambda *_: gpu.allocated, "max_memory_allocated": lambda *_: gpu.peak}
    fakes: dict[str, Any] = {
        **memory,
        "Stream": lambda *_, **__: gpu.new_stream(),
        "Event": lambda **options: Event(gpu, **options),
        "current_stream": lambda *_: gpu.current,
        "default_stream": lambda *_: gpu.default,
        "stream": gpu.on,
        "synchronize": gpu.synchronize,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
        "manual_seed_all": gpu.generator.manual_seed,
        "get_rng_state": lambda *_: gpu.generator.get_state(),
        "set_rng_state": lambda state, *_: gpu.generator.set_state(state),
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda at, size, _: gpu.pinned.update({at: size}) or 0,
            cudaHostUnregister=lambda at: gpu.pinned.pop(at),
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # A module that is moved gets new parameters: the old ones cannot become tensors of another class.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    run = threading.Thread.run

    def with_mode(thread: threading.Thread) -> None:
        with Mode(gpu):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", with_mode)
    with Mode(gpu):
        yield gpu
        gpu.synchronize()
