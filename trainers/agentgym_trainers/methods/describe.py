"""A declaration in words: axis by axis, one line each, and what is unlike a run's defaults."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from agentgym.advantages import Term
from agentgym.errors import AgentGymError
from agentgym_trainers.methods import Declaration, Method, declared, names
from agentgym_trainers.methods import load as load_method
from agentgym_trainers.objective.declare import Kind


def axes(declaration: Declaration, *, full: bool = False) -> dict[str, str]:
    """Every axis and its choice, in the order in which an update walks through them; `full` with all its options."""
    sections = _fields(declaration)
    objective = sections.pop("objective")
    walk = {name: sections.pop(name) for name in ("reward", "strategy", "advantage", "whiten")}
    return {axis: phrase(choice, full=full) for axis, choice in {**walk, **_fields(objective), **sections}.items()}


def differing(method: Method) -> dict[str, str]:
    """The axes on which the method is unlike a run's defaults."""
    plain = axes(Declaration())
    return {axis: text for axis, text in axes(declared(method)).items() if plain[axis] != text}


def phrase(choice: Any, *, full: bool = False) -> str:
    """A choice in one line: its kind, and those of its options that are not the kind's defaults (`full`: all)."""
    if isinstance(choice, Term):
        return _term(choice)
    if isinstance(choice, msgspec.Struct):
        return _call(getattr(choice, "kind", ""), _fields(choice) if full else _changed(choice), full)
    if isinstance(choice, Mapping):
        return _call(str(choice.get("op", "")), {k: v for k, v in choice.items() if k != "op"})
    if isinstance(choice, float):
        return f"{choice:g}"
    if isinstance(choice, str) or not isinstance(choice, Iterable):
        return "none" if choice is None else str(choice)
    joint = " + " if any(isinstance(part, Term | Kind) for part in choice) else ", "
    return joint.join(phrase(part, full=full) for part in choice) or "none"


def _call(name: str, options: Mapping[str, Any], full: bool = False) -> str:
    said = ", ".join(f"{k} {_inner(v, full)}" for k, v in options.items())
    if not name:
        return said or "default"
    return f"{name} ({said})" if said else name


def _inner(value: Any, full: bool) -> str:
    nested = bool(value) if isinstance(value, Mapping | list | tuple) else isinstance(value, msgspec.Struct)
    return f"[{phrase(value, full=full)}]" if nested else phrase(value)


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _changed(struct: msgspec.Struct) -> dict[str, Any]:
    """The fields whose values are not their defaults."""
    defaults = {f.name: f.default for f in msgspec.structs.fields(struct)}
    return {name: value for name, value in _fields(struct).items() if value != defaults[name]}


def _term(term: Term) -> str:
    """prompt, anchor: mean return_to_go (gamma 0.95) x 0.3"""
    shown = {k: v for k, v in _changed(term).items() if k not in ("key", "centre", "scale", "credit", "weight")}
    words = [term.centre, *(w for w in (term.scale,) if w != "none"), *(c for c in (term.credit,) if c != "trajectory")]
    weight = f" x {term.weight:g}" if term.weight != 1 else ""
    return f"{', '.join(term.parts)}: {_call(' '.join(words), shown)}{weight}"


# --- all of them ------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """A row per method of the catalogue; a plugin's that does not load is reported by name and left out."""
    found = []
    for name in names():
        try:
            found.append(row(load_method(name)))
        except AgentGymError as error:
            warnings.warn(f"the method {name!r} is left out: {error}", stacklevel=2)
    return found


def row(method: Method) -> dict[str, Any]:
    """Name, title, paper, badge, mark and the axes that differ from a run's defaults."""
    about = method.about
    facts = {"title": about.title, "paper": about.paper, "badge": about.badge, "mark": about.mark}
    return {"name": method.name, **facts, "axes": differing(method)}


def markdown() -> str:
    """The rows as a table for docs/objectives.md."""
    lines = ["| method | what it is | paper | badge | axes that differ from the defaults |", "|---|---|---|---|---|"]
    for r in rows():
        said = "; ".join(f"{axis}: {text}" for axis, text in r["axes"].items()).replace("|", "\\|")
        lines.append(f"| `{r['name']}` | {r['title']} | {r['paper']} | {r['badge']} | {said} |")
    return "\n".join(lines) + "\n"
