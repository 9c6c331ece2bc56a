"""Judging a policy: the figures of many episodes, with their uncertainty, and failures kept apart.

    evaluation = await evaluate(env, policy, split="test", episodes=200, seed=0, attempts=4)

Attempts at one task are not independent, so every interval here treats the task as the unit.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agentgym.env import Environment, task_list
from agentgym.errors import ConfigError
from agentgym.mixture import Composers, composers
from agentgym.policy import Policy
from agentgym.rollout import Limits, Runner, episodes
from agentgym.types import Record, Sampling, Trajectory

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


class Part(Record, frozen=True, kw_only=True):
    """The figures of those episodes that carry one label."""

    episodes: int
    success: float | None
    return_mean: float


class Evaluation(Record, frozen=True, kw_only=True):
    """What `evaluate` found. `episodes` counts outcomes; failures are in `failures` by kind and in no mean.

    success         share of outcomes that solved their task, None where the environment does not say;
                    `success_interval` is its 95 % interval (Wilson's, with the task as the unit)
    return_mean     of the declared composer; `return_se` is its standard error over tasks
    avg_at_k        mean over tasks of the share of attempts that succeed
    pass_all_k      Pass^k: share of tasks of which all k attempts succeed, among tasks without a failed attempt
    metrics         means of the environment's own figures
    by_label        label -> value -> figures of the episodes that carry it
    """

    env: str
    policy: str = ""
    split: str
    seed: int
    tasks: int
    attempts: int
    episodes: int
    success: float | None
    success_interval: tuple[float, float] | None
    return_mean: float
    return_se: float
    avg_at_k: float | None
    pass_all_k: float | None
    metrics: dict[str, float]
    by_label: dict[str, dict[str, Part]]
    failures: dict[str, int]
    turns: int
    turns_per_second: float
    seconds: float


async def evaluate(
    env: Environment,
    policy: Policy | Mapping[str, Policy],
    *,
    split: str = "test",
    episodes: int = 100,
    seed: int = 0,
    attempts: int = 1,
    concurrency: int = 64,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    seen: Callable[[Trajectory], None] | None = None,
) -> Evaluation:
    """Run `attempts` episodes on each of the first `episodes` tasks of the split; `seen` hears of each as it ends.

    The same (split, seed) means the same tasks, so policies are compared on equal ground.
    """
    if episodes < 1 or attempts < 1:
        raise ConfigError(f"an evaluation needs at least one episode and attempt, not {episodes} and {attempts}")
    started = time.perf_counter()
    runner = Runner(env, policy, concurrency=concurrency, limits=limits or Limits(), sampling=sampling)
    found: list[Trajectory] = []
    async for trajectory in runner.run(_episodes(env, split, seed, episodes, attempts)):
        found.append(trajectory)
        if seen:
            seen(trajectory)
    if not found:
        raise ConfigError(f"{env.id} has no task in the split {split!r}")
    found.sort(key=lambda t: t.episode.id)
    seconds = time.perf_counter() - started
    return summarise(found, composers(env), split=split, seed=seed, attempts=attempts, seconds=seconds)


def _episodes(env: Environment, split: str, seed: int, count: int, attempts: int) -> Iterable[Any]:
    return episodes(task_list(env, split, seed, count), group_size=attempts, seed=seed)


def summarise(
    trajectories: Sequence[Trajectory],
    reward: Mapping[str, Any] | Composers,
    *,
    split: str = "",
    seed: int = 0,
    attempts: int = 1,
    seconds: float = 0.0,
) -> Evaluation:
    """The figures of trajectories that are there already; `reward` declares their return, by domain where it must."""
    made = reward if isinstance(reward, Composers) else Composers(reward)
    outcomes = [t for t in trajectories if t.status != "failed"]
    values = [made.of(t).trajectory(t).value for t in outcomes]
    solved = [t.metrics["success"] for t in outcomes if "success" in t.metrics]
    by_task = _by_task(outcomes, values)
    rates = _by_task(outcomes, solved) if len(solved) == len(outcomes) else []
    turns = sum(len(t.turns) for t in outcomes)
    return Evaluation(
        env=trajectories[0].env if trajectories else "",
        split=split,
        seed=seed,
        tasks=len({t.task.id for t in trajectories}),
        attempts=attempts,
        episodes=len(outcomes),
        success=_mean(solved) if rates else None,
        success_interval=interval([_mean(r) for r in rates]) if rates else None,
        return_mean=_mean(values),
        return_se=standard_error([_mean(v) for v in by_task]),
        avg_at_k=_mean([_mean(r) for r in rates]) if rates else None,
        pass_all_k=_pass_all(rates, attempts) if rates else None,
        metrics=_means(outcomes),
        by_label=_by_label(outcomes, values),
        failures=dict(sorted(Counter(t.failure.kind for t in trajectories if t.failure is not None).items())),
        turns=turns,
        turns_per_second=turns / seconds if seconds else 0.0,
        seconds=seconds,
    )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; 0 when fewer than two are known."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def interval(rates: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of per-task success rates.

    Its count is the effective one, p (1 - p) / var(mean): the number of tasks at one attempt each, more when attempts
    at a task disagree. (Wilson 1927; the design effect as in Kish 1965.)
    """
    n, p = len(rates), float(np.mean(rates))
    variance = float(np.var(rates)) / n
    size = p * (1 - p) / variance if variance > 0 else float(n)
    centre = (p + Z * Z / (2 * size)) / (1 + Z * Z / size)
    half = Z / (1 + Z * Z / size) * math.sqrt(p * (1 - p) / size + Z * Z / (4 * size * size))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _by_task(trajectories: Sequence[Trajectory], values: Sequence[float]) -> list[list[float]]:
    """The values of each task's attempts, tasks in the order they come."""
    found: dict[str, list[float]] = defaultdict(list)
    for trajectory, value in zip(trajectories, values, strict=True):
        found[trajectory.task.id].append(value)
    return list(found.values())


def _pass_all(rates: Sequence[Sequence[float]], attempts: int) -> float | None:
    whole = [all(value >= 1.0 for value in task) for task in rates if len(task) == attempts]
    return _mean(whole) if whole else None


def _means(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.metrics.items():
            found[name].append(value)
    return {name: _mean(values) for name, values in sorted(found.items())}


def _by_label(trajectories: Sequence[Trajectory], values: Sequence[float]) -> dict[str, dict[str, Part]]:
    found: dict[str, dict[str, list[tuple[Trajectory, float]]]] = defaultdict(lambda: defaultdict(list))
    for trajectory, value in zip(trajectories, values, strict=True):
        for label, name in trajectory.labels.items():
            found[label][name].append((trajectory, value))
    return {
        label: {name: _part(pairs) for name, pairs in sorted(names.items())} for label, names in sorted(found.items())
    }


def _part(pairs: Sequence[tuple[Trajectory, float]]) -> Part:
    solved = [t.metrics["success"] for t, _ in pairs if "success" in t.metrics]
    return Part(
        episodes=len(pairs), success=_mean(solved) if solved else None, return_mean=_mean([v for _, v in pairs])
    )
