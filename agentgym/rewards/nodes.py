"""How a declaration becomes a function of a ledger: nodes, occurrences, and the builder that numbers them.

An op is a function (builder, table, slope) -> node, listed in its family's `OPS` with the keys its table takes.
`slope` is d value / d (this node) where that is one number for every ledger, else None; an op that is linear in a part
hands the part's slope on, so that terms of one name keep their own shares even where they cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.types import RewardTerm, Trajectory

Declaration = Mapping[str, Any] | str | float
Table = Mapping[str, Any]


@dataclass(slots=True)
class View:
    """A ledger with its first `active` occurrences known and the rest neutral.

    `visited` collects the occurrences that the full evaluation read, `chosen` the part that each `min` and `max` took.
    """

    totals: Mapping[str | None, float]
    active: float = math.inf
    visited: set[int] = field(default_factory=set)
    chosen: dict[int, int] = field(default_factory=dict)


Node = Callable[[View], float]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One occurrence. `name` None stands for the whole ledger; `slope` is d value / d total where that is fixed.

    An absent term with a default is a constant: it has nobody to charge, so it belongs to the base.
    """

    place: int
    name: str | None
    neutral: float
    slope: float | None
    default: float | None

    def __call__(self, view: View) -> float:
        present = self.name in view.totals
        if self.default is not None and not present:
            return self.default
        if self.place >= view.active:
            return self.neutral
        view.visited.add(self.place)
        if present:
            return view.totals[self.name]
        names = [n for n in view.totals if n is not None]
        raise RecordError(
            f"{unknown('reward term', str(self.name), names)}. The declaration needs it; if it may be absent, write "
            f"{{'op': 'term', 'name': {self.name!r}, 'default': 0.0}}"
        )


class Watcher(Protocol):
    """What reads an episode while it is composed: terms of these names, which no ledger carries."""

    names: tuple[str, ...]

    def terms(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]: ...


class Op(NamedTuple):
    """An operation: what builds it (None: it is an occurrence), and the keys of its table."""

    build: Callable[[Builder, Table, float | None], Node] | None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Builder:
    """Compiles a declaration; numbers its occurrences, and its choices (`min`, `max`), in order."""

    def __init__(self, ops: Mapping[str, Op]) -> None:
        self.ops = ops
        self.leaves: list[Leaf] = []
        self.watchers: list[Watcher] = []
        self.choices = 0

    def leaf(self, name: str | None, neutral: float, slope: float | None, default: float | None = None) -> Leaf:
        made = Leaf(len(self.leaves), name, neutral, slope, default)
        self.leaves.append(made)
        return made

    def node(self, declared: Any, slope: float | None, neutral: float = 0.0) -> Node:
        """A number, a term's name, or a table with an `op`."""
        if isinstance(declared, (int, float)) and not isinstance(declared, bool):
            constant = finite(declared, "a constant")
            return lambda view: constant
        if isinstance(declared, str):
            return self.leaf(declared, neutral, slope)
        op = self._op(declared)
        if op.build is None:
            default = finite(declared["default"], "'default'") if "default" in declared else None
            return self.leaf(declared.get("name"), neutral, slope, default)
        return op.build(self, declared, slope)

    def condition(self, declared: Any, key: str, sign: float = 1.0) -> Leaf:
        """A term that a gate reads. Neutral is whatever passes: sign x infinity."""
        found = self.node(declared, None, neutral=sign * math.inf)
        if not isinstance(found, Leaf):
            raise ConfigError(f"{key!r} of a gate is a term's name; got {declared!r:.80}")
        return found

    def choice(self) -> int:
        self.choices += 1
        return self.choices - 1

    def _op(self, declared: Any) -> Op:
        """The operation of a table, after checking its keys."""
        if not isinstance(declared, Mapping):
            raise ConfigError(f"a reward is a number, a term's name or a table with an 'op'; got {declared!r:.80}")
        if "op" not in declared:
            known = ", ".join(sorted(self.ops))
            raise ConfigError(f"a reward table needs an 'op' (one of {known}); got {dict(declared)!r:.80}")
        name = declared["op"]
        if name not in self.ops:
            raise unknown("reward op", str(name), self.ops)
        op = self.ops[name]
        takes = (*op.required, *op.optional)
        for key in declared:
            if key != "op" and key not in takes:
                raise unknown(f"key of reward op {name!r}", key, takes)
        for key in op.required:
            if key not in declared:
                raise ConfigError(f"reward op {name!r} needs {key!r}; it takes {', '.join(takes)}")
        return op


# --- what ops share ---------------------------------------------------------------------------------------------


def finite(value: Any, what: str) -> float:
    """A finite number of a declaration, or `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what} of a reward is a finite number; got {value!r:.80}")
    return float(value)


def times(slope: float | None, factor: float) -> float | None:
    return None if slope is None else slope * factor


def children(declared: Table, key: str = "of") -> Sequence[Any]:
    """A list of parts, or `ConfigError`."""
    found = declared[key]
    if isinstance(found, (str, Mapping)) or not isinstance(found, Sequence) or not found:
        raise ConfigError(f"{key!r} of reward op {declared['op']!r} is a list of names or tables; got {found!r:.80}")
    return found


def tables(declared: Any) -> Iterator[Table]:
    """Every table inside a declaration, outermost first."""
    if isinstance(declared, Mapping):
        yield declared
        for value in declared.values():
            yield from tables(value)
    elif isinstance(declared, (list, tuple)):
        for value in declared:
            yield from tables(value)
