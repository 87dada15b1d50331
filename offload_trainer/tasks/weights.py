"""Weights of a Hugging Face model folder, streamed from safetensors into tensors that exist already.

`Weights.match` checks everything from the files' headers before anything is allocated; after that `load` holds one
tensor beyond the model at a time. Nothing here reads a pickle.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_trainer.errors import UserError

_FLOATS = {"F64", "F32", "F16", "BF16"}
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Names that old files carry for buffers which transformers now computes."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index lists them if it has one.

    Raises UserError if there is none, only a pickle, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"task.model: {index} is not a safetensors index ({error!r})") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"task.model ({folder}) lacks {_some(missing)}, listed in {index.name}")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"task.model ({folder}) has its weights in {_some(pickles)} only, a format that can run code: "
            "convert them to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"task.model ({folder}) has no weights: no *.safetensors in it (for a new model give its config)")


@dataclass(frozen=True)
class Weights:
    """Which stored tensor goes where, checked when made."""

    moves: tuple[tuple[Path, str, str], ...]
    """(file, name in the file, name in the model)."""

    @classmethod
    def match(cls, files: Iterable[Path], model: Any) -> "Weights":
        """Pairs the names in the files with those of a transformers model (on meta, say), from headers alone.

        As in transformers, the base model's prefix may be there or not, and one name of tied tensors is enough.
        Raises UserError for names that are missing, unexpected or of another shape, and for quantized tensors.
        """
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        ignored = [*_OLD_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        moves, unexpected, wrong = [], [], []
        for file in files:
            for stored, shape, dtype in _headers(file):
                name = _name_in_model(stored, tensors, model.base_model_prefix)
                if name is None:
                    if not any(re.search(pattern, stored) for pattern in ignored):
                        unexpected.append(stored)
                elif shape != tuple(tensors[name].shape):
                    wrong.append(f"{stored} is {shape}, the config says {tuple(tensors[name].shape)}")
                elif dtype not in _FLOATS and tensors[name].is_floating_point():
                    wrong.append(f"{stored} is stored as {dtype}: quantized weights must be dequantized first")
                else:
                    moves.append((file, stored, name))
        missing = _missing(model, tensors, {name for _, _, name in moves})
        problems = {"missing": missing, "unexpected": unexpected}
        if wrong:
            raise UserError(f"task.model: {_some(wrong)}")
        if missing or unexpected:
            found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
            raise UserError(
                f"task.model: the weights do not fit the config's {type(model).__name__} ({found}); files in an older "
                "layout can be resaved with transformers' save_pretrained(…, save_original_format=False)"
            )
        return cls(tuple(moves))

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """Copies every stored tensor into the model's, in place, one at a time, and marks it as initialised.

        Raises UserError if two stored tensors differ that the config ties together.
        """
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        loaded: dict[int, str] = {}
        for file in dict.fromkeys(file for file, _, _ in self.moves):
            with safe_open(file, framework="pt") as handle:
                for _, stored, name in (move for move in self.moves if move[0] == file):
                    tensor, value = tensors[name], handle.get_tensor(stored)
                    twin = loaded.setdefault(id(tensor), stored)
                    if twin != stored and not torch.equal(tensor, value.to(tensor.dtype)):
                        raise UserError(
                            f"task.model: {twin} and {stored} differ, but the config ties them: "
                            "set tie_word_embeddings to false in config.json"
                        )
                    tensor.copy_(value)
                    vars(tensor)["_is_hf_initialized"] = True


def _headers(file: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of every tensor in a file."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118  # a handle is no dict
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except (SafetensorError, OSError) as error:
        raise UserError(f"task.model: {file} is not a readable safetensors file ({error})") from error


def _name_in_model(stored: str, tensors: dict[str, Tensor], prefix: str) -> str | None:
    candidates = (stored, stored.removeprefix(f"{prefix}."), f"{prefix}.{stored}")
    return next((name for name in candidates if name in tensors), None)


def _missing(model: Any, tensors: dict[str, Tensor], found: set[str]) -> list[str]:
    """Names of the model that no file holds, less those tied to one that is there or that transformers may miss."""
    there = {id(tensors[name]) for name in found}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        name
        for name, tensor in tensors.items()
        if id(tensor) not in there and not any(re.search(pattern, name) for pattern in optional)
    ]


def _some(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
