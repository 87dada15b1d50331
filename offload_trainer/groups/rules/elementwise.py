"""Ops that keep positions: pointwise, reductions, and those that run along an axis."""

from torch import Tensor

from offload_trainer.groups import axes as ax
from offload_trainer.groups.axes import Axis
from offload_trainer.groups.rules.call import Call, rule

ORDERED = ("kthvalue", "median", "nanmedian", "mode")
POSITIONS = {f"aten::{name}" for name in ("max", "min", "argmax", "argmin", "topk")}
"""Ops whose last output, where they are given a dimension, holds positions along it."""


@rule("_prelu_kernel", "rrelu_with_noise", "dequantize", "polar", "_weight_norm_interface", "hardswish", "hardswish_")
@rule(
    "complex",
    "log_sigmoid_forward",
    "special_erf",
    "floor_divide",
    "copy_",
    "fake_quantize_per_tensor_affine_cachemask",
)
def pointwise(call: Call) -> None:
    """Broadcasting: axes aligned from the last become one; an axis of size 1 takes no part."""
    tensors = [t for t in call.tensors() if t.ndim > 0]
    ndim = max((t.ndim for t in tensors), default=0)
    result: list[Axis] = [[] for _ in range(ndim)]
    for tensor in tensors:
        for i, axis in enumerate(call.axes_of(tensor), start=ndim - tensor.ndim):
            if ax.size_of(axis) == 1:
                continue
            if ax.size_of(result[i]) == 1:
                result[i] = axis
            else:
                ax.unify(result[i], axis)
    call.keep(result, "broadcast")


@rule("add", "add_")
def add(call: Call) -> None:
    pointwise(call)
    both = [t for t in call.tensors() if t.ndim > 1]
    if len(both) == 2 and both[0].shape == both[1].shape:
        for axis in call.axes_of(call.outputs()[0]):
            ax.mark_residual(axis)


@rule("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "zero_", "fill_", "zeros_like", "ones_like")
@rule("empty_like", "full_like", "native_dropout", "dropout", "bernoulli", "bernoulli_", "resolve_conj", "resolve_neg")
@rule("rand_like", "randn_like", "_conj", "uniform_", "normal_", "exponential_", "random_")
def same_shape(call: Call) -> None:
    call.keep(call.axes_of(call.input), "same shape")


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
@rule("empty_strided", "new_empty_strided")
def filled(call: Call) -> None:
    for out in call.outputs():
        call.assign(out, [call.axes.open(n) for n in out.shape])


@rule("arange", "rand", "randn", "randint", "linspace", "eye", "tril_indices", "triu_indices", "randperm")
def constant(call: Call) -> None:
    for out in call.outputs():
        call.assign(out, [ax.fresh(n, "a constant") for n in out.shape])


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> None:
    """Like a norm: over what is kept."""
    call.keep(call.axes_of(call.input), "same shape")


@rule("topk")
def topk(call: Call) -> None:
    """The best among what is kept, which must be k at least; where they stand is known by `Axes.target`."""
    axes = list(call.axes_of(call.input))
    dim = call["dim"] % max(len(axes), 1)
    values, positions = call.outputs()
    if axes:
        ax.require(axes[dim], call["k"])
        call.axes.point(positions, axes[dim])
        axes[dim] = ax.fresh(call["k"], "topk chose it")
    call.assign(values, axes)
    call.assign(positions, axes)


@rule("cumsum", "cumprod", "logcumsumexp", "flip", "roll", "sort", "argsort", "cummax", "cummin")
def along(call: Call) -> None:
    """Every entry along `dim` depends on the others or on their order: that axis is not sliced."""
    axes = call.axes_of(call.input)
    dims = call["dims"] if call["dims"] is not None else call["dim"]
    for d in call.dims(dims, len(axes)):
        ax.pin(axes[d], f"{call.name} runs along it")
    call.keep(axes, f"{call.name} chose it")


@rule("mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "amin", "norm", "linalg_vector_norm", "logsumexp")
@rule("prod", "any", "all", "max", "min", "argmax", "argmin", "nansum", "count_nonzero", *ORDERED)
def reduce(call: Call) -> None:
    tensor, axes = call.input, call.axes_of(call.input)
    if call.name in ("aten::max", "aten::min") and isinstance(call["other"], Tensor):
        return pointwise(call)
    dims = call.dims(call["dim"], tensor.ndim)
    flattened = call.name.startswith("aten::arg") and call["dim"] is None
    if flattened or call.name.removeprefix("aten::") in ORDERED:
        for d in dims:
            ax.pin(axes[d], f"{call.name} depends on all of it")
    for out in call.outputs():
        keepdim = out.ndim == tensor.ndim
        kept = [[] if i in dims else a for i, a in enumerate(axes) if keepdim or i not in dims]
        call.assign(out, kept)
    if call.name in POSITIONS and call["dim"] is not None and axes:
        call.axes.point(call.outputs()[-1], axes[dims[0]])
