"""What a key means and what is wrong with a value, in one line, made from the sections' JSON schemas."""

import difflib
import functools
import re
from typing import Any

from pydantic_core import ErrorDetails

from offload_trainer.config.base import Section, shown
from offload_trainer.config.sections import Config
from offload_trainer.config.task_sections import CausalLM, Custom, ImageClassification

TASKS = {"causal_lm": CausalLM, "image_classification": ImageClassification, "custom": Custom}
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

Schema = dict[str, Any]


@functools.cache
def keys(task: str | None = None) -> dict[str, Schema]:
    """Dotted key → JSON schema of its value, plus `required`, for one kind of task; None: for all of them."""
    found: dict[str, Schema] = {}
    if task is None:
        for kind in TASKS:
            found |= {key: schema for key, schema in keys(kind).items() if key not in found}
        return found
    sections = {f"{name}.": section for name, section in SECTIONS.items()}
    for prefix, model in {"": Config, "task.": TASKS[task], **sections}.items():
        schema = model.model_json_schema()
        for name, field in schema["properties"].items():
            if name not in ("task", *SECTIONS):
                found[prefix + name] = {**field, "required": name in schema.get("required", ())}
    found["task.kind"]["enum"] = list(TASKS)
    return found


def described(key: str) -> str:
    """Documentation, rule and default of a key; for each kind of task where they differ."""
    texts = {}
    for task in TASKS:
        if schema := keys(task).get(key):
            default = "required" if schema["required"] else f"default {shown(schema['default'])}"
            texts[task] = f"{schema['description']} ({rule(schema)}; {default})"
    if len(texts) == len(TASKS) and len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return " ".join(f"[{task}] {text}" for task, text in texts.items())


def rule(schema: Schema) -> str:
    """What a value must be: `in (0, 1]`, `a whole number > 0`, `one of rloo, vr_pge`, …"""
    if "anyOf" in schema:
        return " or ".join(rule(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(shown, schema["enum"]))
    match schema.get("type"):
        case "integer" | "number" as kind:
            noun = "a whole number" if kind == "integer" else "a number"
            low = schema.get("exclusiveMinimum", schema.get("minimum"))
            high = schema.get("exclusiveMaximum", schema.get("maximum"))
            if low is None:
                return noun
            if high is None:
                return f"{noun} {'>' if 'exclusiveMinimum' in schema else '>='} {low:g}"
            opening, closing = "[("["exclusiveMinimum" in schema], "])"["exclusiveMaximum" in schema]
            return f"in {opening}{low:g}, {high:g}{closing}"
        case "string":
            return f"text like {schema['examples'][0]}" if "examples" in schema else "text"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])} (each {rule(schema['prefixItems'][0])})"
        case "array":
            return f"a list (each {rule(schema['items'])})"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"a map (each value {rule(schema['additionalProperties'])})"
        case "object":
            return "a map"
        case kind:
            return {"boolean": "true or false", "null": "null"}.get(str(kind), "a value")


def unknown(key: str, task: str | None = None) -> str:
    """That there is no such key, with the ones that may have been meant."""
    if key in ("task", *SECTIONS):
        first = next(name for name in keys() if name.startswith(f"{key}."))
        return f"{key} is a section: set its keys one by one, such as {first}"
    known, leaf = [*keys(task), "task", *SECTIONS], key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf]  # the right name in another section
    near = near or difflib.get_close_matches(key, known, n=1)
    if not near:
        leaves = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in known], n=1)
        near = [name for name in known if name.rpartition(".")[2] in leaves]
    hint = f": did you mean {' or '.join(near)}?" if near else " (--help lists them all)"
    return f"{key} is not a key{f' of task.kind {task}' if task and key.startswith('task.') else ''}{hint}"


def misread(error: Exception, files: list[str]) -> str:
    """What jsonargparse had to say about the command line or the YAML of `files`."""
    message = " ".join(str(error).split())
    if key := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)|[Oo]ption '(.+)' is not accepted", message):
        return unknown(key[1] or key[2])
    if option := re.search(r"argument (--\S+): expected one argument", message):
        return f"{option[1]} needs a value"
    if message.startswith("argument "):
        return message
    message = re.sub(r'^Problems parsing config: |in "<unicode string>", ', "", message)
    return f"--config ({', '.join(files)}) must be YAML, a map of keys: {message}" if files else message


def misjudged(error: ErrorDetails, read: dict[str, Any]) -> str:
    """One of pydantic's errors about `read` as `key (value) must be rule`."""
    if error["type"] == "value_error":  # a rule that spans keys brings its own sentence
        return str(error.get("ctx", {})["error"])
    path: list[str] = []
    value: Any = read
    for part in error["loc"]:
        if _holds(value, part):  # or else it is pydantic's name for a member of a union
            value = value[part]
            path.append(str(part))
    missing = error["type"] in ("missing", "union_tag_not_found")
    if error["type"].startswith("union_tag"):
        path, value = ["task", "kind"], read["task"].get("kind")
    elif missing:
        path.append(str(error["loc"][-1]))
    key = ".".join(path)
    kind = read["task"].get("kind") if isinstance(read["task"], dict) else None
    task = kind if isinstance(kind, str) and kind in TASKS else None
    if error["type"] == "extra_forbidden":
        return unknown(key, task)
    if key in ("task", *SECTIONS):
        return f"{key} ({_short(value)}) must be a map of keys"
    depth = 2 if path[0] in ("task", *SECTIONS) else 1
    schema = keys(task)[".".join(path[:depth])]
    for _ in path[depth:]:  # into the map or list that the key holds
        options = schema.get("anyOf", [schema])
        inner = (option.get("additionalProperties") or option.get("items") for option in options)
        schema = next(filter(None, inner), None) or schema["prefixItems"][0]
    if missing:
        return f"{key} is missing: it must be {rule(schema)}"
    wanted = "a finite number" if error["type"] == "finite_number" else rule(schema)
    return f"{key} ({_short(value)}) must be {wanted}"


def _holds(value: Any, part: int | str) -> bool:
    return (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value)))


def _short(value: object) -> str:
    text = " ".join(shown(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
