"""S8: what moves an objective's own numbers, once per optimiser step, by figures that all ranks share.

Pure functions of the declaration: the state of a controller is the number it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from agentgym_trainers.objective.declare import AdaptiveCoef, Dual, Kind, Objective, Schedule
from agentgym_trainers.objective.paths import get, put


def begun(objective: Objective) -> Objective:
    """The objective of the first step: every schedule at its start."""
    for c in objective.controllers:
        if isinstance(c, Schedule):
            objective = put(objective, c.of, c.start)
    return objective


def controlled(objective: Objective, steps: int, figures: Mapping[str, float]) -> Objective:
    """The objective of the next step, `steps` of them being done, the last one with these figures."""
    for c in objective.controllers:
        objective = put(objective, c.of, _MOVES[type(c)](c, get(objective, c.of), steps, figures))
    return objective


def numbers(objective: Objective) -> dict[str, float]:
    """What the controllers hold, by path."""
    return {c.of: get(objective, c.of) for c in objective.controllers}


def with_numbers(objective: Objective, held: Mapping[str, float]) -> Objective:
    """The inverse of `numbers`."""
    for path, value in held.items():
        objective = put(objective, path, value)
    return objective


def _schedule(c: Schedule, number: float, steps: int, figures: Mapping[str, float]) -> float:
    share = min(steps / c.steps, 1.0)
    if c.form == "inverse":
        return c.start / (1.0 + share * (c.start / c.end - 1.0))
    return c.start * (c.end / c.start) ** share if c.form == "geometric" else c.start + share * (c.end - c.start)


def _adaptive(c: AdaptiveCoef, number: float, steps: int, figures: Mapping[str, float]) -> float:
    """PPO's adaptive KL as verl has it: the error is clipped to +-0.2."""
    error = min(max(figures[c.watch] / c.target - 1.0, -0.2), 0.2)
    return number * (1.0 + error / c.horizon)


def _dual(c: Dual, number: float, steps: int, figures: Mapping[str, float]) -> float:
    return min(max(number + c.lr * (figures[c.watch] - c.target), 0.0), c.max)


_MOVES: dict[type[Kind], Callable[[Any, float, int, Mapping[str, float]], float]] = {
    Schedule: _schedule,
    AdaptiveCoef: _adaptive,
    Dual: _dual,
}
