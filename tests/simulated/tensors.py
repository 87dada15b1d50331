"""Tensors of the device: what is done with them waits in the queues of its streams."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated.gpu import Gpu, Stream, spoilt

CUDA = torch.device("cuda", 0)
aten: Any = torch.ops.aten
ALIASES = (aten._unsafe_view.default, aten.lift_fresh.default)
"""Views whose schema does not say so."""
QUIET = {aten.native_batch_norm.default: (3, 4)}
"""Arguments that an op changes and whose schema does not say so."""
ASKS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Of ops for whose outcome the host waits."""
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
"""Ops whose indices may be the host's, which are sent first, or masks, whose places are counted first."""


class Block:
    """Memory of the device, as long as a tensor on the host knows of it."""

    def __init__(self, gpu: "Gpu", inner: Tensor):
        gpu.taken(inner.nbytes)
        self.streams: set[Stream] = set()
        """That were given work with it."""
        weakref.finalize(self, gpu.freed, inner, gpu.current, self.streams).atexit = False


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
    if func is aten._foreach_copy_.default and not all(isinstance(x, Simulated) for x in (*args[0], *args[1])):
        for target, source in zip(*args[:2], strict=True):
            _copy(gpu, target, source, *args[2:], **kwargs)
        return None
    if "device" in kwargs:
        assert kwargs["device"] is None or kwargs["device"].type == "cuda", f"{func} makes a tensor of the host"
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        _require_here(gpu, func, args, kwargs)
    # A number of the host is read when the kernel is launched.
    inner_args, inner_kwargs = _changed(_inner, (args, kwargs))
    call = _seeded(gpu, func, lambda **more: func(*inner_args, **{**inner_kwargs, **more}))
    returns, given = func._schema.returns, (*args, *kwargs.values())
    written = [one for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    if func in ALIASES or (not written and any(one.alias_info is not None for one in returns)):
        blocks = [x.block for x in _tensors(given) if isinstance(x, Simulated)]
        return _changed(lambda view: Simulated(view, blocks[0]), call())
    if any(tag in func.tags for tag in ASKS):
        gpu.current.synchronize()
        return _changed(lambda tensor: _ready(gpu, tensor), call())
    for tensor in _tensors(given):
        if isinstance(tensor, Simulated):
            tensor.block.streams.add(gpu.current)
    gpu.launched += not func.__name__.startswith("empty")
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
    outs = _changed(lambda inner: _new(gpu, inner), func(*trial, **inner_kwargs))
    places = [out.inner for out in _tensors(outs) if isinstance(out, Simulated)]

    def run() -> None:
        for place, value in zip(places, _tensors(call()), strict=True):
            place.copy_(value)

    gpu.give(run)
    return outs


def _require_here(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> None:
    """An op on the device takes tensors of the device, numbers, and indices of the host, which it waits for."""
    tensors = list(_tensors((args, kwargs)))
    if func in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, Simulated) or index.dtype == torch.bool for index in indices):
            gpu.current.synchronize()
        tensors = [x for x in tensors if all(x is not index for index in indices)]
    strangers = [x for x in tensors if x.ndim and not isinstance(x, Simulated) and not _is_mask(x)]
    if strangers:
        raise RuntimeError(f"{func} takes {[tuple(x.shape) for x in strangers]} of the host")


def _is_mask(tensor: Tensor) -> bool:
    """That attention in C++ makes for itself, where it believes these tensors to be."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """In arguments of an op, or in what it returns. Faster than pytrees, which do it for everything."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _changed(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(change, one) for key, one in value.items()}
    return type(value)(_changed(change, one) for one in value) if isinstance(value, list | tuple) else value


def _new(gpu: Gpu, inner: Tensor) -> Simulated:
    """Memory that nobody has written to yet."""
    return Simulated(spoilt(inner), Block(gpu, inner))


def _inner(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, Simulated) else tensor.detach().clone()


def _ready(gpu: Gpu, value: Tensor) -> Simulated:
    new = _new(gpu, torch.empty_like(value))
    new.inner.copy_(value)
    return new


def _seeded(gpu: Gpu, func: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """An op's random numbers are decided when it is called, as a GPU's are."""
    if all(one.name != "generator" for one in func._schema.arguments):
        return call
    state = gpu.generator.get_state()
    torch.rand(1, generator=gpu.generator)
    return lambda: call(generator=torch.Generator().set_state(state))


def _copied(gpu: Gpu, source: Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any):
    """Another type, another device, or both."""
    here = isinstance(source, Simulated)
    like = torch.empty_like(source.inner if here else source, dtype=dtype or source.dtype)
    if device is not None and device.type == "cpu":
        target: Tensor = spoilt(like)
        gpu.pinned[target.data_ptr()] = target.nbytes if non_blocking else 0  # torch takes pinned memory for it
        _copy(gpu, target, source, non_blocking)
        del gpu.pinned[target.data_ptr()]
        return target
    return _copy(gpu, _new(gpu, like), source, non_blocking)


def _copy(gpu: Gpu, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    gpu.launched += 1
    to_device, from_device = isinstance(target, Simulated), isinstance(source, Simulated)
    for tensor in (target, source):
        if isinstance(tensor, Simulated):
            tensor.block.streams.add(gpu.current)
    there, here = (x.inner if isinstance(x, Simulated) else x.detach() for x in (target, source))
    host = None if to_device and from_device else here if to_device else there
    alone = host is None or (non_blocking and gpu.is_pinned(host))
    if to_device and not alone:
        here = here.clone()  # the driver has taken it when the call returns
    gpu.give(lambda: there.copy_(here))
    if not alone:  # pageable memory goes through a buffer of the driver's, for which it may wait
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
        if func is aten._pin_memory.default or func is aten.pin_memory.default:
            pinned = args[0].clone()
            self._gpu.pinned[pinned.data_ptr()] = pinned.nbytes
            weakref.finalize(pinned, self._gpu.pinned.pop, pinned.data_ptr()).atexit = False
            return pinned
        if Simulated in types or (device is not None and device.type == "cuda"):
            return dispatch(self._gpu, func, args, kwargs)
        return func(*args, **kwargs)
