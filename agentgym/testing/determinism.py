"""The same task always gives the same episode: in two copies, in another order, in another process."""

from __future__ import annotations

import asyncio
from typing import Any

from agentgym.rollout import Limits, Runner
from agentgym.seeding import rng
from agentgym.testing.drive import difference, plain, same
from agentgym.testing.report import CheckFailed, Skipped
from agentgym.testing.subject import Subject, splits
from agentgym.testing.trace import compare_lines, printed, run_elsewhere
from agentgym.types import Episode, Task, Trajectory, decode, encode

STREAM = 64
"""Tasks of a split that are looked at."""
ENDLESS = 4096
"""A split with as many tasks is taken for a stream; a smaller one is a list, and may be the same for every seed."""


async def tasks(subject: Subject) -> str:
    """Task streams repeat, survive the disk, and share no task between splits."""
    owners: dict[str, str] = {}
    found = splits(subject.env)
    for split in found:
        stream = subject.tasks(STREAM, split)
        _repeats(stream, subject.tasks(STREAM, split), split)
        for number, task in enumerate(stream):
            content = task.replace(split="").id
            if owners.setdefault(content, split) != split:
                raise CheckFailed(f"task {number} of split {split!r} is also in split {owners[content]!r}")
    return f"{len(owners)} distinct tasks in {', '.join(found)}"


def _repeats(stream: list[Task], again: list[Task], split: str) -> None:
    if not stream:
        raise CheckFailed(f"the split {split!r} holds no task")
    apart = difference([plain(t) for t in stream], [plain(t) for t in again])
    if apart:
        raise CheckFailed(f"the same (split, seed) gives two streams: split {split!r}, task {apart}")
    for number, task in enumerate(stream):
        if task.split != split:
            raise CheckFailed(f"task {number} of split {split!r} says it is of split {task.split!r}")
        if encode(decode(encode(task), Task)) != encode(task):
            raise CheckFailed(f"task {number} of split {split!r} does not come back from the disk as it went there")


async def same_seed(subject: Subject) -> str:
    """Two copies of the environment, one after the other, in one process."""
    policy = subject.policy()
    for trace in await subject.baseline():
        same(trace, await subject.play(trace.task, policy), "two runs with the same seed differ")
    traces = subject.traces
    return f"{len(traces)} episodes, {sum(len(t.moves) for t in traces)} steps, twice the same"


async def different_seeds(subject: Subject) -> str:
    """Another seed gives other tasks, and other tasks give other episodes."""
    one, other = subject.tasks(STREAM), subject.tasks(STREAM, seed=subject.seed + 1)
    if len(one) > 1 and [t.id for t in one] == [t.id for t in other] and len(subject.tasks(ENDLESS)) == ENDLESS:
        raise CheckFailed(f"the seeds {subject.seed} and {subject.seed + 1} give the same {len(one)} tasks")
    distinct = {trace.replace(task=Task(env="")).digest for trace in await subject.baseline()}
    if len(distinct) < 2 <= len({t.id for t in subject.tasks()}):
        raise CheckFailed(f"{len(subject.traces)} different tasks give one and the same episode")
    return f"{len(distinct)} different episodes of {len(subject.traces)}"


async def concurrency(subject: Subject) -> str:
    """All episodes at once and shuffled, step by step in turn by hand and through the runner."""
    traces = list(await subject.baseline())
    rng(subject.seed, "shuffle").shuffle(traces)
    policy = subject.policy()
    found = await asyncio.gather(*(subject.play(t.task, policy) for t in traces))
    for alone, together in zip(traces, found, strict=True):
        same(alone, together, "an episode alone and one beside others differ")
    tasks = [t.task for t in traces]
    await _runner_agrees(subject, tasks)
    return f"{len(traces)} episodes interleaved by hand and in the runner"


async def _runner_agrees(subject: Subject, tasks: list[Task]) -> None:
    """The runner with one slot in order, and with a slot for each episode in another order."""
    wanted = [Episode(task=task, seed=subject.seed) for task in tasks]
    one = await _collect(subject, wanted, 1)
    other = reversed(await _collect(subject, wanted[::-1], len(wanted)))
    for a, b in zip(one, other, strict=True):
        apart = difference(plain(a.content()), plain(b.content()))
        if apart:
            raise CheckFailed(f"task {a.task.id}: one slot and {len(wanted)} slots of the runner differ: {apart}")


async def _collect(subject: Subject, wanted: list[Episode], concurrency: int) -> list[Trajectory]:
    limits = Limits(turn_seconds=subject.patience, max_turns=subject.steps)
    runner = Runner(subject.env, subject.policy(), concurrency=concurrency, limits=limits, retries=0)
    found = await runner.collect(wanted)
    for trajectory in found:
        if trajectory.failure is not None:
            raise CheckFailed(f"task {trajectory.task.id} failed in the runner: {trajectory.failure.message}")
    return found


async def two_processes(subject: Subject) -> str:
    """Two fresh processes with different hash seeds print the same episodes, and the same as this one."""
    if not subject.processes:
        raise Skipped("processes=False")
    jobs: list[Any] = [asyncio.to_thread(run_elsewhere, subject, seed) for seed in (1, 2)]
    one, other = await asyncio.gather(*jobs)
    compare_lines(one, other, "two processes with different PYTHONHASHSEED differ")
    compare_lines(one, printed(await subject.baseline()), "a fresh process and this one differ")
    return f"digest {one[-1][12:28]} in both"
