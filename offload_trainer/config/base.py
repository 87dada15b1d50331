"""What all sections of the config share."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Size = Annotated[str, Field(pattern=r"(?i)^\d+(\.\d+)? ?[KMGT]i?B$", examples=["8GiB"])]
"""Bytes with a unit: GiB is 2³⁰, GB is 10⁹."""


def size_in_bytes(size: str) -> int:
    number, prefix, binary = re.match(r"(?i)^([\d.]+) ?([KMGT])(i?)B$", size).groups()  # type: ignore[union-attr]
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix.upper())))


def shown(value: object) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # a folder may be called 2026
    )
