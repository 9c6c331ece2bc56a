"""What a step of training looks like in numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from agentgym.mixture import DOMAIN, domain_of
from agentgym.policy import Load
from agentgym.types import Trajectory
from agentgym_trainers.rollouts import Sample, oldest

Figures = dict[str, float]


def outcomes(samples: Sequence[Sample]) -> Figures:
    """Means over the episodes that did not fail: return, the environment's own figures, none where all did; and how
    many failed."""
    good = [s for s in samples if s.value is not None]
    values = [s.value for s in good if s.value is not None]
    found = {"return": _mean(values), "return_std": float(np.std(values))} if values else {}
    found |= means(s.trajectory for s in good)
    return {**found, "episodes": float(len(good)), "failed": float(len(samples) - len(good)), **by_domain(samples)}


def by_domain(samples: Sequence[Sample]) -> Figures:
    """domain/NAME/figure, where tasks name their domain: return and success of the episodes that did not fail, their
    number, and the domain's share of all episodes, failed ones too."""
    held: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        held[domain_of(sample.trajectory)].append(sample)
    found: Figures = {}
    for name in sorted(held.keys() - {""}):
        good = [s for s in held[name] if s.value is not None]
        told = {"episodes": float(len(good)), "share": len(held[name]) / len(samples)}
        told |= {"return": _mean([s.value for s in good if s.value is not None])} if good else {}
        told |= {n: x for n, x in means(s.trajectory for s in good).items() if n == "success"}
        found |= {f"{DOMAIN}/{name}/{figure}": value for figure, value in told.items()}
    return found


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


def speed(samples: Sequence[Sample], seconds: Mapping[str, float]) -> Figures:
    """Seconds of an update by what the learner's side did, and tokens sampled for it, over all of them."""
    sampled = sum(len(span.ids) for s in samples for _, span in s.trajectory.spans)
    return {
        **{f"seconds_{what}": spent for what, spent in seconds.items()},
        "sampled_tokens": float(sampled),
        "sampled_per_second": sampled / max(sum(seconds.values()), 1e-9),
    }


def staleness(samples: Sequence[Sample], version: int) -> Figures:
    """By how many updates the oldest weights that sampled a trajectory were behind `version`, who learnt from it."""
    ages = [version - oldest(s.trajectory, version) for s in samples if s.value is not None]
    return {"staleness": _mean(ages), "staleness_max": float(max(ages, default=0))}


def busy(load: Load) -> Figures:
    """The engine at the end of an update."""
    return {
        "engine_running": float(load.running),
        "engine_waiting": float(load.waiting),
        "engine_cache": load.cache,
    }


def became(counts: Mapping[str, int]) -> Figures:
    """What became of the run's trajectories so far: learnt from, or left out and why (failures have a figure)."""
    left = {name: float(counts.get(name, 0)) for name in ("stale", "equal", "aside")}
    return {"consumed": float(counts.get("consumed", 0)), **{f"dropped.{why}": n for why, n in left.items() if n}}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
