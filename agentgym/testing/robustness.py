"""Actions nobody should take: random, garbage, injected, late. And what is left when the episode is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentgym.env import Environment
from agentgym.testing.actions import INJECTIONS, MARKER, RandomActions, function_of, garbage
from agentgym.testing.drive import Cast, Move, advance, begin, over, within
from agentgym.testing.report import CheckFailed, Skipped
from agentgym.testing.rules import sound_result
from agentgym.testing.subject import Subject
from agentgym.types import Action, Episode, Observation, Task, ToolCall

ACTIONS = 200
LEFT_OVER = 64 * 1024 * 1024
GROWTH = 64 * 1024


# --- strange actions --------------------------------------------------------------------------------------------


async def random_actions(subject: Subject) -> str:
    """200 random legal actions neither crash nor hang."""
    policy, done, episode = RandomActions(subject.env, subject.seed), 0, 0
    tasks = subject.tasks()
    while done < ACTIONS:
        copy = subject.env.spawn()
        try:
            seen = await begin(copy, tasks[episode % len(tasks)], subject.patience)
            key = Episode(task=tasks[episode % len(tasks)], seed=subject.seed + 1 + episode)
            async with Cast(policy, key, subject.patience) as cast:
                while seen and done < ACTIONS:
                    move = await advance(copy, await cast.act(seen, done), done, subject.patience)
                    sound_result(move.result, f"action {done}", subject.env.numeric)
                    done += 1
                    seen = {} if over(move.result) else move.result.observations
        finally:
            await within(copy.close(), subject.patience, "close")
        episode += 1
    return f"{done} actions in {episode} episodes"


async def garbage_actions(subject: Subject) -> str:
    """200 mistakes, two of them a megabyte long, are answered with a valid result each."""
    before = resident()
    moves = await feed(subject, garbage(subject.seed, await _tools(subject), ACTIONS))
    for number, move in enumerate(moves):
        sound_result(move.result, f"garbage action {number}", subject.env.numeric)
    grown = resident() - before
    if grown > LEFT_OVER:
        raise CheckFailed(f"the process grew by {grown >> 20} MiB over {ACTIONS} garbage actions")
    return f"{len(moves)} actions answered, process grew by {grown / 2**20:.1f} MiB"


async def injection(subject: Subject) -> str:
    """What an agent writes comes back, if at all, as plain content: never as a system or assistant message."""
    tools = await _tools(subject)
    names = [str(function_of(t)["name"]) for t in tools]
    for move in await feed(subject, _injected(names)):
        for agent, seen in move.result.observations.items():
            _refuse_injected(agent, seen)
    return f"{len(INJECTIONS)} kinds of markup stay content"


def _injected(names: Iterable[str]) -> Iterator[Action]:
    """The markup as text, as the name of a tool, as an argument of every tool."""
    for text in INJECTIONS:
        yield Action(text=text)
        yield Action(tool_calls=(ToolCall(name=text),))
        yield Action(tool_calls=tuple(ToolCall(name=n, arguments={"text": text, "query": text}) for n in names))


def _refuse_injected(agent: str, seen: Observation) -> None:
    for message in seen.messages:
        forged = message.role in ("system", "assistant") and MARKER in message.text
        if forged or any(MARKER in str(call) for call in message.tool_calls):
            raise CheckFailed(f"the agent's own words came back to {agent!r} as a message of role {message.role!r}")
    if any(MARKER in str(tool) for tool in seen.tools):
        raise CheckFailed(f"the agent's own words came back to {agent!r} as a tool schema")


async def _tools(subject: Subject) -> tuple[dict[str, Any], ...]:
    first = (await subject.play(subject.tasks(1)[0], subject.policy())).first
    return next((seen.tools for seen in first.values() if seen.tools), ())


async def feed(subject: Subject, actions: Iterable[Action]) -> list[Move]:
    """These actions one by one to whoever acts, in as many episodes as it takes, every episode closed."""
    moves: list[Move] = []
    supply = iter(actions)
    tasks = subject.tasks()
    while (following := next(supply, None)) is not None:
        copy = subject.env.spawn()
        try:
            seen = await begin(copy, tasks[len(moves) % len(tasks)], subject.patience)
            while following is not None:
                moves.append(await advance(copy, dict.fromkeys(seen, following), len(moves), subject.patience))
                seen = moves[-1].result.observations
                following = None if over(moves[-1].result) or not seen else next(supply, None)
        finally:
            await within(copy.close(), subject.patience, "close")
    return moves


async def after_end(subject: Subject) -> str:
    """A step after the end is refused, or changes and pays nothing; closing twice is safe."""
    trace = next((t for t in await subject.baseline() if t.ended), None)
    if trace is None:
        raise Skipped(f"no episode ended within {subject.steps} steps")
    copy = subject.env.spawn()
    await begin(copy, trace.task, subject.patience)
    for step, move in enumerate(trace.moves):
        await advance(copy, move.actions, step, subject.patience)
    answer = await _late(subject, copy, trace.moves[-1].actions)
    await within(copy.close(), subject.patience, "close")
    await within(copy.close(), subject.patience, "a second close")
    return f"a step after the end {answer}; closing twice is safe"


async def _late(subject: Subject, copy: Environment, actions: dict[str, Action]) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):
            async with asyncio.timeout(subject.patience):
                result = await copy.step(actions)
    except TimeoutError as error:
        raise CheckFailed(f"a step after the end takes longer than {subject.patience:g} s") from error
    except Exception as error:
        return f"is refused ({type(error).__name__})"
    if not over(result):
        raise CheckFailed("a step after the end goes on as if it had not ended")
    return "ends again"


# --- what is left -----------------------------------------------------------------------------------------------


async def close(subject: Subject) -> str:
    """Closed episodes, also unfinished and unbegun ones, leave no task, thread, open file or reference behind."""
    tasks, rounds = subject.tasks(), max(8, subject.episodes)
    for _ in range(2):
        await _short(subject, tasks[0], 3)
    before = await _held()
    alive = [await _short(subject, tasks[n % len(tasks)], n % 4) for n in range(rounds)]
    after = await _held()
    for what, count in after.items():
        if count - before[what] >= rounds // 2:
            raise CheckFailed(f"{rounds} closed episodes left {count - before[what]} {what} behind")
    kept = sum(ref is not None and ref() is not None for ref in alive)
    if kept > 1:
        raise CheckFailed(f"{kept} of {rounds} closed environments are still referenced after a garbage collection")
    counted = ", ".join(k for k in after)
    return f"{rounds} episodes closed at various points; {counted} and references released"


async def _short(subject: Subject, task: Task, steps: int) -> weakref.ref[Environment] | None:
    """Play some steps of an episode (0: only spawn and close it), close it, and return a weak reference to it."""
    copy = subject.env.spawn()
    try:
        if steps:
            seen = await begin(copy, task, subject.patience)
            async with Cast(subject.policy(), Episode(task=task, seed=subject.seed), subject.patience) as cast:
                for step in range(steps - 1):
                    move = await advance(copy, await cast.act(seen, step), step, subject.patience)
                    seen = move.result.observations
                    if over(move.result):
                        break
    finally:
        await within(copy.close(), subject.patience, "close")
    try:
        return weakref.ref(copy)
    except TypeError:
        return None


async def _held() -> dict[str, int]:
    """How many tasks, threads and open files there are now, once what just ended is gone."""
    for _ in range(3):
        await asyncio.sleep(0.01)
    gc.collect()
    return _counts(len(asyncio.all_tasks()))


def _counts(tasks: int) -> dict[str, int]:
    """Threads of the loop's own executor do not count; open files only where /proc lists them."""
    threads = sum(not t.name.startswith("asyncio_") for t in threading.enumerate())
    held = {"asyncio tasks": tasks, "threads": threads}
    files = Path("/proc/self/fd")
    return {**held, "open files": len(os.listdir(files))} if files.exists() else held


def resident() -> int:
    """Resident bytes of this process; 0 where /proc does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


async def memory(subject: Subject) -> str:
    """The same episodes again and again take no more memory: what the second round added, the third does not."""
    if tracemalloc.is_tracing():
        raise Skipped("tracemalloc is in use")
    began = time.perf_counter()
    await _round(subject)
    if (spent := time.perf_counter() - began) > subject.seconds / 24:
        raise Skipped(f"one round takes {spent:.1f} s: pass a larger `seconds` to have it repeated")
    tracemalloc.start()
    try:
        sizes = [await _round(subject) for _ in range(4)]
    finally:
        tracemalloc.stop()
    grown = [b - a for a, b in pairwise(sizes[1:])]
    if min(grown) > GROWTH:
        raise CheckFailed(f"every repetition of the same episodes keeps {min(grown) // 1024} KiB more")
    return f"a repetition keeps {max(0, min(grown)) / 1024:.0f} KiB more"


async def _round(subject: Subject) -> int:
    """Traced bytes after a round of ordinary and garbage episodes."""
    policy = subject.policy()
    for task in subject.tasks(min(4, subject.episodes)):
        await subject.play(task, policy)
    await feed(subject, garbage(subject.seed, await _tools(subject), 40))
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
