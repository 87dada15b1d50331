"""What all sections of the config share."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

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


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "a boolean is no number")
    return value


def _without_booleans(schema: Any) -> Any:
    """pydantic's schema, but no number in it may be given as true or false, which Python takes for 1 and 0."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_without_booleans, schema))
    if not isinstance(schema, dict):
        return schema
    made: Any = {key: _without_booleans(value) for key, value in schema.items()}
    if made.get("type") in ("int", "float"):
        return core_schema.no_info_before_validator_function(_no_boolean, made)
    return made


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # a folder may be called 2026
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _without_booleans(handler(source))
