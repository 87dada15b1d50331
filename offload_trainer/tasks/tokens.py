"""Tokenizers: a folder's, the model's own, or bytes."""

import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offload_trainer.errors import UserError

BYTES = 256
"""Vocabulary of the byte-level tokens."""
FEW = 64
"""Tokens: fewer, and none for any printable character, are special ones alone, all that transformers makes up."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""One of them is in every folder with a tokenizer; without any, transformers may make up an empty one."""


def load_tokenizer(tokenizer: str | None, model: Path | None) -> Any | None:
    """The tokenizer that `task.tokenizer` names, or None for bytes.

    tokenizer: a folder, `bytes`, or None: then the one in the `model` folder, and bytes for a new model (None).
    Raises UserError for a folder without one, or one that does not load.
    """
    if tokenizer == "bytes" or (tokenizer is None and model is None):
        return None
    folder = model if tokenizer is None else Path(tokenizer).expanduser()
    assert folder is not None
    key = "task.model" if tokenizer is None else "task.tokenizer"
    if not folder.is_dir():
        raise UserError(f"{key} ({folder}) is not a folder: give a local tokenizer folder, or bytes")
    if not any((folder / name).is_file() for name in _FILES):
        advice = "give task.tokenizer a tokenizer folder, or bytes"
        raise UserError(f"{key} ({folder}) has no tokenizer in it ({_FILES[0]} or the like): {advice}")
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = set(loaded.encode(string.printable, add_special_tokens=False)) - {loaded.unk_token_id}
    except Exception as error:  # whatever is wrong with the files in it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{key} ({folder}): its tokenizer does not load: {reason}") from error
    if not known and len(loaded.get_vocab()) < FEW:
        raise UserError(f"{key} ({folder}): its tokenizer knows no text: the vocabulary ({_FILES[0]}) is missing")
    return loaded


def vocabulary(tokenizer: Any | None) -> int:
    """Rows that an embedding needs: one more than the largest token."""
    return BYTES if tokenizer is None else 1 + max(tokenizer.get_vocab().values(), default=-1)


def byte_tokenizer() -> Any:
    """Bytes as a tokenizer of transformers: token = byte of the text's UTF-8."""
    # GPT-2's way to write bytes as characters: printable ones as they are, the others from 256 on.
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(BYTES) if byte not in shown]
    characters = {chr(byte): byte for byte in shown} | {chr(BYTES + i): byte for i, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
