"""Driving an environment by hand, through its protocol alone, and comparing what came of it in words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from agentgym.env import Environment
from agentgym.policy import Policy, Session
from agentgym.seeding import digest
from agentgym.testing.report import CheckFailed, describe
from agentgym.types import Action, Episode, Observation, Record, RewardTerm, StepResult, Task, encode

T = TypeVar("T")


class Move(Record, frozen=True, kw_only=True):
    """What the agents did at one step and what the environment answered (without `info`, which is not recorded)."""

    actions: dict[str, Action]
    result: StepResult


class Trace(Record, frozen=True, kw_only=True):
    """An episode as it passed through the door of the environment."""

    task: Task
    first: dict[str, Observation]
    moves: tuple[Move, ...] = ()

    @property
    def ended(self) -> bool:
        return bool(self.moves) and over(self.moves[-1].result)

    @property
    def digest(self) -> str:
        """A content hash: the same episode has the same one in any process."""
        return digest(encode(self)).hex()

    @property
    def ledger(self) -> list[RewardTerm]:
        """Every reward term in order, with its turn filled in as the runner does: agents of a step in their order."""
        found: list[RewardTerm] = []
        turn = 0
        for move in self.moves:
            index = {agent: turn + i for i, agent in enumerate(move.actions)}
            found += [r if r.turn >= 0 else r.replace(turn=index.get(r.agent, turn)) for r in move.result.rewards]
            turn += len(move.actions)
        return found

    @property
    def observations(self) -> list[dict[str, Observation]]:
        return [self.first, *(m.result.observations for m in self.moves)]


def over(result: StepResult) -> bool:
    """Whether the episode ends with this result."""
    return result.terminated or result.truncated


class Cast:
    """The sessions of one episode, opened as agents appear and all left together."""

    def __init__(self, policy: Policy, episode: Episode, patience: float) -> None:
        self.policy, self.episode, self.patience = policy, episode, patience
        self.stack = AsyncExitStack()
        self.sessions: dict[str, Session] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await within(self.stack.__aexit__(kind, error, trace), self.patience, "leaving the sessions")

    async def act(self, observations: Mapping[str, Observation], step: int) -> dict[str, Action]:
        """One action for every agent that was given an observation."""
        for agent in observations:
            if agent not in self.sessions:
                entry = self.stack.enter_async_context(self.policy.session(self.episode, agent))
                self.sessions[agent] = await within(entry, self.patience, f"entering the session of {agent!r}")
        return {
            agent: await within(self.sessions[agent].act(seen), self.patience, f"step {step}: the policy of {agent!r}")
            for agent, seen in observations.items()
        }


async def within(work: Awaitable[T], seconds: float, what: str) -> T:
    """The awaited result; `CheckFailed` that says where when it raises or takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await work
    except Exception as error:
        if limit.expired():
            raise CheckFailed(f"{what} takes longer than {seconds:g} s") from error
        raise CheckFailed(f"{what} raised {describe(error)}") from error


async def begin(env: Environment, task: Task, patience: float) -> dict[str, Observation]:
    return await within(env.reset(task), patience, f"reset to task {task.id}")


async def advance(env: Environment, actions: Mapping[str, Action], step: int, patience: float) -> Move:
    """One step, as a `Move`; then the loop is given to whoever else runs."""
    result = await within(env.step(actions), patience, f"step {step} ({gist(actions)})")
    await asyncio.sleep(0)
    return Move(actions=dict(actions), result=result.replace(info={}))


async def drive(
    env: Environment,
    task: Task,
    policy: Policy,
    *,
    seed: int = 0,
    steps: int = 64,
    patience: float = 5.0,
) -> Trace:
    """One episode on a fresh spawn, cut after `steps` steps, closed whatever happens.

    `patience` is the deadline in seconds of every single call. Any error becomes a `CheckFailed` that names the step.
    """
    copy = env.spawn()
    moves: list[Move] = []
    try:
        async with Cast(policy, Episode(task=task, seed=seed), patience) as cast:
            first = seen = await begin(copy, task, patience)
            while seen and len(moves) < steps and not (moves and over(moves[-1].result)):
                actions = await cast.act(seen, len(moves))
                moves.append(await advance(copy, actions, len(moves), patience))
                seen = moves[-1].result.observations
    finally:
        await within(copy.close(), patience, "close")
    return Trace(task=task, first=first, moves=tuple(moves))


async def rerun(env: Environment, task: Task, actions: Sequence[Mapping[str, Action]], patience: float = 5.0) -> Trace:
    """The same actions again on a fresh spawn, until they or the episode end."""
    copy = env.spawn()
    try:
        first = await begin(copy, task, patience)
        moves = await follow(copy, actions, patience)
    finally:
        await within(copy.close(), patience, "close")
    return Trace(task=task, first=first, moves=moves)


async def follow(
    env: Environment, actions: Iterable[Mapping[str, Action]], patience: float, start: int = 0
) -> tuple[Move, ...]:
    """Step a running episode through these actions; stops where it ends."""
    moves: list[Move] = []
    for step, chosen in enumerate(actions, start):
        moves.append(await advance(env, chosen, step, patience))
        if over(moves[-1].result):
            break
    return tuple(moves)


def gist(actions: Mapping[str, Action]) -> str:
    """Actions in a few words, safe to print whatever they hold."""
    words = ", ".join(f"{agent}: {_brief(action)}" for agent, action in actions.items())
    return words[:160] + ("..." if len(words) > 160 else "")


def _brief(action: Action) -> str:
    if action.array is not None:
        return f"array {action.array.dtype}{list(action.array.shape)}"
    if action.tool_calls:
        return f"call {action.tool_calls[0].name[:40]!a}({str(action.tool_calls[0].arguments)[:80]!a})"
    return f"text {action.text[:60]!a}"


# --- differences in words ---------------------------------------------------------------------------------------


def same(one: Trace, other: Trace, what: str) -> None:
    """`CheckFailed` with the first difference of two traces: at which step, in which field, and both values."""
    found = difference(plain(one), plain(other))
    if found:
        raise CheckFailed(f"task {one.task.id}: {what}: {found}")


def plain(record: Record) -> Any:
    """A record as builtins, defaults included."""
    return msgspec.msgpack.decode(encode(record))


def difference(one: Any, other: Any, path: str = "") -> str:
    """The first difference of two plain values, in words; "" where there is none. The order of keys counts."""
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) ^ set(other):
            missing = sorted(map(str, set(one) ^ set(other)))[0]
            return f"{spoken(path)}: only one of them has {missing!r}"
        inner = (difference(one[k], other[k], f"{path}.{k}") for k in one)
        found = next(filter(None, inner), "")
        if not found and list(one) != list(other):
            return f"{spoken(path)}: the keys come in another order, {list(one)} and {list(other)}"
        return found
    if isinstance(one, list) and isinstance(other, list):
        inner = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=False)))
        unequal = f"{spoken(path)}: {len(one)} items and {len(other)}" if len(one) != len(other) else ""
        return next(filter(None, inner), unequal)
    if (one == other and type(one) is type(other)) or (one != one and other != other):
        return ""
    return f"{spoken(path)}: {_apart(one, other)}"


def _apart(one: Any, other: Any) -> str:
    if not (isinstance(one, str) and isinstance(other, str)):
        return f"{str(one)[:80]} and {str(other)[:80]}"
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"from character {at} on, {one[max(0, at - 15) : at + 25]!r} and {other[max(0, at - 15) : at + 25]!r}"


def spoken(path: str) -> str:
    """`.moves[3].result.observations.agent` as "after step 3, observations.agent"."""
    if path.startswith(".first"):
        return f"in the first observations{path[6:].replace('.', ', ', 1)}"
    if path.startswith(".moves["):
        step, _, rest = path[7:].partition("]")
        return f"at step {step}, {rest.removeprefix('.').removeprefix('result.')}"
    return path.removeprefix(".").replace("moves", "number of steps") or "as a whole"
