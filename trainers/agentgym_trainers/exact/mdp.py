"""Enumerable environments: a handful of states, at most three turns, every trajectory known with its probability.

    found = mdp.paths                      # every trajectory there is
    chances = mdp.chances(log_policy)      # and how likely each is

States and actions are single words, and tokens: the observation is the state's word, the reply the action's. Where a
move has a `fault`, the environment breaks there with that probability, which is nobody's outcome.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from agentgym import seeding
from agentgym.env import SingleAgentEnv
from agentgym.errors import EnvironmentFault
from agentgym.rewards import Composer, composer
from agentgym.types import (
    Action,
    Episode,
    Failure,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Sampling,
    StepResult,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
    say,
)

Real = NDArray[np.float64]
TRUTH = "outcome"
"""The reward term that is what the task is really about; others only stand for it."""


class Move(NamedTuple):
    """Where an action leads ("" ends the episode), what it pays, and how likely the environment breaks instead."""

    to: str = ""
    pay: Mapping[str, float] = {}
    fault: float = 0.0


class Path(NamedTuple):
    """One trajectory: the decisions made (state, action), whether it broke in the last one, and how likely that is
    given the decisions."""

    prompt: int
    decisions: tuple[tuple[int, int], ...]
    failed: bool = False
    chance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MDP:
    """An acyclic, deterministic world. `prompts` are the start states, equally likely. S states, A actions, P paths.

    `reward` declares what is optimised where a method says nothing else; the truth is the sum of the term `TRUTH`.
    """

    name: str
    about: str
    prompts: tuple[str, ...]
    moves: Mapping[str, Mapping[str, Move]]
    reward: dict[str, Any] = field(default_factory=lambda: {"op": "term", "name": TRUTH, "default": 0.0})

    @functools.cached_property
    def states(self) -> tuple[str, ...]:
        return tuple(self.moves)

    @functools.cached_property
    def actions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(action for moves in self.moves.values() for action in moves))

    @functools.cached_property
    def legal(self) -> NDArray[np.bool_]:
        """[S, A]: which actions a state offers."""
        return np.asarray([[a in self.moves[s] for a in self.actions] for s in self.states])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Token ids are places in this tuple: states first, then actions."""
        return (*self.states, *self.actions)

    def move(self, state: int, action: int) -> Move:
        return self.moves[self.states[state]][self.actions[action]]

    # --- every trajectory ---

    @functools.cached_property
    def paths(self) -> tuple[Path, ...]:
        """Every trajectory, prompt by prompt, those that break included."""
        starts = enumerate(self.states.index(word) for word in self.prompts)
        return tuple(path for prompt, state in starts for path in self._walk(Path(prompt, ()), state))

    def _walk(self, sofar: Path, state: int) -> Iterator[Path]:
        for action in np.flatnonzero(self.legal[state]).tolist():
            move, decisions = self.move(state, action), (*sofar.decisions, (state, action))
            if move.fault:
                yield Path(sofar.prompt, decisions, True, sofar.chance * move.fault)
            ahead = Path(sofar.prompt, decisions, False, sofar.chance * (1.0 - move.fault))
            yield from self._walk(ahead, self.states.index(move.to)) if move.to else (ahead,)

    @functools.cached_property
    def visits(self) -> Real:
        """[P, K, S, A]: 1 where turn k of the path is that decision."""
        turns = max(len(path.decisions) for path in self.paths)
        found = np.zeros((len(self.paths), turns, *self.legal.shape))
        for p, path in enumerate(self.paths):
            for k, (state, action) in enumerate(path.decisions):
                found[p, k, state, action] = 1.0
        return found

    def chances(self, log_policy: Real) -> Real:
        """[P]: how likely each path is, given its prompt; they sum to 1 for each prompt."""
        logs = np.einsum("pksa,sa->p", self.visits, np.where(self.legal, log_policy, 0.0))
        found: Real = np.exp(logs) * np.asarray([path.chance for path in self.paths])
        return found

    def intended(self, log_policy: Real) -> Real:
        """[P]: how likely each path would be if nothing ever broke."""
        whole = np.asarray([0.0 if path.failed else 1.0 / path.chance for path in self.paths])
        return self.chances(log_policy) * whole

    # --- exact values of the truth ---

    def value(self, log_policy: Real) -> Real:
        """[S]: the expected true return from each state on, by dynamic programming, if nothing ever broke."""
        policy = np.where(self.legal, np.exp(log_policy), 0.0)
        return self._backwards(lambda state, ahead: float(policy[state, self.legal[state]] @ ahead))

    def best(self) -> Real:
        """[S]: the largest true return from each state on."""
        return self._backwards(lambda state, ahead: float(ahead.max()))

    def optimal(self) -> NDArray[np.intp]:
        """[S]: a best action in each state."""
        best = self.best()
        choices = ((np.flatnonzero(self.legal[s]), self._ahead(s, best)) for s in range(len(self.states)))
        return np.asarray([actions[ahead.argmax()] for actions, ahead in choices])

    def _backwards(self, fold: Callable[[int, Real], float]) -> Real:
        """States are declared before those they lead to, so one pass from the last to the first is enough."""
        found = np.zeros(len(self.states))
        for state in reversed(range(len(self.states))):
            found[state] = fold(state, self._ahead(state, found))
        return found

    def _ahead(self, state: int, values: Real) -> Real:
        """The true return behind each action that the state offers, given the values of the later states."""
        moves = (self.move(state, action) for action in np.flatnonzero(self.legal[state]).tolist())
        return np.asarray([m.pay.get(TRUTH, 0.0) + (values[self.states.index(m.to)] if m.to else 0.0) for m in moves])

    def mean(self, values: Real) -> float:
        """The mean of values [S] over the prompts."""
        return float(np.mean([values[self.states.index(word)] for word in self.prompts]))

    # --- records ---

    def task(self, prompt: int, seed: int = 0, split: str = "train") -> Task:
        word = self.prompts[prompt]
        return Task(
            env=f"exact-{self.name}-v0",
            split=split,
            seed=seed,
            payload={"prompt": word},
            labels={"prompt": word, "domain": word},
        )

    def record(self, path: Path, *, group: str = "", member: int = 0, seed: int = 0) -> Trajectory:
        """The trajectory that the runner records where this path is played: a turn that breaks is not part of it."""
        episode = Episode(task=self.task(path.prompt), seed=seed, member=member, group=group)
        kept = path.decisions[:-1] if path.failed else path.decisions
        return Trajectory(
            env=episode.task.env,
            episode=episode,
            turns=Turns(items=tuple(self._turn(k, *decision) for k, decision in enumerate(kept))),
            status="failed" if path.failed else "terminated",
            failure=Failure(kind="environment", message="broken", step=len(kept)) if path.failed else None,
            metrics={} if path.failed else self._metrics(path),
            labels=episode.task.labels,
        )

    def _turn(self, k: int, state: int, action: int) -> Turn:
        pay = self.move(state, action).pay
        return Turn(
            step=k,
            agent="agent",
            observation=self.look(state),
            action=self.reply(state, action, 0.0),
            rewards=tuple(RewardTerm(name=n, value=v, turn=k, agent="agent") for n, v in pay.items()),
        )

    def _metrics(self, path: Path) -> dict[str, float]:
        truth = sum(self.move(*decision).pay.get(TRUTH, 0.0) for decision in path.decisions)
        return self.metrics(path.prompt, truth)

    def metrics(self, prompt: int, truth: float) -> dict[str, float]:
        """Of an episode that came to its end: its true return, and whether no other could have been better."""
        best = self.best()[self.states.index(self.prompts[prompt])]
        return {"truth": truth, "success": float(truth >= best - 1e-9)}

    def look(self, state: int) -> Observation:
        word = self.states[state]
        return say(word).replace(anchor=word)

    def reply(self, state: int, action: int, logprob: float, version: int = 0) -> Action:
        """The action with the tokens behind it: the state's word as prompt, its own as the one sampled token."""
        span = TokenSpan(
            prompt=Ids([state]),
            ids=Ids([len(self.states) + action]),
            logprobs=Floats([logprob]),
            versions=(VersionRun(start=0, version=version),),
            finish="stop",
        )
        return Action(text=self.actions[action], span=span)

    @functools.cached_property
    def composer(self) -> Composer:
        return composer(self.reward)


def log_policy(theta: Real, legal: NDArray[np.bool_]) -> Real:
    """log softmax over the legal actions: [S, A], -inf where an action is not offered."""
    logits = np.where(legal, theta, -np.inf)
    top = logits.max(-1, keepdims=True)
    found: Real = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return found


# --- as an environment, and a policy that plays it --------------------------------------------------------------


class ExactEnv(SingleAgentEnv):
    """An MDP as an environment. A reply that is no legal action ends the episode with nothing paid."""

    mdp: ClassVar[MDP]
    version = "1"

    def __init__(self) -> None:
        self.faults = count()  # shared by all that is spawned: another attempt is another draw

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (self.mdp.task(i % len(self.mdp.prompts), seed + i, split) for i in count())

    async def begin(self, task: Task) -> Observation:
        self.task, self.paid = task, 0.0
        self.prompt = self.mdp.prompts.index(task.payload["prompt"])
        self.state = self.mdp.states.index(self.mdp.prompts[self.prompt])
        return self.mdp.look(self.state)

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        move = self.mdp.moves[self.mdp.states[self.state]].get(action.text.strip(), Move())
        if move.fault and seeding.share(self.task.seed, "fault", next(self.faults)) < move.fault:
            raise EnvironmentFault("broken")
        self.paid += move.pay.get(TRUTH, 0.0)
        rewards = tuple(RewardTerm(name=name, value=value) for name, value in move.pay.items())
        if move.to:
            self.state = self.mdp.states.index(move.to)
            return self.mdp.look(self.state), StepResult(rewards=rewards)
        metrics = self.mdp.metrics(self.prompt, self.paid)
        return None, StepResult(rewards=rewards, terminated=True, metrics=metrics)

    def vocabulary(self) -> list[str]:
        return list(self.mdp.vocabulary)


def environment(mdp: MDP) -> ExactEnv:
    """This MDP as an environment of its own id."""
    fields = {"id": f"exact-{mdp.name}-v0", "mdp": mdp, "reward": mdp.reward, "__doc__": mdp.about}
    kind: type[ExactEnv] = type("ExactEnv", (ExactEnv,), fields)
    return kind()


class Tabular:
    """A policy with a table of logits `theta` [S, A]; what it samples hangs on (seed, member, turn), as engines do."""

    def __init__(self, mdp: MDP, theta: Real) -> None:
        self.mdp, self.theta, self.version = mdp, theta, 0

    def session(self, episode: Episode, agent: str) -> TabularSession:
        return TabularSession(self, episode)


class TabularSession:
    """One episode of a `Tabular` policy."""

    def __init__(self, policy: Tabular, episode: Episode) -> None:
        self.policy, self.episode, self.turn = policy, episode, 0
        mdp = policy.mdp
        own = episode.guidance.sampling if episode.guidance else None
        self.sampling = own or Sampling()
        self.logs = log_policy(policy.theta, mdp.legal)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        mdp, state = self.policy.mdp, self.policy.mdp.states.index(observation.messages[-1].text)
        action = self._choose(self.logs[state], sampling or self.sampling)
        self.turn += 1
        return mdp.reply(state, action, float(self.logs[state, action]), self.policy.version)

    def _choose(self, logs: Real, sampling: Sampling) -> int:
        if sampling.temperature == 0.0:
            return int(logs.argmax())
        drawn = seeding.share(self.episode.seed, self.episode.member, "action", self.turn)
        return int(np.searchsorted(np.cumsum(np.exp(logs)), drawn, side="right").clip(max=len(logs) - 1))
