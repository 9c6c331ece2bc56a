"""Lagrange multipliers of a declaration: read, replaced, and moved by what constraints cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentgym.errors import ConfigError, unknown
from agentgym.rewards.compose import Composer, parsed
from agentgym.rewards.nodes import Declaration, tables
from agentgym.rewards.ops.sums import Constraint, constraints
from agentgym.types import RewardTerm


def _constraints(declaration: Declaration) -> dict[str, Constraint]:
    found: dict[str, Constraint] = {}
    for table in tables(parsed(declaration)):
        if table.get("op") == "lagrangian":
            for name, constraint in constraints(table).items():
                if name in found:
                    raise ConfigError(f"two constraints are called {name!r}; give one another name and say its 'cost'")
                found[name] = constraint
    return found


def multipliers(declaration: Declaration) -> dict[str, float]:
    """The multipliers of every `lagrangian` in a declaration, by the constraint's name."""
    return {name: constraint.multiplier for name, constraint in _constraints(declaration).items()}


def with_multipliers(declaration: Declaration, values: Mapping[str, float]) -> Declaration:
    """The declaration with other multipliers. Raises `UnknownName` for a constraint that it has not."""
    known = multipliers(declaration)
    for name in values:
        if name not in known:
            raise unknown("constraint", name, known)
    changed: Declaration = _put(parsed(declaration), values)
    return changed


def _put(declared: Any, values: Mapping[str, float]) -> Any:
    if isinstance(declared, (list, tuple)):
        return [_put(part, values) for part in declared]
    if not isinstance(declared, Mapping):
        return declared
    changed = {key: _put(part, values) for key, part in declared.items()}
    if declared.get("op") == "lagrangian":
        changed["constraints"] = {
            name: {**table, "multiplier": values[name]} if name in values else table
            for name, table in changed["constraints"].items()
        }
    return changed


class Dual:
    """Dual ascent on the constraints of a declaration, once per optimiser step:

        multiplier <- clip(multiplier + lr (mean cost - target), 0, max)

    the rule of the objective's controllers. `costs` measures, `update` moves, `composer` is the reward of the moment;
    `state` and `restore` carry it through a checkpoint. On several ranks average the costs first.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._found = _constraints(declaration)
        self._costs = {n: Composer(n if c.cost is None else c.cost) for n, c in self._found.items()}
        self._declared = declaration
        self.restore(multipliers(declaration))

    def costs(self, ledgers: Iterable[Sequence[RewardTerm]]) -> dict[str, float]:
        """The mean of every constraint's cost over whole ledgers (derived terms included); no ledgers, no costs."""
        held = list(ledgers)
        if not held:
            return {}
        return {n: sum(c.compose(terms).value for terms in held) / len(held) for n, c in self._costs.items()}

    def update(self, costs: Mapping[str, float]) -> dict[str, float]:
        """Move the multipliers of these constraints by their costs; all multipliers afterwards."""
        moved = self.state()
        for name, cost in costs.items():
            if name not in self._found:
                raise unknown("constraint", name, self._found)
            c = self._found[name]
            moved[name] = min(max(moved[name] + c.lr * (cost - c.target), 0.0), c.max)
        self.restore(moved)
        return moved

    def state(self) -> dict[str, float]:
        """The multipliers by name."""
        return multipliers(self.declaration)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from these multipliers."""
        self.declaration = with_multipliers(self._declared, state)
        self.composer = Composer(self.declaration)
