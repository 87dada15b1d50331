"""From a command line to a `Config`: jsonargparse reads and merges, pydantic judges, errors become one line.

The parser takes any value for any key, so that there is one judge, whose errors say exactly where and what.
(Given the typed models, jsonargparse answers in ten lines and an override such as `--task.batch_size 8` turns
an image_classification task silently into the first member of the union that has such a key.)
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from pydantic import ValidationError

from offload_trainer.config.explaining import SECTIONS, described, keys, misjudged, misread
from offload_trainer.config.sections import Config
from offload_trainer.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
"""What YAML calls a `<<`, of which a map may have several."""


def parse(argv: list[str] | None = None) -> Config:
    """The config of `--config FILE [--dotted.key value ...]`; None: of this process's own command line.

    An override wins over the file wherever it stands. `--help` and `--print_config` print and exit (code 0).
    Raises UserError, always of one line.
    """
    files, overrides = _split(sys.argv[1:] if argv is None else argv)
    try:
        read = _parser().parse_args([*(f"--config={file}" for file in files), *overrides]).as_dict()
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        raise UserError(misread(error, files)) from None
    del read["config"]
    print_config = read.pop("print_config", False)
    for name in ("task", *SECTIONS):
        if read.get(name) is None:  # absent, or a bare `structure:` in the file
            read[name] = {}
    if files:
        read.setdefault("out", f"runs/{Path(files[-1]).stem}")
    try:
        config = Config.model_validate(read)
    except ValidationError as error:
        # A key that does not exist often explains one that is missing, so it goes first.
        first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        raise UserError(misjudged(first, read)) from None
    if print_config:
        print(config.to_yaml(), end="")
        raise SystemExit(0)
    return config


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The config files and the overrides; checks what the parser would take in silence."""
    splitter = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    splitter.add_argument("--config", action="append", default=[])
    try:
        known, overrides = splitter.parse_known_args(argv)
    except argparse.ArgumentError:
        raise UserError("--config needs the path of a YAML file") from None
    for file in known.config:
        if not Path(file).is_file():
            raise UserError(f"--config ({file}) must be a file that exists")
        _require_once(file)
    for option in (argument.split("=")[0] for argument in overrides):
        for key in keys():
            if option.startswith(f"--{key}.") and "." in option.removeprefix(f"--{key}."):
                raise UserError(f"{option} reaches too deep into {key}: give the whole map, --{key} '{{...}}'")
    return known.config, overrides


def _require_once(file: str) -> None:
    """Raise `UserError` for a key that a file gives twice: the reader would take the last. What is no YAML it tells."""
    try:
        root = yaml.compose(Path(file).read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError):
        return
    except RecursionError:
        raise UserError(f"--config ({file}) is nested too deeply") from None
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", root, ())]
    met: set[int] = set()  # an alias is the node it stands for
    while waiting:
        prefix, node, around = waiting.pop(0)
        if id(node) in around:
            raise UserError(f"--config ({file}): {prefix.rstrip('.')} holds itself, by an alias")
        if id(node) in met:
            continue
        met.add(id(node))
        around = (*around, id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(prefix, value, around) for value in node.value]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                name, line, same = f"{prefix}{key.value}", key.start_mark.line + 1, (key.tag, str(key.value))
                if same in lines and key.tag != MERGE:
                    raise UserError(
                        f"--config ({file}): {name} is given twice, on lines {lines[same]} and {line}: keep one"
                    )
                lines[same] = line
                waiting.append((f"{name}.", value, around))


def _parser() -> ArgumentParser:
    """A parser that knows every key and its documentation but no type; absent keys stay absent."""
    parser = ArgumentParser(
        prog="run.py",
        usage="%(prog)s --config FILE [--dotted.key value ...]",
        description="Train a network that lives in host memory, one sliced subnetwork at a time.",
        formatter_class=argparse.HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with the keys below.")
    parser.add_argument("--print_config", help="Print the whole config, defaults included, and exit.", **flag)
    groups = {
        "": parser.add_argument_group("run"),
        "task": parser.add_argument_group("task", "What is trained."),
    }
    for name, section in SECTIONS.items():
        groups[name] = parser.add_argument_group(name, section.__doc__)
    for key, schema in keys().items():
        group, text = groups[key.rpartition(".")[0]], described(key).replace("%", "%%")
        if key == "dry_run":
            group.add_argument("--dry-run", "--dry_run", help=text, **flag)
            continue
        # Declared as a map, `--structure.groups.residual 0.5` adds to the file's map instead of replacing it.
        holds_map = any(option.get("type") == "object" for option in schema.get("anyOf", [schema]))
        kind = dict[str, Any] | Any if holds_map else Any
        group.add_argument(f"--{key}", type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return parser
