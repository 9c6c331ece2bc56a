"""Numbers of a declaration by their dotted path: what controllers move. No torch here."""

from __future__ import annotations

from typing import Any

import msgspec

from agentgym.errors import ConfigError


def get(o: Any, path: str) -> float:
    """The number at a dotted path such as "regularisers.0.coef"; `ConfigError` where there is none."""
    found = o
    for part in path.split("."):
        found = _step(found, part, path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ConfigError(f"{path!r} leads to {found!r:.60}, which is no number")
    return float(found)


def put(o: Any, path: str, value: float) -> Any:
    """The declaration with another number there."""
    head, _, rest = path.partition(".")
    inner = put(_step(o, head, path), rest, value) if rest else value
    if isinstance(o, tuple):
        return (*o[: int(head)], inner, *o[int(head) + 1 :])
    return msgspec.structs.replace(o, **{head: inner})


def _step(found: Any, part: str, path: str) -> Any:
    inside: dict[str, Any] = {}
    if isinstance(found, tuple):
        inside = {str(i): x for i, x in enumerate(found)}
    elif isinstance(found, msgspec.Struct):
        inside = msgspec.structs.asdict(found)
    if part not in inside:
        raise ConfigError(f"{path!r} leads nowhere at {part!r}; there is {', '.join(inside) or 'nothing'}")
    return inside[part]
