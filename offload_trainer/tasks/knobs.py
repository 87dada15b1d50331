"""The integers of a Hugging Face config that make a model have given shapes.

No table says which key of a config is which width; the model at hand says it. Models of slightly different configs are
built on the meta device, which takes milliseconds, and their shapes show what each integer of the config does to each
axis. With the size of a head held, axes are linear functions of these integers (nearly so where one multiplies
another), so the wanted shapes are a linear system.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

Key = tuple[str | int, ...]
"""Attributes, and perhaps an index at the end, that lead from a config to one of its integers."""
Knob = tuple[Key, ...]
"""Integers that change together, in proportion: one turn adds to each its value over the gcd of all."""
Shapes = dict[str, torch.Size]

_NO_WIDTHS = ("_token_id", "_token_ids", "head_dim")
"""Ends of keys that are left alone: tokens, and the size of a head, since heads are sliced whole."""
_STEPS = 4
"""Newton's method solves a linear system in one step; more are for products of two integers."""


class NoConfigError(Exception):
    """No config builds the module; the message says why."""


def fit_shapes(kind: type, config: Any, wanted: Shapes) -> None:
    """Change the config's integers, in place, until a model of it has the wanted shapes.

    kind: the `PreTrainedModel` class. Raises NoConfigError if no integers give them.
    """
    heads_have_a_size = _hold_head_size(kind, config)
    _make_explicit(kind, config)
    smallest = float("inf")
    for _ in range(_STEPS):
        shapes = model_shapes(kind, config)
        if shapes is None or shapes.keys() != wanted.keys():
            break
        gap = _axes(wanted) - _axes(shapes)
        if not gap.any():
            return
        effects = _effects(kind, config, shapes, _knobs(config, heads_have_a_size))
        if gap.abs().sum() >= smallest or not effects:
            break
        smallest = float(gap.abs().sum())
        turned = [_turned(config, knob, turns) for knob, turns in _turns(effects, gap).items()]
        for values in turned:
            _set(config, values)
    rule = "layers must not differ, which takes structure.budget per_group"
    if not heads_have_a_size:
        rule += ", and heads be left out in proportion to the residual stream, which is divided among them"
    raise NoConfigError(f"no {type(config).__name__} expresses these widths ({rule})")


def _turns(effects: Mapping[Knob, Tensor], gap: Tensor) -> dict[Knob, int]:
    """How far to turn each knob so that effects · turns = gap, all of shape (axes,), float64; of like knobs the first.

    Where no whole numbers solve it, near ones are returned.
    """
    equations = torch.stack([*effects.values(), gap], dim=1).unique(dim=0)  # every layer says the same
    chosen: list[int] = []
    for column in range(len(effects)):
        if torch.linalg.matrix_rank(equations[:, [*chosen, column]]) > len(chosen):
            chosen.append(column)
    solution = torch.linalg.lstsq(equations[:, chosen], equations[:, -1:], driver="gelsd").solution
    knobs = list(effects)
    return {knobs[column]: round(turns) for column, turns in zip(chosen, solution[:, 0].tolist(), strict=True)}


def _effects(kind: type, config: Any, shapes: Shapes, knobs: list[Knob]) -> dict[Knob, Tensor]:
    """What one turn of each knob adds to every axis, (axes,) float64, for those that change any.

    Integers of one value that cannot be turned alone are tried together (OPT's hidden_size and word_embed_proj_dim).
    """
    found: dict[Knob, Tensor] = {}
    stuck: dict[int, Knob] = {}
    for knob in knobs:
        effect = _effect(kind, config, shapes, knob)
        if effect is None:
            value = _get(config, knob[0])
            stuck[value] = (*stuck.get(value, ()), *knob)
        elif effect.any():
            found[knob] = effect
    for knob in stuck.values():
        effect = _effect(kind, config, shapes, knob) if len(knob) > 1 and knob not in knobs else None
        if effect is not None and effect.any():
            found[knob] = effect
    return found


def _effect(kind: type, config: Any, shapes: Shapes, knob: Knob) -> Tensor | None:
    """(axes,) float64; None if no other values are accepted, or they change which tensors there are."""
    whole = gcd(*(_get(config, key) for key in knob))
    for turns in (whole, 2 * whole, -(whole // 2), 1):  # multiples, since widths must often divide one another
        other = model_shapes(kind, config, _turned(config, knob, turns)) if turns else None
        if other is not None and other.keys() == shapes.keys():
            return (_axes(other) - _axes(shapes)) / turns
    return None


def _knobs(config: Any, heads_have_a_size: bool) -> list[Knob]:
    """Every integer of the config; hidden_size and num_attention_heads as one where their ratio is a head's size."""
    keys = [key for key, value in _entries(config) if type(value) is int and value > 0]
    pair = tuple(_standard(config, name) for name in ("hidden_size", "num_attention_heads"))
    if heads_have_a_size or not set(pair) <= set(keys):
        return [(key,) for key in keys]
    return [pair, *((key,) for key in keys if key not in pair)]


def _hold_head_size(kind: type, config: Any) -> bool:
    """Write the size of a head into the config if models of it read that; returns whether heads have a size at all.

    They have where more heads make axes longer and none shorter; else hidden_size is divided among the heads.
    """
    hidden, heads, size = (_standard(config, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    owner = _get(config, size[:-1])
    before = dict(vars(owner))
    if type(before.get(hidden[-1])) is not int or type(before.get(heads[-1])) is not int:
        return True
    try:
        known = getattr(owner, str(size[-1]), None)
    except Exception:  # Gemma 4: heads of several sizes, which no one number is
        return True
    if known is None:
        _set(config, {size: before[hidden[-1]] // before[heads[-1]]})
    shapes = model_shapes(kind, config)
    effect = None if shapes is None else _effect(kind, config, shapes, (heads,))
    if effect is not None and effect.any() and bool((effect >= 0).all()):
        return True
    vars(owner).clear()
    vars(owner).update(before)
    return False


def _make_explicit(kind: type, config: Any) -> None:
    """Give integers that are None and derived from others (GPT-2's n_inner) the value that changes nothing."""
    shapes, first = model_shapes(kind, config), 64
    for key, value in _entries(config):
        low, high = (model_shapes(kind, config, {key: n}) if value is None else None for n in (first, 2 * first))
        if shapes is None or low is None or high is None or not shapes.keys() == low.keys() == high.keys():
            continue
        slope = (_axes(high) - _axes(low)) / first
        moved = slope != 0
        if moved.any():
            same = first + (_axes(shapes) - _axes(low))[moved][0] / slope[moved][0]
            if same >= 1 and model_shapes(kind, config, {key: int(same)}) == shapes:
                _set(config, {key: int(same)})


def _entries(config: Any, path: Key = ()) -> Iterator[tuple[Key, int | None]]:
    """Whatever is, or by its type may be, an integer in a config, in the lists in it, and in the configs within it."""
    types = _field_types(config)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name.endswith(_NO_WIDTHS):
            continue
        if isinstance(value, PretrainedConfig):
            yield from _entries(value, (*path, name))
        elif isinstance(value, list):
            yield from (((*path, name, i), entry) for i, entry in enumerate(value) if type(entry) is int)
        elif type(value) is int or (value is None and "int" in types.get(name, "")):
            yield (*path, name), value


def _field_types(config: Any) -> dict[str, str]:
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields}


def _standard(config: Any, name: str) -> Key:
    """Where a key that most configs have, of its language model, is kept: GPT-2's hidden_size is n_embd."""
    text = config.get_text_config()
    path = next((key[:-1] for key, _ in _entries(config) if _get(config, key[:-1]) is text), ())
    return (*path, text.attribute_map.get(name, name))


def _get(config: Any, key: Key) -> Any:
    for step in key:
        config = config[step] if isinstance(step, int) else getattr(config, step)
    return config


def _set(config: Any, values: Mapping[Key, int]) -> None:
    for key, value in values.items():
        owner, last = _get(config, key[:-1]), key[-1]
        if isinstance(last, int):
            owner[last] = value
        else:
            setattr(owner, last, value)


def _turned(config: Any, knob: Knob, turns: int) -> dict[Key, int]:
    """The knob's integers after so many turns, 1 at least."""
    values = {key: _get(config, key) for key in knob}
    return {key: max(1, value + turns * (value // gcd(*values.values()))) for key, value in values.items()}


def model_shapes(kind: type, config: Any, values: Mapping[Key, int] | None = None) -> Shapes | None:
    """Shapes of all tensors of a model of this config, with other `values` in it; None if transformers refuses it."""
    try:
        changed = copy.deepcopy(config)
        _set(changed, values or {})
        with torch.device("meta"):
            return shapes_of(kind(changed))
    except Exception:  # any value may be refused in any way
        return None


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _axes(shapes: Shapes) -> Tensor:  # (axes,) float64
    """All sizes in one row, ordered by name."""
    return torch.tensor([size for name in sorted(shapes) for size in shapes[name]], dtype=torch.float64)
