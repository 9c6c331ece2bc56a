"""`agentgym eval`."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import msgspec

from agentgym import presets
from agentgym.cli import policies
from agentgym.cli.environments import make, settings_of
from agentgym.cli.output import Bar, emit, err, out, table
from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym.evaluation import Evaluation, evaluate
from agentgym.figures import figure, percent
from agentgym.policy import Policy
from agentgym.types import Sampling, Trajectory


def run_eval(options: Namespace) -> int:
    """Exit code 1 when not one episode became an outcome."""
    settings = settings_of(options, "env", "policy", "sampling")
    trained = policies.trained_with(options.policy)
    env = make(options.id, presets.merge(_own(trained, "env", options.id), settings["env"]))
    policy = policies.resolve(env, options.policy, {**policies.rendering(trained), **settings["policy"]})
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        stack.callback(getattr(policy, "close", lambda: None))
        bar = stack.enter_context(Bar(f"eval {options.id}", options.episodes * options.attempts))

        def seen(trajectory: Trajectory) -> None:
            bar.advance()
            if trajectory.failure is not None:
                reasons.setdefault(trajectory.failure.kind, trajectory.failure.message)

        found = asyncio.run(
            _judge(
                env,
                policy,
                split=options.split,
                episodes=options.episodes,
                seed=options.seed,
                attempts=options.attempts,
                concurrency=options.concurrency,
                sampling=sampling({**trained.get("sampling", {}), **settings["sampling"]}),
                seen=seen,
            )
        )
    for kind, message in reasons.items():
        err().print(f"failed ({kind}): {message}", style="dim", markup=False)
    found = found.replace(policy=options.policy)
    emit(found) if options.json else show(found)
    return 0 if found.episodes else 1


async def _judge(env: Environment, policy: Policy, **asked: Any) -> Evaluation:
    """`evaluate`; a policy with an `aclose` holds something of the event loop, and lets go of it there."""
    async with AsyncExitStack() as stack:
        if hasattr(policy, "aclose"):
            stack.push_async_callback(policy.aclose)
        return await evaluate(env, policy, **asked)


def _own(trained: Mapping[str, Any], section: str, id: str) -> presets.Table:
    """The run's section about this environment; {} when it was trained in another one."""
    table: presets.Table = dict(trained.get(section, {}))
    return table if table.get("id") == id else {}


def sampling(settings: Mapping[str, Any]) -> Sampling | None:
    """How to draw tokens, from `--set sampling.temperature=0.5`; None where nothing was said."""
    if not settings:
        return None
    presets.sections({key: {} for key in settings}, Sampling.__struct_fields__)
    try:
        return msgspec.convert(dict(settings), Sampling, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"sampling: {error}") from error


def show(found: Evaluation) -> None:
    """The figures for a person."""
    console = out()
    console.print(table(f"{found.env}, {found.policy} on {found.split!r}", ("figure", "value"), _rows(found)), "")
    for label, parts in found.by_label.items():
        rows = [(name, p.episodes, percent(p.success), p.return_mean) for name, p in parts.items()]
        console.print(table("", (label, "episodes", "success", "return"), rows), "")
    if found.metrics:
        console.print(table("", ("metric", "mean"), found.metrics.items()), "")
    if found.failures:
        console.print(table("", ("failure (in no mean)", "episodes"), found.failures.items()), "")


def _rows(found: Evaluation) -> list[tuple[str, str]]:
    rows = [("episodes", f"{found.episodes} on {found.tasks} tasks, {found.turns} turns")]
    if found.success is not None and found.success_interval is not None:
        low, high = found.success_interval
        rows.append(("success", f"{percent(found.success)}  (95 %: {percent(low)} to {percent(high)})"))
    rows.append(("return", f"{figure(found.return_mean)} ± {figure(found.return_se)} (standard error)"))
    if found.attempts > 1:
        rows.append((f"Avg@{found.attempts}", percent(found.avg_at_k)))
        rows.append((f"Pass^{found.attempts}", percent(found.pass_all_k)))
    rows.append(("speed", f"{found.turns_per_second:.0f} turns/s, {found.seconds:.1f} s"))
    return rows
