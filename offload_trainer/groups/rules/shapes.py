"""Ops that move entries without changing them: views, cuts, concatenations, indexing, padding."""

import torch
from torch import Tensor

from offload_trainer.groups import axes as ax
from offload_trainer.groups.rules.call import Call, pin_all, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def view(call: Call) -> None:
    axes, out = call.axes_of(call.input), call.outputs()[0]
    whole = [symbol for axis in axes for symbol in axis]
    parts = ax.split(whole, list(out.shape)) if 0 not in out.shape else None
    if parts is None:
        return pin_all(call, "a view that does not keep its blocks together")
    call.assign(out, parts)


@rule("t", "transpose", "permute", "movedim", "swapaxes")
def permute(call: Call) -> None:
    axes = call.axes_of(call.input)
    order = list(range(len(axes)))
    if call["dims"] is not None:
        order = call.dims(call["dims"], len(axes))
    elif len(axes) > 1:
        a, b = (call["dim0"], call["dim1"]) if call["dim0"] is not None else (0, 1)
        order[a], order[b] = order[b], order[a]
    call.assign(call.outputs()[0], [axes[i] for i in order])


@rule("unsqueeze")
def unsqueeze(call: Call) -> None:
    axes = list(call.axes_of(call.input))
    axes.insert(call["dim"] % (len(axes) + 1), [])
    call.assign(call.outputs()[0], axes)


@rule("squeeze")
def squeeze(call: Call) -> None:
    tensor, axes = call.input, call.axes_of(call.input)
    drop = {d for d in call.dims(call["dim"], tensor.ndim) if tensor.shape[d] == 1}
    call.assign(call.outputs()[0], [a for i, a in enumerate(axes) if i not in drop])


@rule("expand")
def expand(call: Call) -> None:
    out, axes = call.outputs()[0], call.axes_of(call.input)
    axes = [[] for _ in range(out.ndim - len(axes))] + axes
    call.assign(out, [a if ax.size_of(a) == n else call.axes.open(n) for a, n in zip(axes, out.shape, strict=True)])


@rule("as_strided_")
def restride(call: Call) -> None:
    """Average pools restride what they have just made, for a memory format; anything else could permute entries."""
    out, axes = call.outputs()[0], call.axes_of(call.input)
    if [ax.size_of(axis) for axis in axes] != list(out.shape) or not out.is_contiguous():
        return pin_all(call, "as_strided")
    call.assign(out, axes)


@rule("repeat")
def repeat(call: Call) -> None:
    axes, repeats = call.axes_of(call.input), call["repeats"]
    axes = [[] for _ in range(len(repeats) - len(axes))] + axes
    call.assign(call.outputs()[0], [call.axes.open(n) + a for a, n in zip(axes, repeats, strict=True)])


def _cut(call: Call, dim: int, sizes: list[int], outputs: list[Tensor]) -> None:
    axes = call.axes_of(call.input)
    axis = axes[dim]
    pieces = None if ax.is_pinned(axis) or 0 in sizes else ax.cut(axis, sizes)
    if pieces is None:
        ax.pin(axis, "cut inside a unit")
        pieces = [ax.fresh(n, "a piece of a pinned axis") for n in sizes]
    for out, piece in zip(outputs, pieces, strict=True):
        call.assign(out, [*axes[:dim], piece, *axes[dim + 1 :]])


@rule("split", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "split_copy")
@rule("split_with_sizes_copy", "chunk", "unsafe_chunk")
def split(call: Call) -> None:
    dim, pieces = call["dim"] % call.input.ndim, call.outputs()
    sizes = [piece.shape[dim] for piece in pieces]
    _cut(call, dim, sizes, pieces)
    if call["split_sizes"] is None and len(set(sizes)) == 1:
        # `chunk(2)` will cut in the middle again, so the pieces must keep equally many: they share one mask.
        first, *others = (call.axes_of(piece)[dim] for piece in pieces)
        for other in others:
            ax.unify(first, other)


@rule("slice")
def slice_(call: Call) -> None:
    tensor, out = call.input, call.outputs()[0]
    dim = call["dim"] % tensor.ndim
    size, length = tensor.shape[dim], out.shape[dim]
    if length == size:
        return call.assign(out, call.axes_of(tensor))
    if call["step"] != 1 or length == 0:
        ax.pin(call.axes_of(tensor)[dim], "a strided slice")
        return call.keep(call.axes_of(tensor), "a strided slice")
    start = call["start"] or 0
    start = max(start + size, 0) if start < 0 else start
    sizes = [start, length, size - start - length]
    kept = [n for n in sizes if n]
    spare = [torch.empty(0) for _ in kept]
    spare[1 if start else 0] = out
    axes = call.axes_of(tensor)
    pieces = None if ax.is_pinned(axes[dim]) else ax.cut(axes[dim], kept)
    if pieces is None:
        ax.pin(axes[dim], "cut inside a unit")
        piece = ax.fresh(length, "a piece of a pinned axis")
    else:
        piece = pieces[1 if start else 0]
    call.assign(out, [*axes[:dim], piece, *axes[dim + 1 :]])


@rule("select", "unbind")
def select(call: Call) -> None:
    axes = call.axes_of(call.input)
    dim = (call["dim"] or 0) % len(axes)
    ax.pin(axes[dim], ax.PICKED_APART)
    for out in call.outputs():
        call.assign(out, axes[:dim] + axes[dim + 1 :])


@rule("cat")
def cat(call: Call) -> None:
    tensors = [t for t in call["tensors"] if t.numel() > 0 or t.ndim > 1]
    dim = call["dim"] % tensors[0].ndim
    every = [call.axes_of(t) for t in tensors]
    for others in every[1:]:
        for i, (mine, theirs) in enumerate(zip(every[0], others, strict=True)):
            if i != dim:
                ax.unify(mine, theirs)
    joined = ax.concat([axes[dim] for axes in every])
    call.assign(call.outputs()[0], [*every[0][:dim], joined, *every[0][dim + 1 :]])


@rule("stack")
def stack(call: Call) -> None:
    every = [call.axes_of(t) for t in call["tensors"]]
    for others in every[1:]:
        for mine, theirs in zip(every[0], others, strict=True):
            ax.unify(mine, theirs)
    dim = call["dim"] % (len(every[0]) + 1)
    call.assign(call.outputs()[0], [*every[0][:dim], ax.fresh(len(every), ax.PICKED_APART), *every[0][dim:]])


@rule("embedding")
def embedding(call: Call) -> None:
    rows, features = call.axes_of(call["weight"])
    call.address(rows, call["indices"], "rows of an embedding")
    call.assign(call.outputs()[0], [*call.axes_of(call["indices"]), features])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> None:
    rows, features = call.axes_of(call["weight"])
    ax.pin(rows, "rows of an embedding")
    out, *others = call.outputs()
    call.assign(out, [ax.fresh(out.shape[0], "bags"), features])
    for other in others:
        call.assign(other, [ax.fresh(n, "the bags' own") for n in other.shape])


@rule("view_as_complex", "view_as_real")
def complex_pairs(call: Call) -> None:
    """The last axis of the real side is (real, imaginary)."""
    axes, out = call.axes_of(call.input), call.outputs()[0]
    if len(axes) > out.ndim:
        ax.pin(axes[-1], "the parts of complex numbers")
    call.assign(out, [*axes, ax.fresh(2, "the parts of complex numbers")][: out.ndim])


@rule("index", "_unsafe_index")
def index(call: Call) -> None:
    tensor, out = call.input, call.outputs()[0]
    axes, indices = call.axes_of(tensor), call["indices"]
    used = [i for i, t in enumerate(indices) if t is not None]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in used) or used != list(range(used[0], used[-1] + 1)):
        return pin_all(call, "advanced indexing")
    for i in used:
        call.address(axes[i], indices[i], "rows chosen by index")
        for axis in call.axes_of(indices[i]):
            ax.pin(axis, "chosen by index")
    picked = [ax.fresh(n, "chosen by index") for n in torch.broadcast_shapes(*(indices[i].shape for i in used))]
    call.assign(out, axes[: used[0]] + picked + axes[used[-1] + 1 :])


@rule("index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_")
@rule("index_copy", "index_copy_", "scatter_reduce", "scatter_reduce_")
def index_along(call: Call) -> None:
    """Axis `dim` is addressed by number; the others line up with those of the source where the sizes agree."""
    tensor = call.input
    if tensor.ndim == 0:
        return pin_all(call, "chosen by index")
    axes, dim = list(call.axes_of(tensor)), (call["dim"] or 0) % tensor.ndim
    call.address(axes[dim], call["index"], "rows chosen by index")
    for name in ("index", "src", "source"):
        other = call[name]
        if isinstance(other, Tensor) and other.ndim == tensor.ndim:
            for i, (mine, theirs) in enumerate(zip(axes, call.axes_of(other), strict=True)):
                if i == dim:
                    ax.pin(theirs, "chosen by index")
                elif ax.size_of(mine) == ax.size_of(theirs):
                    ax.unify(mine, theirs)
                else:
                    ax.pin([*mine, *theirs], "rows chosen by index")
    if call.name in ("aten::gather", "aten::index_select"):
        axes[dim] = ax.fresh(call.outputs()[0].shape[dim], "chosen by index")
    call.keep(axes, "chosen by index")


@rule("index_put", "index_put_", "_index_put_impl_", "nonzero", "unique", "_unique2", "masked_select", "one_hot")
@rule("bincount", "histc", "searchsorted", "bucketize", "tril", "triu", "_local_scalar_dense", "equal", "im2col")
@rule("unfold", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn", "lstm_cell", "gru_cell")
def opaque(call: Call) -> None:
    pin_all(call, f"{call.name} does not keep units apart")


@rule("constant_pad_nd")
def pad(call: Call) -> None:
    axes, widths = list(call.axes_of(call.input)), call["pad"]
    for i in range(len(widths) // 2):
        if widths[2 * i] or widths[2 * i + 1]:
            ax.pin(axes[-1 - i], "padded")
            axes[-1 - i] = ax.fresh(call.outputs()[0].shape[-1 - i], "padded")
    call.assign(call.outputs()[0], axes)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> None:
    axes, out = call.axes_of(call.input), call.outputs()[0]
    up = call["upscale_factor"]
    if up is not None:
        halves = ax.split(axes[-3], (out.shape[-3], up * up))
        if halves is None:
            return pin_all(call, "a pixel shuffle that cuts a unit")
        ax.pin(halves[1], "the pixels of one channel")
        channels = halves[0]
    else:
        channels = axes[-3] + ax.fresh(call["downscale_factor"] ** 2, "the pixels of one channel")
    call.assign(out, [*axes[:-3], channels, *(ax.fresh(n, "a spatial axis") for n in out.shape[-2:])])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> None:
    """Channels as (groups, channels of one) → (channels of one, groups)."""
    axes = call.axes_of(call.input)
    halves = ax.split(axes[1], (call["groups"], ax.size_of(axes[1]) // call["groups"]))
    if halves is None:
        return pin_all(call, "a channel shuffle that cuts a unit")
    call.assign(call.outputs()[0], [axes[0], halves[1] + halves[0], *axes[2:]])


@rule("glu")
def glu(call: Call) -> None:
    axes = call.axes_of(call.input)
    dim = call["dim"] % len(axes)
    half = ax.size_of(axes[dim]) // 2
    pieces = ax.cut(axes[dim], (half, half))
    if pieces is None:
        return pin_all(call, "a gate that cuts a unit")
    ax.unify(pieces[0], pieces[1])
    call.assign(call.outputs()[0], [*axes[:dim], pieces[0], *axes[dim + 1 :]])
