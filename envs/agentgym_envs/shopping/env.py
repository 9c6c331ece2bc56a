"""`shopping-v0`: a user who wants something, a shop that has it, and an agent between them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec

from agentgym.env import SingleAgentEnv
from agentgym.errors import ConfigError
from agentgym.policy import Policy, Scripted
from agentgym.seeding import key
from agentgym.types import Action, Episode, Observation, StepResult, Task
from agentgym_envs.shopping import answers, hints, ladder, tasks
from agentgym_envs.shopping.catalogue import Catalogue
from agentgym_envs.shopping.compact import Compact
from agentgym_envs.shopping.config import Config, config
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.full import Full
from agentgym_envs.shopping.lexicon import Lexicon
from agentgym_envs.shopping.load import read
from agentgym_envs.shopping.reward import HRM, Verdict, hrm, judge, terms
from agentgym_envs.shopping.search import Index, SearchBackend
from agentgym_envs.shopping.surfaces import Surface
from agentgym_envs.shopping.synthetic import synthetic


class World:
    """Everything heavy and immutable: catalogue, index, words, task maker. One per config and process."""

    def __init__(self, options: Config, catalogue: Catalogue | None = None, index: SearchBackend | None = None) -> None:
        self.options = options
        self.catalogue = catalogue or _catalogue(options)
        self.index: SearchBackend = index or Index(self.catalogue, text=options.surface == "full")
        self.lexicon = Lexicon(self.catalogue)
        self.maker = tasks.Maker(self.catalogue, options)

    def desk(self, task: Task) -> Desk:
        brief = tasks.brief_of(task, self.catalogue)
        return Desk.open(self.catalogue, self.index, brief, key(task.seed, "user"), self.options.results)

    def surface(self) -> Surface:
        return Compact(self.lexicon) if self.options.surface == "compact" else Full()


def _catalogue(options: Config) -> Catalogue:
    whole = _read(options) if options.catalogue else synthetic(options.size, options.seed, options.buckets)
    return whole.keep(options.slots) if options.slots else whole


def _read(options: Config) -> Catalogue:
    return read(
        options.catalogue,
        delimiter=options.delimiter,
        columns=options.columns,
        encoding=options.encoding,
        quote=options.quote,
        buckets=options.buckets,
    )


def world(options: Config) -> World:
    """The world of these options, made once per process (a changed catalogue file makes another)."""
    path = Path(options.catalogue)
    stamp = path.stat().st_mtime_ns if options.catalogue and path.is_file() else 0
    return _world(msgspec.json.encode(options), stamp)


@lru_cache(maxsize=8)
def _world(encoded: bytes, stamp: int) -> World:
    return World(msgspec.json.decode(encoded, type=Config))


class ShoppingEnv(SingleAgentEnv):
    """A shop with a simulated user; see `config.Config` for the options.

    The environment of one process shares one catalogue and index among all its instances. A catalogue of your own is
    given as a file (`catalogue=...`) or as an object (`ShoppingEnv(World(config({...}), catalogue))`).
    """

    id = "shopping-v0"
    version = "1"
    capabilities = frozenset({"replay", "fork", "ladder", "hidden_twin", "hints", "answer"})
    reward: ClassVar[dict[str, Any]] = HRM

    def __init__(self, shared: World | None = None, **options: Any) -> None:
        if shared is not None and options:
            raise ConfigError(f"give a world or options, not both; got the options {', '.join(options)}")
        self.world = shared or world(config(options))
        self._desk: Desk | None = None
        self._surface: Surface = self.world.surface()

    @property
    def config(self) -> Config:
        return self.world.options

    @property
    def catalogue(self) -> Catalogue:
        return self.world.catalogue

    @property
    def desk(self) -> Desk:
        """The running episode's state: for tests, reward audits and scripted policies, never for an agent."""
        if self._desk is None:
            raise ConfigError("no episode is running: await env.reset(task) first")
        return self._desk

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return self.world.maker.stream(split, seed)

    async def begin(self, task: Task) -> Observation:
        self._desk = self.world.desk(task)
        self._surface = self.world.surface()
        seen: Observation = self._surface.open(self._desk).replace(anchor=_anchor(self._desk))
        return seen

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        desk = self.desk
        if desk.close is not None:
            raise ConfigError("the episode has ended: await env.reset(task) before another step")
        if self.config.latency:
            await asyncio.sleep(self.config.latency)
        outcome = desk.act(self._surface.read(desk, action))
        if desk.close is None:
            seen = self._surface.show(desk, outcome.events).replace(anchor=_anchor(desk))
            return seen, StepResult(rewards=terms(outcome, None), metrics=_metrics(desk, None))
        verdict = judge(desk)
        return None, StepResult(
            rewards=terms(outcome, verdict),
            terminated=True,
            metrics=_metrics(desk, verdict),
            info={"last": " ".join(m.text for m in self._surface.show(desk, outcome.events).messages)},
        )

    async def close(self) -> None:
        self._desk = None

    def spawn(self) -> Self:
        twin = copy.copy(self)
        twin._desk, twin._surface = None, self.world.surface()
        return twin

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._desk, twin._surface = self.desk.fork(), self._surface.fork()
        return twin

    def hidden_twin(self, task: Task) -> Task:
        return tasks.hidden_twin(self.catalogue, task)

    def hint(self, task: Task, level: int) -> str:
        return hints.hint(tasks.brief_of(task, self.catalogue), self.config.surface, level)

    def answer(self, task: Task) -> str:
        return answers.answer(tasks.brief_of(task, self.catalogue), self.world.lexicon, self.config.surface)

    def ladder(self) -> dict[str, Policy]:
        return dict(ladder.policies(self._mirror))

    def teacher(self) -> Scripted:
        """The policy whose episodes a warm start imitates."""
        return ladder.scripted(self._mirror, "teacher", ladder.teacher)

    def demonstrations(self) -> dict[str, Policy]:
        """Policies to learn from: the teacher, and the ladder."""
        return {"teacher": self.teacher(), **self.ladder()}

    def vocabulary(self) -> list[str]:
        """Every word the compact surface can produce or accept, in a stable order."""
        return list(self.world.lexicon.vocabulary)

    def _mirror(self, episode: Episode) -> tuple[Desk, Surface]:
        return self.world.desk(episode.task), self.world.surface()


def _anchor(desk: Desk) -> str:
    """The state without its history: what was told of each need, and how far the sale is."""
    told = "|".join(",".join(sorted(slots)) for slots in desk.mind.told)
    return f"{desk.brief.intent}:{told}:{min(len(desk.seen), 1)}:{len(desk.cart)}"


def _metrics(desk: Desk, verdict: Verdict | None) -> dict[str, float]:
    """Counts so far; at the end also success, quality among successes, and regret to the oracle's return of 1."""
    found = {
        "asks": float(desk.counts.asks),
        "asks_revealing": float(desk.mind.revealing),
        "asks_duplicate": float(desk.mind.duplicates),
        "asks_indifferent": float(desk.mind.indifferent),
        "hallucinated": float(desk.counts.hallucinated),
        "errors": float(desk.counts.errors),
        "tool_calls": float(desk.counts.calls),
        "turns": float(desk.counts.turns),
        "success": 0.0,
    }
    if verdict is not None:
        found |= {"success": verdict.hard, "valid": verdict.valid, "finished": verdict.finished}
        found |= {"regret": 1.0 - hrm(verdict), "left": float(not verdict.finished and verdict.valid)}
        found |= {"quality_given_success": verdict.quality} if verdict.hard else {}
    return found
