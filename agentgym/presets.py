"""Configuration as it comes in: preset files and `--set a.b=value`, merged into plain tables.

Nothing here knows what a key means; whoever reads a table says which keys exist and names the nearest one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agentgym import registry
from agentgym.errors import ConfigError, DataError, unknown

Table = dict[str, Any]


def read_preset(name: str) -> Table:
    """The table of a preset id (`shopping/laptop`) or of a TOML file (`mine.toml`, any path that exists)."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        path = Path(str(registry.lookup(name, "presets").target))
    return read_toml(path)


def read_toml(path: Path) -> Table:
    """A TOML file's table; `DataError` names the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file {str(path)!r} (a preset's name has no .toml: see `agentgym list`)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error


def parse_settings(assignments: Iterable[str]) -> Table:
    """`["a.b=1", "a.c='#'"]` to `{"a": {"b": 1, "c": "#"}}`.

    A value is read as TOML (numbers, true, [lists], {tables}, quoted strings); what is not TOML is a string as it is,
    so that `env.catalogue=../x.csv` and `env.delimiter=#` need no quotes that the shell would eat.
    """
    table: Table = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not separator or not all(path):
            raise ConfigError(f"--set takes a.b=value, not {assignment!r}")
        merge(table, _nest(path, read_value(text)))
    return table


def _nest(path: list[str], value: Any) -> Table:
    for part in reversed(path):
        value = {part: value}
    table: Table = value
    return table


def read_value(text: str) -> Any:
    """A value as typed: TOML where it is TOML, else the text."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = found.get("value")
    plain = len(found) == 1 and isinstance(value, bool | int | float | str | list | dict)
    return value if plain else text


def merge(base: Table, over: Mapping[str, Any]) -> Table:
    """Lay `over` on `base`, in place, table by table; other values replace, and so does a table of another kind."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict) and not _other_kind(base[key], value):
            merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value
    return base


def _other_kind(base: Table, over: Mapping[str, Any]) -> bool:
    """Whether `over` says it is something else, so that the options of `base` mean nothing there."""
    return any(tag in over and base.get(tag) != over[tag] for tag in ("kind", "op"))


def sections(table: Table, known: Iterable[str]) -> Table:
    """The table with every known section present; a section that is not known is an error naming the nearest."""
    names = tuple(known)
    for name, value in table.items():
        if name not in names:
            raise unknown("setting", name, names, "write --set section.key=value")
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a section: write --set {name}.key=value, not {name}={value!r}")
    return {name: table.get(name, {}) for name in names}
