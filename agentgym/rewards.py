"""From a ledger of named reward terms to one number, and back: who is owed which part of it.

A declaration is a plain table, as a TOML file holds it:

    {"op": "gate", "when": "valid", "at_least": 1, "otherwise": -1.0,
     "then": {"op": "weighted_sum", "bias": 0.5, "of": {"quality": 0.35, "efficiency": 0.15}}}

Terms of one name are totalled. Where a name stands in the declaration it is an occurrence; the occurrences x_1..x_n,
in the order of the declaration, are owed c_i = f(x_1..x_i, rest neutral) - f(x_1..x_(i-1), rest neutral). Neutral is
0, in a product 1, in the condition of a gate "passes". So a gate charges the first occurrence that fails it; `min`
charges its argmin. f(all neutral) is the base: base + all shares = value. An occurrence's part goes to the terms of
its name in proportion to their values, or to the last of them where proportions mean nothing (zeros, mixed signs
under a non-linear operation).

Terms with cause "world" are recorded and never counted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.types import RewardTerm, Trajectory, Turns

Declaration = Mapping[str, Any] | str | float
POTENTIAL_SUFFIXES = (".before", ".after", ".drift")
TOLERANCE = 1e-9


class Composed(NamedTuple):
    """A composed ledger: `shares` align with the terms given; base + sum(shares) = value to 1e-9 relative."""

    value: float
    base: float
    shares: tuple[float, ...]


# --- evaluation -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _View:
    """A ledger with its first `active` occurrences known and the rest neutral.

    `visited` collects the occurrences that the full evaluation read, `chosen` the argmin of every `min` in it.
    """

    totals: Mapping[str | None, float]
    active: float = math.inf
    visited: set[int] = field(default_factory=set)
    chosen: dict[int, int] = field(default_factory=dict)


_Node = Callable[[_View], float]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """One occurrence. `name` None stands for the whole ledger; `slope` is d value / d total where that is fixed.

    An absent term with a default is a constant: it has nobody to charge, so it belongs to the base.
    """

    place: int
    name: str | None
    neutral: float
    slope: float | None
    default: float | None

    def __call__(self, view: _View) -> float:
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


class _Builder:
    """Compiles a declaration; numbers its occurrences in order."""

    def __init__(self) -> None:
        self.leaves: list[_Leaf] = []
        self.minima = 0

    def leaf(self, name: str | None, neutral: float, slope: float | None, default: float | None = None) -> _Leaf:
        made = _Leaf(len(self.leaves), name, neutral, slope, default)
        self.leaves.append(made)
        return made

    def node(self, declared: Any, slope: float | None, neutral: float = 0.0) -> _Node:
        """A number, a term's name, or a table with an `op`."""
        if isinstance(declared, (int, float)) and not isinstance(declared, bool):
            constant = _finite(declared, "a constant")
            return lambda view: constant
        if isinstance(declared, str):
            return self.leaf(declared, neutral, slope)
        op = _op_of(declared)
        if declared["op"] == "term":
            default = _finite(declared["default"], "'default'") if "default" in declared else None
            return self.leaf(declared["name"], neutral, slope, default)
        return op.build(self, declared, slope)


class _Op(NamedTuple):
    build: Callable[[_Builder, Mapping[str, Any], float | None], _Node]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def _op_of(declared: Any) -> _Op:
    """The operation of a table, after checking its keys."""
    if not isinstance(declared, Mapping):
        raise ConfigError(f"a reward is a number, a term's name or a table with an 'op'; got {declared!r:.80}")
    if "op" not in declared:
        raise ConfigError(
            f"a reward table needs an 'op' (one of {', '.join(sorted(_OPS))}); got {dict(declared)!r:.80}"
        )
    name = declared["op"]
    if name not in _OPS:
        raise unknown("reward op", str(name), _OPS)
    op = _OPS[name]
    takes = (*op.required, *op.optional)
    for key in declared:
        if key != "op" and key not in takes:
            raise unknown(f"key of reward op {name!r}", key, takes)
    for key in op.required:
        if key not in declared:
            raise ConfigError(f"reward op {name!r} needs {key!r}; it takes {', '.join(takes)}")
    return op


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what} of a reward is a finite number; got {value!r:.80}")
    return float(value)


def _times(slope: float | None, factor: float) -> float | None:
    return None if slope is None else slope * factor


def _children(declared: Mapping[str, Any]) -> Sequence[Any]:
    found = declared["of"]
    if isinstance(found, (str, Mapping)) or not isinstance(found, Sequence) or not found:
        raise ConfigError(f"'of' of reward op {declared['op']!r} is a list of names or tables; got {found!r:.80}")
    return found


# --- operations: each compiles one table ------------------------------------------------------------------------


def _sum(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    return b.leaf(None, 0.0, slope)


def _weighted_sum(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    bias = _finite(d.get("bias", 0.0), "'bias'")
    of = d.get("of", {})
    if not isinstance(of, Mapping) or not (of or d.get("plus")):
        raise ConfigError(f"'of' of a weighted_sum is a table of name = weight; got {of!r:.80}")
    parts: list[tuple[float, _Node]] = []
    for name, weight in of.items():
        if isinstance(weight, Mapping):
            parts.append((1.0, b.node(weight, slope)))
        else:
            w = _finite(weight, f"the weight of {name!r}")
            parts.append((w, b.leaf(name, 0.0, _times(slope, w))))
    parts += [(1.0, b.node(more, slope)) for more in d.get("plus", ())]
    return lambda view: bias + sum(w * part(view) for w, part in parts)


def _gate(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    if ("at_least" in d) == ("at_most" in d):
        raise ConfigError("a gate needs 'at_least' or 'at_most', and not both")
    sign = 1.0 if "at_least" in d else -1.0
    bound = sign * _finite(d["at_least" if sign > 0 else "at_most"], "the bound of a gate")
    when = b.node(d["when"], None, neutral=sign * math.inf)
    if not isinstance(when, _Leaf):
        raise ConfigError(f"'when' of a gate is a term's name; got {d['when']!r:.80}")
    then, otherwise = b.node(d["then"], slope), b.node(d["otherwise"], slope)
    return lambda view: then(view) if sign * when(view) >= bound else otherwise(view)


def _min(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    parts = [b.node(part, slope) for part in _children(d)]
    me = b.minima
    b.minima += 1

    def least(view: _View) -> float:
        if me in view.chosen:
            return parts[view.chosen[me]](view)
        before = set(view.visited)
        tried = [(part(view), i) for i, part in enumerate(parts)]
        view.chosen[me] = min(tried)[1]
        view.visited = before
        return parts[view.chosen[me]](view)

    return least


def _product(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    parts = [b.node(part, None, neutral=1.0) for part in _children(d)]
    return lambda view: math.prod(part(view) for part in parts)


def _lexicographic(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    """sum_i q_i (n+1)^-i over its largest value: q_i is part i, clipped to [0, 1] and rounded down to n levels (the
    last part is not rounded), so one level of an earlier part outweighs everything after it."""
    parts = [b.node(part, None) for part in _children(d)]
    levels: int = d.get("levels", 10)
    if not isinstance(levels, int) or levels < 1:
        raise ConfigError(f"'levels' of a lexicographic reward is a whole number from 1; got {levels!r:.80}")
    weights = [math.pow(levels + 1, -i) for i in range(len(parts))]
    whole = sum(weights)

    def ordered(view: _View) -> float:
        clipped = [min(max(part(view), 0.0), 1.0) for part in parts]
        steps = [math.floor(x * levels + 1e-9) / levels for x in clipped[:-1]]
        return sum(w * x for w, x in zip(weights, (*steps, clipped[-1]), strict=True)) / whole

    return ordered


def _mean_minus_variance(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    """UWO (2310.02743): mean - lambda var. The paper's code uses ddof 0 for best-of-n and 1 for PPO: choose."""
    parts = [b.node(part, None) for part in _children(d)]
    weight = _finite(d["lambda"], "'lambda'")
    ddof: int = d.get("ddof", 0)
    if ddof not in (0, 1) or len(parts) <= ddof:
        raise ConfigError(f"'ddof' is 0 or 1 and below the number of parts ({len(parts)}); got {ddof!r}")

    def cautious(view: _View) -> float:
        values = [part(view) for part in parts]
        mean = sum(values) / len(values)
        return mean - weight * sum((x - mean) ** 2 for x in values) / (len(values) - ddof)

    return cautious


def _power(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    part = b.node(d["of"], None)
    exponent = _finite(d["exponent"], "'exponent'")
    factor = _finite(d.get("scale", 1.0), "'scale'")
    if exponent <= 0:
        raise ConfigError(f"'exponent' is above 0; got {exponent}")

    def powered(view: _View) -> float:
        x = part(view)
        if x < 0 and not exponent.is_integer():
            raise RecordError(f"{x} to the power of {exponent} is no real number; keep {d['of']!r:.40} at 0 or above")
        return float(factor * x**exponent)

    return powered


def _scale(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    factor, offset = _finite(d["factor"], "'factor'"), _finite(d.get("offset", 0.0), "'offset'")
    part = b.node(d["of"], _times(slope, factor))
    return lambda view: offset + factor * part(view)


def _relative_to_baseline(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    part, baseline = b.node(d["of"], slope), b.node(d["baseline"], _times(slope, -1.0))
    return lambda view: part(view) - baseline(view)


def _potential(b: _Builder, d: Mapping[str, Any], slope: float | None) -> _Node:
    """Sum over turns of gamma Phi_(t+1) - Phi_t, from the terms `name.after` and `name.before`."""
    gamma = _finite(d["gamma"], "'gamma'")
    before = b.leaf(f"{d['name']}.before", 0.0, _times(slope, -1.0))
    after = b.leaf(f"{d['name']}.after", 0.0, _times(slope, gamma))
    return lambda view: gamma * after(view) - before(view)


_OPS: dict[str, _Op] = {
    "sum": _Op(_sum),
    "term": _Op(_sum, ("name",), ("default",)),
    "weighted_sum": _Op(_weighted_sum, (), ("of", "bias", "plus")),
    "gate": _Op(_gate, ("when", "then", "otherwise"), ("at_least", "at_most")),
    "min": _Op(_min, ("of",)),
    "product": _Op(_product, ("of",)),
    "lexicographic": _Op(_lexicographic, ("of",), ("levels",)),
    "mean_minus_variance": _Op(_mean_minus_variance, ("of", "lambda"), ("ddof",)),
    "power": _Op(_power, ("of", "exponent"), ("scale",)),
    "scale": _Op(_scale, ("of", "factor"), ("offset",)),
    "relative_to_baseline": _Op(_relative_to_baseline, ("of", "baseline")),
    "potential": _Op(_potential, ("name", "gamma")),
}


# --- the composer -----------------------------------------------------------------------------------------------


class Composer:
    """A compiled declaration. `names` are the terms it reads; with `debug` every call checks the reconciliation."""

    def __init__(self, declaration: Declaration, *, debug: bool | None = None) -> None:
        builder = _Builder()
        self.declaration = declaration
        self._node = builder.node(declaration, 1.0)
        self._leaves = builder.leaves
        self.names = tuple(dict.fromkeys(leaf.name for leaf in self._leaves if leaf.name is not None))
        self.debug = os.environ.get("AGENTGYM_DEBUG") == "1" if debug is None else debug

    def compose(self, terms: Iterable[RewardTerm]) -> Composed:
        """Compose a ledger. Raises `RecordError` where a needed term is absent or a value is not finite."""
        ledger = tuple(terms)
        members = _members(ledger)
        totals = {name: math.fsum(ledger[i].value for i in found) for name, found in members.items()}
        full = _View(totals)
        value = self._node(full)
        base = self._node(_View(totals, 0, chosen=full.chosen))
        shares = [0.0] * len(ledger)
        for leaf in self._leaves:
            if leaf.place in full.visited and leaf.name in members:
                _hand_out(leaf, self._owed(leaf, full), ledger, members[leaf.name], shares)
        composed = Composed(value, base, tuple(shares))
        if self.debug:
            check_reconciles(composed)
        return composed

    def trajectory(self, trajectory: Trajectory) -> Composed:
        """Compose a trajectory's ledger; shares are in the order of `trajectory.rewards`."""
        return self.compose(term for _, term in carried(trajectory))

    def _owed(self, leaf: _Leaf, full: _View) -> float:
        """c_i of an occurrence by its definition; not needed where its slope is fixed."""
        if leaf.slope is not None:
            return leaf.slope * full.totals[leaf.name]
        with_it = self._node(_View(full.totals, leaf.place + 1, chosen=full.chosen))
        return with_it - self._node(_View(full.totals, leaf.place, chosen=full.chosen))


def _members(ledger: Sequence[RewardTerm]) -> dict[str | None, list[int]]:
    """Indices of the terms of each name; under None those that `sum` counts."""
    members: dict[str | None, list[int]] = {None: []}
    for i, term in enumerate(ledger):
        if not math.isfinite(term.value):
            raise RecordError(f"reward term {term.name!r} of turn {term.turn} is {term.value}; rewards are finite")
        if term.cause == "world":
            continue
        members.setdefault(term.name, []).append(i)
        if not term.name.endswith(POTENTIAL_SUFFIXES):
            members[None].append(i)
    return members


def _hand_out(leaf: _Leaf, owed: float, ledger: Sequence[RewardTerm], found: list[int], shares: list[float]) -> None:
    """Add an occurrence's part to the shares of its terms."""
    if leaf.slope is not None:
        for i in found:
            shares[i] += leaf.slope * ledger[i].value
        return
    values = [ledger[i].value for i in found]
    total = math.fsum(values)
    if total == 0.0 or min(values) < 0.0 < max(values):
        shares[found[-1]] += owed
        return
    for i, value in zip(found, values, strict=True):
        shares[i] += owed * (value / total)


def composer(declaration: Declaration, *, debug: bool | None = None) -> Composer:
    """Compile a declaration: a table, its JSON text, `"sum"`, or the name of a term.

    `debug` (default: whether AGENTGYM_DEBUG=1) checks the reconciliation on every call.
    """
    if declaration == "sum":
        declaration = {"op": "sum"}
    elif isinstance(declaration, str) and declaration.lstrip().startswith("{"):
        try:
            declaration = cast(Declaration, json.loads(declaration))
        except json.JSONDecodeError as error:
            raise ConfigError(f"a reward declaration in text is JSON; {error}: {declaration!r:.80}") from error
    return Composer(declaration, debug=debug)


def check_reconciles(composed: Composed) -> None:
    """Raise `RecordError` unless base + shares = value to 1e-9 relative (of the largest amount involved)."""
    found = math.fsum((composed.base, *composed.shares))
    size = max(abs(composed.value), abs(composed.base), *map(abs, composed.shares), 1e-300)
    if not abs(found - composed.value) <= TOLERANCE * size:
        raise RecordError(f"attribution does not add up: base + shares = {found!r}, value = {composed.value!r}")


def check_gamma(declaration: Declaration, gamma: float) -> None:
    """Refuse potential shaping with another discount than the learner's: only then does it leave the optimum alone
    (Ng, Harada, Russell 1999)."""
    for table in _tables(declaration):
        if table.get("op") == "potential" and table.get("gamma") != gamma:
            raise ConfigError(
                f"potential {table.get('name')!r} has gamma = {table.get('gamma')}, the learner has gamma = {gamma}; "
                f"set both to the same value"
            )


def _tables(declared: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(declared, Mapping):
        yield declared
        for value in declared.values():
            yield from _tables(value)
    elif isinstance(declared, (list, tuple)):
        for value in declared:
            yield from _tables(value)


# --- views of a composed ledger ---------------------------------------------------------------------------------


def carried(trajectory: Trajectory) -> Iterator[tuple[int, RewardTerm]]:
    """(index of the turn that carries it, term) for all of `trajectory.rewards`; columns need not build their turns."""
    turns = trajectory.turns
    if isinstance(turns, Turns):
        yield from ((i, term) for i, turn in enumerate(turns.items) for term in turn.rewards)
        return
    amounts = {agent: {n: x.numpy().tolist() for n, x in c.rewards.items()} for agent, c in turns.agents.items()}
    for i, (_, agent, row) in enumerate(turns.order):
        for name, values in amounts[agent].items():
            if values[row] == values[row]:
                yield i, RewardTerm(name=name, value=values[row], turn=i, agent=agent)


def turn_of(trajectory: Trajectory) -> NDArray[np.intp]:
    """The turn each term of `trajectory.rewards` counts for: the one it names, else the one that carries it. [terms]

    Raises `RecordError` where a term names a turn that does not exist.
    """
    turns = len(trajectory.turns)
    found = [i if term.turn < 0 else term.turn for i, term in carried(trajectory)]
    if found and max(found) >= turns:
        raise RecordError(f"a reward term names turn {max(found)}, the trajectory has {turns}")
    return np.asarray(found, np.intp)


def by_turn(composed: Composed, trajectory: Trajectory) -> NDArray[np.float64]:
    """The shares summed by turn: [turns]. Their sum is value - base; the base belongs to no turn."""
    turns = turn_of(trajectory)
    if len(turns) != len(composed.shares):
        raise RecordError(f"{len(composed.shares)} shares for the {len(turns)} reward terms of this trajectory")
    return np.bincount(turns, np.asarray(composed.shares), minlength=len(trajectory.turns)).astype(
        np.float64, copy=False
    )


def explain(composed: Composed, terms: Iterable[RewardTerm]) -> str:
    """The composed ledger as a table for people: every term, what it was and what it is owed."""
    rows = [("turn", "agent", "term", "value", "share")]
    for term, share in zip(terms, composed.shares, strict=True):
        name = term.name if term.cause == "policy" else f"{term.name} ({term.cause})"
        where = "" if term.turn < 0 else str(term.turn)
        rows.append((where, term.agent, name, f"{term.value:.4g}", f"{share:+.4g}"))
    rows += [("", "", "base", "", f"{composed.base:+.4g}"), ("", "", "value", "", f"{composed.value:+.4g}")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
