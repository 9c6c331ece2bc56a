"""Replay: execute the actions of a recorded episode again and compare what the environment says to them.

    report = replay(trajectory)
    print(report)          # same: 12 turns, terminated   |   turn 3 (agent), observation: recorded '...', now '...'

It runs through the ordinary runner with a policy that says what was said, so there is no second rollout path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import msgspec

from agentgym.env import Environment
from agentgym.errors import EngineFault
from agentgym.policy import Scripted
from agentgym.registry import make
from agentgym.rollout import Limits, Runner
from agentgym.types import Action, Array, Episode, Observation, RewardTerm, Trajectory, Turn, iterate


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found. `difference` is the first one in words, empty where there is none.

    `turns` counts the turns that agree, from the first on. `played` is the episode as it went this time.
    """

    env: str
    turns: int
    difference: str = ""
    played: Trajectory

    @property
    def same(self) -> bool:
        return not self.difference

    def __bool__(self) -> bool:
        return self.same

    def __str__(self) -> str:
        if self.same:
            return f"{self.env}: same, {self.turns} turns, {self.played.status}"
        return f"{self.env}: differs after {self.turns} turns that agree: {self.difference}"


def replay(trajectory: Trajectory, env: Environment | None = None) -> ReplayReport:
    """Replay a trajectory; without `env`, in the environment of its id with the default config.

    Works also where an event loop is running (a notebook): there it uses a thread. In async code await `replaying`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(replaying(trajectory, env))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, replaying(trajectory, env)).result()


async def replaying(trajectory: Trajectory, env: Environment | None = None) -> ReplayReport:
    """The awaitable `replay`. Of a failed trajectory only the turns it has are compared."""
    env = env or make(trajectory.env)
    recorded = list(iterate(trajectory.turns))
    if not recorded:
        return ReplayReport(env=env.id, turns=0, played=trajectory)
    limits = Limits(max_turns=recorded[-1].step + 1)
    runner = Runner(env, recited(recorded), concurrency=1, retries=0, limits=limits)
    (played,) = await runner.collect([trajectory.episode])
    turns, difference = _compare(trajectory, recorded, played)
    if difference and env.version != trajectory.env_version:
        difference += f" (recorded with version {trajectory.env_version!r} of {env.id}, which is now {env.version!r})"
    return ReplayReport(env=env.id, turns=turns, difference=difference, played=played)


def recited(turns: list[Turn]) -> Scripted:
    """The policy that says what was said, agent by agent."""
    lines: dict[str, list[Action]] = {}
    for turn in turns:
        lines.setdefault(turn.agent, []).append(turn.action)

    def recite(actions: Iterator[Action]) -> Action:
        for action in actions:
            return action
        raise EngineFault("this agent acts more often than it did in the recording")

    def script(episode: Episode, agent: str) -> Callable[[Observation], Action]:
        actions = iter(lines.get(agent, ()))
        return lambda observation: recite(actions)

    return Scripted(script)


def _compare(before: Trajectory, recorded: list[Turn], now: Trajectory) -> tuple[int, str]:
    """(turns that agree, the first difference in words or "")."""
    for index, (old, new) in enumerate(zip_longest(recorded, iterate(now.turns))):
        found = _turn_difference(old, new, now)
        if found:
            return index, f"turn {index}{f' ({old.agent})' if old else ''}, {found}"
    if before.status != "failed":
        return len(recorded), _ending_difference(before, now)
    return len(recorded), ""


def _turn_difference(old: Turn | None, new: Turn | None, now: Trajectory) -> str:
    if new is None:
        why = f": {now.failure.message}" if now.failure else ""
        return f"ending: the recording goes on, the replay {now.status} here{why}"
    if old is None:
        return "ending: the recording ends here, the replay goes on"
    if (old.step, old.agent) != (new.step, new.agent):
        return f"who acts: recorded {old.agent!r} in step {old.step}, now {new.agent!r} in step {new.step}"
    paid = tuple(term for term in old.rewards if term.by == "environment")
    return _observation_difference(old.observation, new.observation) or _reward_difference(paid, new.rewards)


def _ending_difference(before: Trajectory, now: Trajectory) -> str:
    if before.status != now.status:
        why = f" ({now.failure.message})" if now.failure else ""
        return f"ending: recorded {before.status}, now {now.status}{why}"
    for agent in sorted(before.final.keys() | now.final.keys()):
        old, new = before.final.get(agent, Observation()), now.final.get(agent, Observation())
        found = _observation_difference(old, new)
        if found:
            return f"final {found}"
    if before.metrics != now.metrics:
        return f"metrics: recorded {before.metrics}, now {now.metrics}"
    return ""


def _observation_difference(old: Observation, new: Observation) -> str:
    if old == new:
        return ""
    for name, a, b in (("array", old.array, new.array), ("action mask", old.action_mask, new.action_mask)):
        if a != b:
            return f"observation {name}: recorded {_numbers(a)}, now {_numbers(b)}"
    if old.messages != new.messages:
        return _text_difference("observation", _transcript(old), _transcript(new))
    return _text_difference("observation tools or anchor", f"{old.tools} {old.anchor}", f"{new.tools} {new.anchor}")


def _numbers(array: Array | None) -> str:
    return "none" if array is None else " ".join(str(array.numpy()).split())[:120]


def _transcript(observation: Observation) -> str:
    return "\n".join(f"{m.role}: {m.text}{m.tool_calls or ''}" for m in observation.messages)


def _text_difference(what: str, old: str, new: str) -> str:
    """The surroundings of the first character that differs."""
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    here = slice(max(at - 20, 0), at + 40)
    return f"{what}: recorded {old[here]!r}, now {new[here]!r} (character {at})"


def _reward_difference(old: tuple[RewardTerm, ...], new: tuple[RewardTerm, ...]) -> str:
    for a, b in zip_longest(old, new):
        if a != b:
            return f"reward: recorded {_term(a)}, now {_term(b)}"
    return ""


def _term(term: RewardTerm | None) -> str:
    return "none" if term is None else f"{term.name} = {term.value!r} ({term.level}, turn {term.turn}, {term.agent})"
