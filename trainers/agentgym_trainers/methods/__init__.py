"""The catalogue of methods: one TOML file each, a declaration over the axes and what is known about it. No torch here.

    method = load("gspo")               # or a path: load("mine.toml")
    method.table["objective"]           # the sections of a run's config that the method sets
    declared(method).objective          # the same, checked, as records

A file holds an `[about]` table and any of the sections below. What it does not say keeps the run's own value.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

import msgspec

from agentgym import registry
from agentgym.advantages import Term
from agentgym.errors import ConfigError, unknown
from agentgym.presets import Table, read_toml
from agentgym.rewards import judges
from agentgym_trainers.candidates.declare import InTRO
from agentgym_trainers.objective.declare import Objective, Struct
from agentgym_trainers.preference.declare import Preference
from agentgym_trainers.strategies.declare import Plain, Strategy

Badge = Literal["code-checked", "formula-checked", "reconstruction", "idea carried", "reproduced"]


class About(Struct, frozen=True, kw_only=True):
    """What is known of a method.

    paper    arXiv number or repository; "" for what has none
    badge    how far it is backed; docs/objectives.md says what each means
    mark     evidence: C read in released code, N in notes about the paper, M recalled, R reconstructed
    formula  in plain text
    notes    what a user should know: what it needs, settings of the paper that a run sets elsewhere
    differs  where ours is not the authors', and what of theirs we could not verify
    reward   the paper's own, for environments that bring the terms it reads; not laid under a run
    """

    title: str
    paper: str = ""
    badge: Badge
    mark: str
    formula: str
    notes: str = ""
    differs: str = ""
    reward: dict[str, Any] = msgspec.field(default_factory=dict)


class Method(Struct, frozen=True, kw_only=True):
    """A method: its name, what is known of it, and the sections it sets, as plain tables."""

    name: str
    about: About
    table: Table


class Declaration(Struct, frozen=True, kw_only=True):
    """The sections of a method, checked; those that it does not set have a run's defaults."""

    judge: tuple[dict[str, Any], ...] = ()
    reward: dict[str, Any] = msgspec.field(default_factory=dict)
    strategy: Strategy = Plain()
    advantage: tuple[Term, ...] = (Term(),)
    whiten: Literal["none", "trajectories", "turns", "tokens"] = "none"
    objective: Objective = Objective()
    preference: Preference | None = None
    candidates: InTRO | None = None
    optim: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        judges.declared(self.judge)


def names() -> tuple[str, ...]:
    """Every method that a catalogue lists."""
    return tuple(registry.catalogue("objectives"))


def load(name_or_path: str) -> Method:
    """A method by its name or from a TOML file.

    Raises `UnknownName` (naming the nearest), `DataError` for a file that is no TOML, `ConfigError` for one that is
    no method.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = Path(str(registry.lookup(name_or_path, "objectives").target))
    return read(path)


def read(path: Path) -> Method:
    """The method in this file, named as the file is."""
    table = read_toml(path)
    about = _converted(table.pop("about", {"title": path.stem, **UNBACKED}), About, f"{path.name}: about")
    for section in table:
        if section not in Declaration.__struct_fields__:
            raise unknown(f"section of the method {path.stem!r}:", section, Declaration.__struct_fields__)
    return Method(name=path.stem, about=about, table=table)


UNBACKED = {"badge": "idea carried", "mark": "", "formula": "as declared"}
"""What is said of a file without [about]: somebody's own, backed by nobody."""


def declared(method: Method) -> Declaration:
    """The method's sections, checked. Raises `ConfigError` with the reason for what cannot be meant."""
    return _converted(method.table, Declaration, method.name)


Kind = typing.TypeVar("Kind")


def _converted(table: Table, kind: type[Kind], where: str) -> Kind:
    try:
        return msgspec.convert(table, kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {f'{error}'.replace('`', '')}") from error
