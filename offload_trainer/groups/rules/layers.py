"""Ops of layers: matrix products, convolutions, norms, attention, pooling."""

from torch import Tensor

from offload_trainer.groups import axes as ax
from offload_trainer.groups.rules.call import Call, pin_all, rule


@rule("mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "baddbmm", "matmul", "linear")
def matmul(call: Call) -> None:
    """(…, m, k) @ (…, k, n): the k of both are one axis, and so are batch axes; a bias shares the output's axes."""
    factors = [call[n] for n in ("mat1", "mat2", "batch1", "batch2", "mat", "vec") if isinstance(call[n], Tensor)]
    if len(factors) < 2:
        factors = [
            call[n]
            for n in ("self", "input", "mat2", "other", "tensor", "vec", "weight")
            if isinstance(call[n], Tensor)
        ]
    left, right = (list(call.axes_of(t)) for t in factors[:2])
    if call.name == "aten::linear":
        right = right[::-1]
    row = right[-2] if len(right) > 1 else right[-1]
    ax.unify(left[-1], row)
    columns = right[-1:] if len(right) > 1 else []
    for mine, theirs in zip(left[:-2][::-1], right[:-2][::-1], strict=False):
        if ax.size_of(mine) == ax.size_of(theirs):
            ax.unify(mine, theirs)
    result = left[:-1] + columns
    bias = call["bias"] if call.name == "aten::linear" else call["self"] if "add" in call.name else None
    if isinstance(bias, Tensor):
        for mine, theirs in zip(result[::-1], call.axes_of(bias)[::-1], strict=False):
            if ax.size_of(mine) == ax.size_of(theirs):
                ax.unify(mine, theirs)
    call.assign(call.outputs()[0], result)


@rule("_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> None:
    """(…, m, k) against (…, n, k): the k of both are one axis; a dropped one is zero in both and adds nothing."""
    left, right = (call.axes_of(call[name]) for name in ("x1", "x2"))
    ax.unify(left[-1], right[-1])
    for mine, theirs in zip(left[:-2][::-1], right[:-2][::-1], strict=False):
        if ax.size_of(mine) == ax.size_of(theirs):
            ax.unify(mine, theirs)
    call.keep([*left[:-1], right[-2]], "batch axes of distances")


@rule("linalg_matrix_exp", "linalg_solve_triangular", "linalg_inv_ex", "linalg_cholesky_ex", "_linalg_solve_ex")
def matrices(call: Call) -> None:
    """Each matrix of a batch by itself: batch axes line up, rows and columns stay whole."""
    first, *others = (call.axes_of(t) for t in call.tensors())
    for axes in (first, *others):
        for axis in axes[-2:]:
            ax.pin(axis, "an axis of a matrix that is solved for")
        for mine, theirs in zip(first[:-2][::-1], axes[:-2][::-1], strict=False):
            if ax.size_of(mine) == ax.size_of(theirs):
                ax.unify(mine, theirs)
    call.keep(first[:-2], "an axis of a matrix that is solved for")


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: Call) -> None:
    weight, bias, groups = call["weight"], call["bias"], call["groups"]
    inputs, weights = call.axes_of(call.input), call.axes_of(weight)
    batched = call.input.ndim == weight.ndim
    channels = inputs[1 if batched else 0]
    transposed = bool(call["transposed"])
    into, out_of = (weights[0], weights[1]) if transposed else (weights[1], weights[0])
    if groups == 1:
        ax.unify(channels, into)
        produced = out_of
    else:
        # A unit is a whole convolution group: channels in = (group, in per group), out = (group, out per group).
        whole = weights[0]
        halves = ax.split(whole, (groups, weight.shape[0] // groups))
        if halves is None:
            return pin_all(call, "a grouped convolution that cuts a unit")
        group, rest = halves
        other = weights[1]
        ax.pin(rest, "inside a convolution group")
        ax.pin(other, "inside a convolution group")
        ax.unify(channels, group + (rest if transposed else other))
        produced = group + (other if transposed else rest)
    if isinstance(bias, Tensor):
        ax.unify(produced, call.axes_of(bias)[0])
    lead = [inputs[0], produced] if batched else [produced]
    out = call.outputs()[0]
    for axis in inputs[len(lead) :] + weights[2:]:
        ax.pin(axis, "a spatial axis")
    call.assign(out, lead + [ax.fresh(n, "a spatial axis") for n in out.shape[len(lead) :]])


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
)
@rule("_native_batch_norm_legit_functional", "batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")
@rule("miopen_batch_norm", "native_batch_norm_legit", "instance_norm")
def batch_norm(call: Call) -> None:
    axes = call.axes_of(call.input)
    channels = axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call[name], Tensor):
            ax.unify(channels, call.axes_of(call[name])[0])
    out, *statistics = call.outputs()
    call.assign(out, axes)
    for other in statistics:
        call.assign(other, [channels if n == ax.size_of(channels) else ax.fresh(n, "statistics") for n in other.shape])


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> None:
    axes = call.axes_of(call.input)
    count = len(call["normalized_shape"])
    if not isinstance(call["weight"], Tensor):
        for axis in axes[-count:]:
            ax.pin(axis, "its size is given to a norm without weights")
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            for mine, theirs in zip(axes[-count:], call.axes_of(call[name]), strict=True):
                ax.unify(mine, theirs)
    out, *statistics = call.outputs()
    call.assign(out, axes)
    for other in statistics:
        call.assign(other, axes[:-count] + [[] for _ in range(other.ndim - len(axes) + count)])


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> None:
    """A unit is a whole norm group, or a channel where there is one norm group only."""
    axes = call.axes_of(call.input)
    groups = call["group"] if call["group"] is not None else call["num_groups"]
    channels = ax.size_of(axes[1])
    halves = ax.split(axes[1], (groups, channels // groups))
    if halves is None:
        return pin_all(call, "a group norm that cuts a unit")
    if groups > 1:
        ax.pin(halves[1], "inside a norm group")
        if not isinstance(call["weight"], Tensor):
            ax.pin(halves[0], "their number is given to a norm without weights")
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            ax.unify(axes[1], call.axes_of(call[name])[0])
    out, *statistics = call.outputs()
    call.assign(out, axes)
    for other in statistics:
        call.assign(other, [ax.fresh(n, "statistics") for n in other.shape])


def _attention(call: Call) -> None:
    """softmax(q kᵀ) v. Heads are one axis (GQA: a key/value head and its queries); features of q and k stay whole."""
    q, k, v = (call.axes_of(call[n]) for n in ("query", "key", "value"))
    ax.unify(k[0], q[0])
    ax.unify(v[0], q[0])
    ax.unify(k[1], v[1])
    heads, shared = ax.size_of(q[1]), ax.size_of(k[1])
    ax.unify(q[1], k[1] + ax.fresh(heads // shared, "query heads of one key/value head"))
    ax.unify(k[2], v[2])
    for axis in (q[3], k[3], q[2], k[2]):
        ax.pin(axis, "the scale or the softmax of attention depends on it")
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    if isinstance(mask, Tensor):
        full = [q[0], q[1], q[2], k[2]]
        for mine, theirs in zip(call.axes_of(mask)[::-1], full[::-1], strict=False):
            if ax.size_of(mine) == ax.size_of(theirs):
                ax.unify(mine, theirs)
    out, *rest = call.outputs()
    call.assign(out, [*q[:3], v[3]])
    for other in rest:
        known = [*q[:3]] if other.ndim == 3 and other.shape == out.shape[:3] else None
        call.assign(other, known or [ax.fresh(n, "attention's own") for n in other.shape])


rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
)(_attention)


_LOSSES = ("nll_loss", "nll_loss2d", "multi_margin_loss", "multilabel_margin_loss")


@rule(*(f"{name}{tail}" for name in _LOSSES for tail in ("", "_forward")))
@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "kl_div", "poisson_nll_loss")
@rule("binary_cross_entropy", "binary_cross_entropy_with_logits", "_ctc_loss", "_cudnn_ctc_loss")
def loss(call: Call) -> None:
    """What a model compares with its labels is as good as an output."""
    pin_all(call, "an input of a loss")


@rule("embedding_renorm_")
def renorm(call: Call) -> None:
    """`max_norm` changes the rows that are looked up, by the norm of all their features."""
    pin_all(call, "an embedding with max_norm")


@rule("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule(
    "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"
)
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d")
@rule("upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "grid_sampler_2d")
def spatial(call: Call) -> None:
    name = call.name.rstrip("_")
    count = next((int(d) for d in "123" if f"{d}d" in name), 2)
    axes = call.axes_of(call.input)
    for axis in axes[-count:]:
        ax.pin(axis, "a spatial axis")
    for out in call.outputs():
        call.assign(out, axes[:-count] + [ax.fresh(n, "a spatial axis") for n in out.shape[-count:]])
