"""Public fakes: small environments and policies that are exact, fast and counted.

`CountingEnv` and `SimulatedPolicy` are also what the overhead benchmark runs, so they do the honest minimum: real
records, 220-character observations, 30 sampled ids and log-probs a turn.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from statistics import NormalDist
from types import TracebackType
from typing import Self

import numpy as np

from agentgym.env import SingleAgentEnv
from agentgym.errors import ConfigError, EnvironmentFault
from agentgym.policy import Policy, Scripted, left
from agentgym.seeding import key, rng, share
from agentgym.types import (
    Action,
    Episode,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Sampling,
    StepResult,
    Task,
    TokenSpan,
    VersionRun,
    say,
)

Latency = Callable[[float], float]
"""From a uniform number in [0, 1) to seconds: an inverse distribution function, so that a key draws the latency."""

FILLER = "Count on from the number you were given, one at a time, and say nothing else; words are ignored. "


# --- environments -----------------------------------------------------------------------------------------------


class CountingEnv(SingleAgentEnv):
    """The user names a number; a right reply is the next one. `turns` turns, observations of 220 characters.

    Each turn has the term `correct` (0 or 1), the last one also `finish` (the share that was right). `census` counts
    what was begun and closed in this and all spawned instances.
    """

    id = "counting-v0"
    version = "1"
    capabilities = frozenset({"replay", "fork", "ladder"})
    reward = {"op": "weighted_sum", "of": {"correct": 1.0, "finish": 1.0}}  # noqa: RUF012 - declared once, never changed

    def __init__(self, turns: int = 8, width: int = 220) -> None:
        if turns < 1:
            raise ConfigError(f"turns is at least 1; got {turns}")
        self.turns, self.width = turns, width
        self.census: Counter[str] = Counter()
        self.number = self.turn = self.right = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        for index in count():
            drawn = key(self.id, split, seed, index) >> 40
            yield Task(env=self.id, split=split, seed=drawn, payload={"start": drawn % 1000})

    async def begin(self, task: Task) -> Observation:
        self.census["begun"] += 1
        self.number, self.turn, self.right = int(task.payload["start"]), 0, 0
        return self._say()

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        correct = action.text.strip() == str(self.number + 1)
        self.turn, self.right, self.number = self.turn + 1, self.right + correct, self.number + 1
        paid = RewardTerm(name="correct", value=float(correct))
        if self.turn < self.turns:
            return self._say(), StepResult(rewards=(paid,))
        finish = RewardTerm(name="finish", value=self.right / self.turns, level="episode")
        solved = {"success": float(self.right == self.turns)}
        return None, StepResult(rewards=(paid, finish), terminated=True, metrics=solved)

    async def close(self) -> None:
        self.census["closed"] += 1

    def fork(self) -> Self:
        return self.spawn()

    def ladder(self) -> dict[str, Policy]:
        """ "random" says any number; "oracle" knows where it starts."""
        return {"random": Scripted(_random_counter), "oracle": Scripted(_perfect_counter)}

    def _say(self) -> Observation:
        text = f"The number is {self.number}. "
        return say(text + (FILLER * (self.width // len(FILLER) + 1))[: max(self.width - len(text), 0)])


def _random_counter(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    draw = rng("counter", episode.task.seed, episode.seed, episode.member)
    return lambda observation: Action(text=str(draw.randrange(1000)))


def _perfect_counter(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    numbers = count(int(episode.task.payload["start"]) + 1)
    return lambda observation: Action(text=str(next(numbers)))


class FlakyEnv(CountingEnv):
    """A counting environment that breaks or hangs in a share of its steps, drawn by (task, visit, turn).

    The first visit of a task draws other numbers than the second, so that most faults heal on a retry; with
    `persistent` they never do.
    """

    id = "flaky-v0"

    def __init__(
        self,
        turns: int = 8,
        *,
        raises: float = 0.0,
        hangs: float = 0.0,
        persistent: bool = False,
        error: Callable[[str], Exception] = EnvironmentFault,
    ) -> None:
        super().__init__(turns)
        self.raises, self.hangs, self.persistent, self.error = raises, hangs, persistent, error
        self.visits: Counter[str] = Counter()
        self.visit = ("", 0)

    async def begin(self, task: Task) -> Observation:
        name = task.id
        self.visits[name] += not self.persistent
        self.visit = (name, self.visits[name])
        return await super().begin(task)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        drawn = share("flaky", *self.visit, self.turn)
        if drawn < self.raises:
            raise self.error(f"broke on purpose in turn {self.turn}")
        if drawn < self.raises + self.hangs:
            await asyncio.get_running_loop().create_future()
        return await super().act(action)


# --- policies ---------------------------------------------------------------------------------------------------


LEFT = -1
"""In place of the turn number: this session was left."""


class FakePolicy:
    """Says these texts in order, in each episode from the first on, and the last one for ever.

    `opened` and `closed` count its sessions: they are equal when everything was released.
    """

    deterministic = True

    def __init__(self, texts: Sequence[str] = ("",)) -> None:
        if not texts:
            raise ConfigError("FakePolicy needs at least one text")
        self.texts = tuple(texts)
        self.opened = self.closed = 0

    def session(self, episode: Episode, agent: str) -> _FakeSession:
        return _FakeSession(self)


class _Counted:
    """A session whose policy counts how often it was opened and closed; it does not act once it was left."""

    __slots__ = ("policy", "turn")
    policy: FakePolicy | SimulatedPolicy
    turn: int

    async def __aenter__(self) -> Self:
        self.policy.opened += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.policy.closed += 1
        self.turn = LEFT


class _FakeSession(_Counted):
    __slots__ = ()
    policy: FakePolicy

    def __init__(self, policy: FakePolicy) -> None:
        self.policy, self.turn = policy, 0

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        if self.turn == LEFT:
            raise left()
        text = self.policy.texts[min(self.turn, len(self.policy.texts) - 1)]
        self.turn += 1
        return Action(text=text)


def constant(mean: float) -> Latency:
    """Always `mean` seconds; 0 is an instant policy, which still lets the loop turn once a turn."""
    return lambda uniform: mean


def lognormal(mean: float, sigma: float = 1.0) -> Latency:
    """Heavy-tailed: with sigma 1 the 99th percentile is 6.2 times the mean."""
    median, normal = mean * math.exp(-(sigma**2) / 2), NormalDist(0.0, sigma)
    return lambda uniform: median * math.exp(normal.inv_cdf(uniform)) if uniform > 0 else 0.0


def pareto(mean: float, alpha: float = 2.5, cap: float = 50.0) -> Latency:
    """Heavier still: P(latency > x) ~ x^-alpha, cut at `cap` means."""
    scale = mean * (alpha - 1) / alpha
    return lambda uniform: min(scale * (1 - uniform) ** (-1 / alpha), cap * mean)


LATENCIES: Mapping[str, Callable[[float], Latency]] = {"constant": constant, "lognormal": lognormal, "pareto": pareto}
"""Distributions by name, each from a mean in seconds."""


class SimulatedPolicy:
    """An engine without a model: `tokens` sampled ids with log-probs a turn, after a latency drawn by key.

    What is drawn depends on (seed, episode, agent, turn) alone. Ids lie in [0, 32000), log-probs in (-4, 0], and the
    text has about 110 characters, as a short model reply would. `version` is stamped on every span.
    """

    POOL = 1 << 16
    deterministic = True

    def __init__(
        self, latency: Latency | float = 0.0, tokens: int = 30, *, prompt: int = 55, seed: int = 0, version: int = 0
    ) -> None:
        if not 0 < tokens < self.POOL:
            raise ConfigError(f"tokens is between 1 and {self.POOL - 1}; got {tokens}")
        draw = np.random.default_rng(seed)
        self.latency = latency if callable(latency) else constant(latency)
        self.tokens, self.prompt, self.seed = tokens, prompt, seed
        self.versions = (VersionRun(start=0, version=version),)
        size = self.POOL + max(tokens, prompt)
        self.ids = draw.integers(0, 32000, size).astype("<i4").tobytes()
        self.logprobs = (-4 * draw.random(size)).astype("<f4").tobytes()
        self.reply = ("I have looked at what you said, and this is what I would do next. " * 2)[:110]
        self.opened = self.closed = 0

    def delay(self, episode: Episode, agent: str, turn: int) -> float:
        """The latency in seconds of this turn, known before it is played: what a list schedule is computed from."""
        return self.latency(_uniform(key(self.seed, episode.seed, episode.member, agent), turn))

    def session(self, episode: Episode, agent: str) -> _SimulatedSession:
        return _SimulatedSession(self, key(self.seed, episode.seed, episode.member, agent))


def _uniform(drawn: int, turn: int) -> float:
    """A number in [0, 1) from a 64-bit key and a turn: one round of splitmix64."""
    x = (drawn + (turn + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


class _SimulatedSession(_Counted):
    __slots__ = ("drawn",)
    policy: SimulatedPolicy

    def __init__(self, policy: SimulatedPolicy, drawn: int) -> None:
        self.policy, self.drawn, self.turn = policy, drawn, 0

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        if self.turn == LEFT:
            raise left()
        policy, uniform = self.policy, _uniform(self.drawn, self.turn)
        self.turn += 1
        await asyncio.sleep(policy.latency(uniform))
        at = 4 * int(uniform * policy.POOL)
        span = TokenSpan(
            prompt=Ids(policy.ids[at : at + 4 * policy.prompt]),
            ids=Ids(policy.ids[at : at + 4 * policy.tokens]),
            logprobs=Floats(policy.logprobs[at : at + 4 * policy.tokens]),
            versions=policy.versions,
            sampling=sampling,
            finish="stop",
        )
        return Action(text=policy.reply, span=span)
