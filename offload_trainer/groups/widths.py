"""Attributes that store a width, by module type: which axis of which tensor each of them follows.

An attribute scales as its axis does: when a plan keeps 4 of 8 heads, `num_heads` goes from 8 to 4. A type without a
rule whose forward needs one is found out when the groups are (`find_groups` traces a sliced copy) and named.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Groups, Plan
from offload_trainer.groups.running import ModuleError

Rule = tuple[str, int]
"""(tensor name inside the module, axis)."""

WIDTHS: dict[type, dict[str, Rule]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_groups": ("weight", 0), "num_channels": ("weight", 0)},
    nn.LayerNorm: {"normalized_shape": ("weight", -1)},
    nn.RMSNorm: {"normalized_shape": ("weight", -1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}
"""Convolutions and single-group norms need a second look: `_layer_rules`. Models add their own types with
`find_groups(…, widths={Attention: {"num_heads": ("qkv.weight", 0)}})`."""

_REPEATS = "num_key_value_groups"
"""Query heads of one key/value head: constant, unless that one serves all (multi-query attention)."""

_HEADS: tuple[Rule, ...] = tuple((f"{name}.weight", 0) for name in ("q_proj", "query", "query_proj", "q", "q_lin"))
_HEADS += (("dense.weight", 1), ("o_proj.weight", 1), ("out_proj.weight", 1))
_KEYS: tuple[Rule, ...] = (("k_proj.weight", 0), ("key.weight", 0), ("o_proj.weight", 1))
_FUSED: tuple[Rule, ...] = (("c_attn.weight", 1),)  # transformers' Conv1D keeps its weight as (in, out)
_CHANNELS: tuple[Rule, ...] = (("out_proj.weight", 1),)

TRANSFORMERS: dict[str, dict[str, tuple[Rule, ...]]] = {
    "Conv1D": {"nf": (("weight", 1),), "nx": (("weight", 0),)},
    "*Attention": {
        **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "embed_dim"), _HEADS),
        **dict.fromkeys(("all_head_size", "inner_dim"), _HEADS),
        "num_key_value_heads": _KEYS,
        _REPEATS: (("q_proj.weight", 0),),
        "kv_lora_rank": (("kv_b_proj.weight", 1),),
    },
    **dict.fromkeys(
        ("*GPT2Attention", "ImageGPTAttention"), dict.fromkeys(("num_heads", "split_size", "embed_dim"), _FUSED)
    ),
    "GPTBigCodeAttention": dict.fromkeys(("num_heads", "embed_dim", _REPEATS), (("c_proj.weight", 1),)),
    "Attention": dict.fromkeys(("n_head", "split_size"), _FUSED),  # the first GPT
    "Phi3Attention": {"config.num_attention_heads": _HEADS},
    "*Router": {
        "hidden_dim": (("weight", 1),),
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_group", "n_group"), (("weight", 0),)),
    },
    "*Experts": {"num_experts": (("down_proj", 0),)},
    "*MoeBlock": {"hidden_dim": (("gate.weight", 1),)},
    "*MoE": {"input_size": (("router.layer.weight", 1), ("router.weight", 1))},
    "*Moe": {"hidden_dim": (("router.weight", 1),)},
    "Llama4TextExperts": {"hidden_size": (("gate_up_proj", 1),)},
    "*GatedDeltaNet": dict.fromkeys(("num_k_heads", "num_v_heads", "key_dim", "value_dim"), (("A_log", 0),)),
    "*MambaMixer": {
        "intermediate_size": _CHANNELS,
        "time_step_rank": (("dt_proj.weight", 1),),
        "ssm_state_size": (("A_log", 1),),
    },
}
"""Class names in transformers → attributes, each with the tensors it may follow: the first that the module has."""


_PARAMETRIZED = re.compile(r"(.*\.|)parametrizations\.(\w+)\.original\d*")


def fit_widths(module: nn.Module, plan: Plan, groups: Groups) -> None:
    """Rescale, in place, every attribute that stores a width of an axis the plan slices.

    Raises `UserError` for a rule that names what a module does not have, or a width that comes out fractional.
    """
    canonical = _canonical_names(module)

    def change(path: str, rule: Rule) -> tuple[int, int]:
        """Size of the axis that the rule names, before and after."""
        full = canonical.get(f"{path}.{rule[0]}" if path else rule[0])
        if full is None:
            return 1, 1  # an affine-free norm
        return groups.shapes[full][rule[1]], plan.shape(full)[rule[1]]

    for path, child in module.named_modules():
        for attribute, rule in _rules_for(child, groups):
            value = attrgetter(attribute)(child)
            if attribute == "normalized_shape":  # a size for each axis of the weight
                sizes = [change(path, (rule[0], axis)) for axis in range(len(value))]
                value = tuple(_scaled(size, *pair) for size, pair in zip(value, sizes, strict=True))
                _set(child, attribute, value)
                continue
            before, after = change(path, rule)
            if attribute == _REPEATS and rule == ("q_proj.weight", 0):
                keys_before, keys_after = change(path, ("k_proj.weight", 0))
                before, after = before * keys_after, after * keys_before
            if before != after:
                fitted = _scaled(value, before, after)
                if fitted is None:
                    where = f"{path}.{attribute}".lstrip(".")
                    why = f"does not scale to a whole number when its axis goes from {before} to {after}"
                    raise ModuleError(f"{where} ({value}) {why}")
                _set(child, attribute, fitted)


def _canonical_names(module: nn.Module) -> dict[str, str]:
    """Every name of every tensor → the one its groups know it by: that of the first tied to it; of a weight that a
    parametrization computes, the largest of what it is computed from."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    largest: dict[str, Tensor] = {}
    both = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in both:
        names[name] = first.setdefault(id(tensor), name)
        found = _PARAMETRIZED.fullmatch(name)
        computed = found and f"{found[1]}{found[2]}"
        if computed and (computed not in largest or tensor.numel() > largest[computed].numel()):
            largest[computed], names[computed] = tensor, names[name]
    return names


def _rules_for(module: nn.Module, groups: Groups) -> Iterator[tuple[str, Rule]]:
    """The user's rules for the module's type, then those of the nearest known base for what they leave open."""
    kinds = type(module).__mro__
    given = {a: rule for kind in reversed(kinds) for a, rule in groups.widths.get(kind, {}).items()}
    for attribute, (tensor, axis) in given.items():
        for name in (attribute, tensor):
            if not _has(module, name):
                raise UserError(f"widths: {type(module).__name__} has no {name!r}, which the rule {attribute!r} names")
        yield attribute, (tensor, axis)
    for attribute, rule in (_layer_rules(module) or dict(_transformers_rules(module))).items():
        if attribute not in given:
            yield attribute, rule


def _layer_rules(module: nn.Module) -> Mapping[str, Rule]:
    if isinstance(module, nn.modules.conv._ConvNd):
        into, out = (0, 1) if module.transposed else (1, 0)
        if module.groups == 1:
            return {"in_channels": ("weight", into), "out_channels": ("weight", out)}
        # Whole convolution groups are units: everything scales with their number, which axis 0 holds.
        return dict.fromkeys(("in_channels", "out_channels", "groups"), ("weight", 0))
    if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
        return {"num_channels": ("weight", 0)}  # one group of however many channels
    return next((WIDTHS[kind] for kind in type(module).__mro__ if kind in WIDTHS), {})


def _transformers_rules(module: nn.Module) -> Iterator[tuple[str, Rule]]:
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return
    for pattern, attributes in TRANSFORMERS.items():
        if fnmatchcase(kind.__name__, pattern):
            for attribute, rules in attributes.items():
                value = attrgetter(attribute)(module) if _has(module, attribute) else None
                if type(value) is int and value > 1:  # a single head is no axis
                    yield from [(attribute, rule) for rule in rules if _has(module, rule[0])][:1]


def _has(module: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _set(module: nn.Module, attribute: str, value: Any) -> None:
    owner, _, name = attribute.rpartition(".")
    if owner:  # an object that other modules share, as transformers' config: this module gets a copy of its own
        private = copy.copy(getattr(module, owner))
        setattr(private, name, value)
        value, name = private, owner
    setattr(module, name, value)


def _scaled(value: Any, before: int, after: int) -> Any | None:
    """`value` × after / before, or None if that is no whole number; of a tuple the last entry."""
    if isinstance(value, tuple | list):
        last = _scaled(value[-1], before, after)
        return None if last is None else (*value[:-1], last)
    scaled, rest = divmod(value * after, before)
    return None if rest else scaled
