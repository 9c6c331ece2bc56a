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
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

from agentgym.errors import ConfigError, RecordError
from agentgym.rewards.composites import expanded
from agentgym.rewards.nodes import Builder, Declaration, Leaf, View, tables
from agentgym.rewards.ops import OPS
from agentgym.rewards.views import DERIVED, POTENTIAL_SUFFIXES, carried, derived
from agentgym.types import RewardTerm, Trajectory

TOLERANCE = 1e-9


class Composed(NamedTuple):
    """A composed ledger: `shares` align with the terms given; base + sum(shares) = value to 1e-9 relative.

    `extra` are those of the terms that the trajectory itself does not carry; their shares come last.
    """

    value: float
    base: float
    shares: tuple[float, ...]
    extra: tuple[RewardTerm, ...] = ()


class Composer:
    """A compiled declaration. `names` are the terms it reads, `derived` those of them that are worked out (see
    `agentgym.rewards.derived`); `additive`: every line counts by itself, whatever else is in the ledger. With `debug`
    every call checks the reconciliation."""

    def __init__(self, declaration: Declaration, *, debug: bool | None = None) -> None:
        builder = Builder(OPS)
        self.declaration = parsed(declaration)
        self._node = builder.node(self.declaration, 1.0)
        self._leaves, self._watchers = builder.leaves, tuple(builder.watchers)
        self._apart = frozenset(name for watcher in self._watchers for name in watcher.names)
        self.names = tuple(dict.fromkeys(leaf.name for leaf in self._leaves if leaf.name is not None))
        self.derived = tuple(name for name in self.names if name.startswith(DERIVED))
        self.additive = not builder.choices and all(
            leaf.slope is not None and not leaf.default for leaf in self._leaves
        )
        self.debug = os.environ.get("AGENTGYM_DEBUG") == "1" if debug is None else debug

    def compose(self, terms: Iterable[RewardTerm]) -> Composed:
        """Compose a ledger. Raises `RecordError` where a needed term is absent or a value is not finite."""
        ledger = tuple(terms)
        members = _members(ledger, self._apart)
        try:
            totals = {name: math.fsum(ledger[i].value for i in found) for name, found in members.items()}
            composed = self._attributed(ledger, members, View(totals))
        except OverflowError as error:
            raise RecordError(f"the composed reward is too large a number ({error})") from error
        if self.debug:
            check_reconciles(composed)
        return composed

    def trajectory(self, trajectory: Trajectory, extra: Sequence[RewardTerm] = ()) -> Composed:
        """Compose a trajectory's ledger and `extra` terms; shares are in the order of `trajectory.rewards`, then of
        `Composed.extra`: those given, and those read that can be worked out from the trajectory alone (`derived`,
        except policy.kl, and what the declaration's monitors and machines say)."""
        ledger = (*(term for _, term in carried(trajectory)), *extra)
        missing = set(self.names) - {term.name for term in ledger}
        found = tuple(term for term in self._worked_out(trajectory) if term.name in missing)
        return self.compose((*ledger, *found))._replace(extra=(*extra, *found))

    def _worked_out(self, trajectory: Trajectory) -> Iterator[RewardTerm]:
        if self.derived:
            yield from derived(trajectory)
        for watcher in self._watchers:
            yield from watcher.terms(trajectory)

    def _attributed(self, ledger: Sequence[RewardTerm], members: dict[str | None, list[int]], full: View) -> Composed:
        value = self._node(full)
        base = self._node(View(full.totals, 0, chosen=full.chosen))
        if not (math.isfinite(value) and math.isfinite(base)):
            raise RecordError(f"the composed reward is {value}; rewards are finite")
        shares = [0.0] * len(ledger)
        for leaf in self._leaves:
            if leaf.place in full.visited and leaf.name in members:
                _hand_out(leaf, self._owed(leaf, full), ledger, members[leaf.name], shares)
        return Composed(value, base, tuple(shares))

    def _owed(self, leaf: Leaf, full: View) -> float:
        """c_i of an occurrence by its definition; not needed where its slope is fixed."""
        if leaf.slope is not None:
            return leaf.slope * full.totals[leaf.name]
        with_it = self._node(View(full.totals, leaf.place + 1, chosen=full.chosen))
        return with_it - self._node(View(full.totals, leaf.place, chosen=full.chosen))


def _members(ledger: Sequence[RewardTerm], apart: Collection[str]) -> dict[str | None, list[int]]:
    """Indices of the terms of each name; under None those that `sum` counts, which leaves out names `apart`."""
    members: dict[str | None, list[int]] = {None: []}
    for i, term in enumerate(ledger):
        if not math.isfinite(term.value):
            raise RecordError(f"reward term {term.name!r} of turn {term.turn} is {term.value}; rewards are finite")
        if term.cause == "world":
            continue
        members.setdefault(term.name, []).append(i)
        if not (term.name.endswith(POTENTIAL_SUFFIXES) or term.name.startswith(DERIVED) or term.name in apart):
            members[None].append(i)
    return members


def _hand_out(leaf: Leaf, owed: float, ledger: Sequence[RewardTerm], found: list[int], shares: list[float]) -> None:
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
    return Composer(declaration, debug=debug)


def parsed(declaration: Declaration) -> Declaration:
    """A declaration with "sum", JSON text and composites written out as tables."""
    if declaration == "sum":
        return {"op": "sum"}
    if not isinstance(declaration, str) or not declaration.lstrip().startswith("{"):
        return cast(Declaration, expanded(declaration))
    try:
        return cast(Declaration, expanded(json.loads(declaration)))
    except json.JSONDecodeError as error:
        raise ConfigError(f"a reward declaration in text is JSON; {error}: {declaration!r:.80}") from error


def check_reconciles(composed: Composed) -> None:
    """Raise `RecordError` unless base + shares = value to 1e-9 relative (of the largest amount involved)."""
    found = math.fsum((composed.base, *composed.shares))
    size = max(abs(composed.value), abs(composed.base), *map(abs, composed.shares), 1e-300)
    if not abs(found - composed.value) <= TOLERANCE * size:
        raise RecordError(f"attribution does not add up: base + shares = {found!r}, value = {composed.value!r}")


def check_gamma(declaration: Declaration, gamma: float) -> None:
    """Refuse potential shaping with another discount than the learner's: only then does it leave the optimum alone
    (Ng, Harada, Russell 1999)."""
    for table in tables(parsed(declaration)):
        if table.get("op") == "potential" and table.get("gamma") != gamma:
            raise ConfigError(
                f"potential {table.get('name')!r} has gamma = {table.get('gamma')}, the learner has gamma = {gamma}; "
                f"set both to the same value"
            )
