"""What a step of training looks like in numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from agentgym.types import Trajectory
from agentgym_trainers.rollouts import Sample

Figures = dict[str, float]


def outcomes(samples: Sequence[Sample]) -> Figures:
    """Means over the episodes that did not fail: return, the environment's own figures; and how many failed."""
    good = [s for s in samples if s.value is not None]
    values = [s.value for s in good if s.value is not None]
    found = {"return": _mean(values), "return_std": float(np.std(values)) if values else 0.0}
    found |= means(s.trajectory for s in good)
    return {**found, "episodes": float(len(good)), "failed": float(len(samples) - len(good))}


def means(trajectories: Iterable[Trajectory]) -> Figures:
    """Mean of each metric over the episodes that have it."""
    held: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.metrics.items():
            held[name].append(value)
    return {name: _mean(values) for name, values in sorted(held.items())}


def success_valid(trajectories: Iterable[Trajectory]) -> float | None:
    """Success among the episodes that broke no rule of the environment (all, where it does not say)."""
    valid = [t for t in trajectories if t.status != "failed" and t.metrics.get("valid", 1.0) >= 1.0]
    held = [t.metrics["success"] for t in valid if "success" in t.metrics]
    return _mean(held) if held else None


def speed(samples: Sequence[Sample], playing: float, learning: float) -> Figures:
    """Seconds by side, and tokens sampled."""
    sampled = sum(len(span.ids) for s in samples for _, span in s.trajectory.spans)
    return {
        "seconds_rollout": playing,
        "seconds_learn": learning,
        "sampled_tokens": float(sampled),
        "sampled_per_second": sampled / playing if playing else 0.0,
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
