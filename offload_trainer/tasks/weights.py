"""Weights of a Hugging Face model folder, streamed from safetensors into tensors that exist already.

`Weights.match` checks everything from the files' headers before anything is allocated; after that `load` holds a few
MiB beyond the model, at most one tensor.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError
from offload_trainer.files.format import DTYPES
from offload_trainer.files.reading import Stored
from offload_trainer.tasks.layouts import Region, places
from offload_trainer.tasks.stored import some

_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.(attn|attention)\.(masked_)?bias$")
"""Names that old files carry for buffers which transformers now computes."""


@dataclass(frozen=True)
class Move:
    """A stored tensor and the place of its values: a region of a tensor of the model, all of it where that is ()."""

    stored: Stored
    name: str
    region: Region


@dataclass(frozen=True)
class Weights:
    """Which stored tensor goes where, checked when made."""

    moves: tuple[Move, ...]
    """In the order in which they lie in the files."""

    @classmethod
    def match(cls, stored: Sequence[Stored], model: Any) -> "Weights":
        """Pairs stored tensors with those of a transformers model (on meta, say), from headers alone.

        As in transformers, the base model's prefix may be there or not, one name of tied tensors is enough, and older
        layouts (a file tensor per expert) are converted. Raises UserError for names that are missing or unexpected,
        shapes that contradict the config, and dtypes that are not supported.
        """
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        # Integers in the place of weights are quantized whatever their names are, and so is all that has 8 bits.
        odd = [one for one in stored if one.dtype not in DTYPES or one.name.endswith((".qweight", ".qzeros"))]
        ignored = [*_OLD_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        moves, unexpected, wrong = [], [], []
        for one, place in zip(stored, places(stored, model, tensors), strict=True):
            if place is None:
                if not any(re.search(pattern, one.name) for pattern in ignored):
                    unexpected.append(one.name)
                continue
            target = tensors[place.name].detach()[place.region]
            if not DTYPES.get(one.dtype, torch.int8).is_floating_point and target.is_floating_point():
                odd.append(one)
            elif tuple(target.shape) != one.shape:
                wrong.append(f"{one.name} is {one.shape}, the config says {tuple(target.shape)}")
            moves.append(Move(one, place.name, place.region))
        if odd:
            raise UserError(
                f"task.model: {odd[0].name} is stored as {odd[0].dtype}, which is not supported: quantized weights "
                f"must be dequantized first, to one of {', '.join(n for n, d in DTYPES.items() if d.is_floating_point)}"
            )
        if wrong:
            raise UserError(f"task.model: {some(wrong)}")
        problems = {"missing": _missing(model, tensors, {move.name for move in moves}), "unexpected": unexpected}
        if found := "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names):
            raise UserError(
                f"task.model: the weights do not fit the config's {type(model).__name__} ({found}); if transformers "
                "loads them, resave them with its save_pretrained(…, save_original_format=False)"
            )
        return cls(tuple(sorted(moves, key=lambda move: (move.stored.file, move.stored.start))))

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copies every stored tensor into the model's, in place and in their dtypes, and marks them as initialised.

        Raises UserError if two stored tensors differ that the config ties together.
        """
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        filled: dict[tuple[int, str], str] = {}  # a tensor and the region of it → the stored tensor that it holds
        for file, moves in groupby(self.moves, attrgetter("stored.file")):
            try:
                with open(file, "rb", buffering=0) as handle:
                    for move in moves:
                        tensor, stored = tensors[move.name], move.stored
                        target = tensor.detach()[move.region]
                        first = filled.setdefault((id(tensor), str(move.region)), stored.name)
                        if first == stored.name:
                            stored.read_into(handle, target)
                        elif not stored.equals(handle, target):
                            raise UserError(
                                f"task.model: {first} and {stored.name} differ, but the config ties them: "
                                "set tie_word_embeddings to false in config.json"
                            )
                        vars(tensor)["_is_hf_initialized"] = True
            except OSError as error:
                raise UserError(f"task.model: {file} cannot be read ({error.strerror or error})") from error


@torch.no_grad()
def materialise(model: Any, fill: Callable[[nn.Module], None] | None) -> None:
    """Fills a transformers model in place whose tensors, built on meta, are now real.

    `fill` gives some of them their values and marks them as transformers does, by `_is_hf_initialized`. The others are
    initialised as transformers initialises them, buffers that are never saved (rotary frequencies) included, and
    random from torch's seed. Tied tensors end as one.
    """
    # Undefined memory, not an error, is what a tensor left on meta would be later.
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"materialise needs real memory for every tensor; on meta: {', '.join(left)}")
    model.tie_weights()
    _forget_initialised(model)
    for name in getattr(model, "all_tied_weights_keys", {}):
        # The source's initialisation counts: the module that only borrows the tensor must not draw it again.
        borrower = model.get_submodule(name.rpartition(".")[0])
        if len(list(borrower.parameters(recurse=False))) == 1:
            borrower._is_hf_initialized = True
    if fill is not None:
        fill(model)
        for module in model.modules():  # where a part of a tensor is initialised, its mark is not seen
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and all("_is_hf_initialized" in vars(tensor) for tensor in own):
                module._is_hf_initialized = True
    model.initialize_weights()
    _forget_initialised(model)


def _forget_initialised(model: nn.Module) -> None:
    """Removes the marks by which transformers skips what is initialised already."""
    for item in [*model.modules(), *model.parameters(), *model.buffers()]:
        vars(item).pop("_is_hf_initialized", None)


def _missing(model: Any, tensors: dict[str, Tensor], found: set[str]) -> list[str]:
    """Names of the model that no file holds, less those tied to one that is there or that transformers may miss."""
    there = {id(tensors[name]) for name in found}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in there and not any(re.search(pattern, name) for pattern in optional)
    ]
