"""Text as one row of tokens: which files, which of them validate, how they are tokenised, packed and batched."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from offload_trainer.errors import UserError
from offload_trainer.tasks.task import Shuffle

_SKIPPED_IN_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
"""Not the library's own code (installed packages), or two thirds of it by size (its tests), or generated tables."""

_ENCODED_AT_ONCE = 64
"""Documents in one call of the tokenizer, which encodes them in parallel."""


def find_documents(data: str | Sequence[str]) -> list[tuple[str, Path]]:
    """(name, file) of every document, sorted by name, each name relative to the entry of `data` it was found under.

    An entry is `stdlib` (the running Python's standard library, *.py), a file, or a folder: all its files at any
    depth, without hidden ones, and without binary ones (a zero byte among the first 1024) when they are read.
    Raises UserError if an entry does not exist or holds no file.
    """
    documents: list[tuple[str, Path]] = []
    for entry in [data] if isinstance(data, str) else data:
        found = sorted(_walk(entry))
        if not found:
            raise UserError(f"task.data ({entry}) holds no text files")
        documents += found
    if not documents:
        raise UserError("task.data is an empty list: give stdlib, files or folders")
    return documents


def _walk(entry: str) -> Iterator[tuple[str, Path]]:
    stdlib = entry == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"] if stdlib else entry).expanduser()
    if root.is_file():
        yield root.name, root
    elif not entry or not root.is_dir():
        raise UserError(f"task.data ({entry}) does not exist: give stdlib, files or folders")
    for path in root.rglob("*.py" if stdlib else "*"):
        parts = path.relative_to(root).parts
        skipped = any(part.startswith(".") for part in parts)
        if stdlib:
            skipped = skipped or not _SKIPPED_IN_STDLIB.isdisjoint(parts) or "_sysconfigdata" in path.name
        if not skipped and path.is_file():
            yield "/".join(parts), path


def read_documents(documents: list[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    """(name, content) of the documents that are text and not empty. Raises UserError for a file that cannot be read."""
    read = []
    for name, path in documents:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"task.data: {path} cannot be read ({error.strerror})") from error
        if content and b"\0" not in content[:1024]:
            read.append((name, content))
    if not read:
        raise UserError(f"task.data: none of its {len(documents)} files is text ({documents[0][1]}, …)")
    return read


def split(documents: list[tuple[str, bytes]], val_fraction: float) -> tuple[list[bytes], list[bytes]]:
    """(training, validation) documents: whole files, `val_fraction` of the bytes to validation.

    Files go to validation in the order of the hash of their name, as long as they fit (always at least one), so the
    split depends on nothing but the files. A lone file is cut: its end validates.
    """
    if len(documents) == 1:
        content = documents[0][1]
        cut = len(content) - int(val_fraction * len(content))
        return [content[:cut]], [content[cut:]]

    def rank(index: int) -> tuple[bytes, int]:
        return hashlib.sha256(documents[index][0].encode()).digest(), index

    room = val_fraction * sum(len(content) for _, content in documents)
    held_out: set[int] = set()
    for index in sorted(range(len(documents)), key=rank):
        if len(documents[index][1]) <= room:
            held_out.add(index)
            room -= len(documents[index][1])
    held_out = held_out or {min(range(len(documents)), key=lambda index: (len(documents[index][1]), rank(index)))}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, (_, content) in enumerate(documents):
        parts[index in held_out].append(content)
    return parts


def pack(documents: list[bytes], tokenizer: Any | None) -> Tensor:  # (tokens,) uint8 or int32
    """All documents in one row, a separator after each: a newline byte, or the tokenizer's end of text.

    A tokenizer without one gets its own encoding of a newline. Before each document comes what the tokenizer itself
    puts before a text (Llama's and Gemma's begin of text), since their models expect it there.
    """
    if tokenizer is None:
        row = bytearray()
        for content in documents:
            row += content + b"\n"
        return torch.frombuffer(row, dtype=torch.uint8)

    def encode(texts: list[str], special: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]

    bare, whole = encode(["a"])[0], encode(["a"], special=True)[0]
    begin = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else encode(["\n"])[0]
    rows = []
    for start in range(0, len(documents), _ENCODED_AT_ONCE):
        texts = [content.decode(errors="replace") for content in documents[start : start + _ENCODED_AT_ONCE]]
        rows += [np.array(begin + ids + end, dtype=np.int32) for ids in encode(texts)]
    return torch.from_numpy(np.concatenate(rows))


def blocks(tokens: Tensor, sequence: int) -> Tensor:  # (blocks, sequence + 1), a view
    """The row cut into blocks that overlap by one token: the last target of a block is the first input of the next."""
    if len(tokens) <= sequence:
        return tokens.new_empty(0, sequence + 1)
    return tokens.unfold(0, sequence + 1, sequence)


class TrainBlocks(Dataset[Tensor]):
    """`train[step]`: (batch_size, sequence + 1) int64, whole blocks, each visited once an epoch in a new order."""

    def __init__(self, blocks: Tensor, batch_size: int, seed: int):
        self.blocks = blocks  # (blocks, sequence + 1), a view of the packed row
        self.order = Shuffle(len(blocks), batch_size, seed)

    def __getitem__(self, step: int) -> Tensor:
        return self.blocks[self.order.indices(step)].long()
