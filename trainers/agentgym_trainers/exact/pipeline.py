"""One step through the pipeline of a run: strategy, composer, admission, advantages, collate, loss.

The episodes are given, so nothing is sampled; everything after them is what a run does, in float64. Collate gives the
layout, and the numbers that it packs as float32 are taken from where they came from. Q prompts, K turns, S states, A
actions, M trained tokens.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentgym.advantages import Term, advantages
from agentgym.collate import collate
from agentgym.errors import RecordError
from agentgym.policy import Policy
from agentgym.rewards import Composed, Composer, by_turn, composer, derived
from agentgym.types import Batch, Episode, Trajectory, iterate
from agentgym_trainers import strategies
from agentgym_trainers.exact.composition import HINTED, Composition
from agentgym_trainers.exact.mdp import MDP, Real, environment
from agentgym_trainers.exact.worlds import WORLDS
from agentgym_trainers.objective import compute
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.tokens import Tokens
from agentgym_trainers.rollouts import Buffer
from agentgym_trainers.strategies import Sample, Table
from agentgym_trainers.strategies.declare import Contrastive, DynamicFilter, Plain, Strategy

Group = tuple[int, ...]
"""Paths of the members; ~p for a member that played path p and is taken away before admission."""
Step = tuple[Group, ...]


class Facts(NamedTuple):
    """What an update may know of the policy besides its episodes: the path of its greedy episode and the expected
    return [Q], and the value of each state [S]."""

    greedy: NDArray[np.intp]
    expected: Real
    values: Real


class Laid(NamedTuple):
    """A step behind collate: its batch, and of the M trained tokens prompt, turn, state, action and advantage."""

    batch: Batch
    prompt: NDArray[np.int64]
    turn: NDArray[np.int64]
    state: NDArray[np.int64]
    action: NDArray[np.int64]
    advantage: Real


class Pipeline:
    """A composition in one world. `notes` say what of it the world has not."""

    def __init__(self, composition: Composition, mdp: MDP) -> None:
        self.composition, self.mdp = composition, mdp
        self.notes = [*_unpaid(composition.advantage)]
        self.composer = self._composer()
        self.returns = np.asarray([0.0 if p.failed else self._composed(mdp.record(p)).value for p in mdp.paths])
        self.terms = tuple(smallest(term) for term in composition.advantage)
        self.informed = any(t.centre == "given" or t.credit == "gae" for t in self.terms)
        self._cache: dict[Step, Laid | None] = {}
        self._known: dict[tuple[int, str, int], Sample] = {}

    def _composer(self) -> Composer:
        """The composition's reward where this world pays what it reads, else the world's own."""
        if not self.composition.reward:
            return self.mdp.composer
        found = composer(_filled(self.composition.reward, self.mdp.reward))
        try:
            for path in self.mdp.paths:
                record = self.mdp.record(path)
                found.trajectory(record, _extra(found, record))
        except RecordError as error:
            self.notes.append(f"the reward: in {self.mdp.name!r} it is the world's own ({error})")
            return self.mdp.composer
        return found

    @property
    def varied(self) -> bool:
        """Whether any outcome pays more than another: without that there is no gradient of a return."""
        return bool(np.ptp(self.returns[[not path.failed for path in self.mdp.paths]]) > 0)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Values of the labels that the terms read: members take them in turn."""
        return ("a", "b") if any(_labels(term) for term in self.terms) else ("",)

    def of_step(self, step: Step, logs: Real, played: Real, facts: Facts) -> Real:
        """d(-loss) / d log pi(a|s), summed over the step's tokens: [Q, K, S, A]."""
        laid = self._laid(step, facts)
        found = np.zeros((len(self.mdp.prompts), *self.mdp.visits.shape[1:]))
        if laid is not None:
            np.add.at(found, (laid.prompt, laid.turn, laid.state, laid.action), self._slope(laid, logs, played))
        return found

    def values(self, intended: Real) -> Real:
        """The expected composed reward from each state on [S], the paths being as likely as `intended` [P]."""
        owed, seen = np.zeros((2, len(self.mdp.states)))
        gamma = next((term.gamma for term in self.terms if term.credit == "gae"), 1.0)
        for path, chance in zip(self.mdp.paths, intended, strict=True):
            if not path.failed:
                record = self.mdp.record(path)
                later = np.arange(len(path.decisions))
                ahead = np.triu(gamma ** np.maximum(later - later[:, None], 0)) @ by_turn(
                    self._composed(record), record
                )
                states = [state for state, _ in path.decisions]
                np.add.at(owed, states, chance * ahead)
                np.add.at(seen, states, chance)
        return owed / np.maximum(seen, 1e-300)

    # --- loss ---

    def _slope(self, laid: Laid, logs: Real, played: Real) -> Real:
        """d(-loss) / d log-prob of the trained tokens: [M]."""
        tokens = self._tokens(laid, logs[laid.state, laid.action], played[laid.state, laid.action])
        objective = self.composition.objective
        loss = self.composition.hooks.get("loss", _loss)(objective, tokens, totals(objective.aggregation, tokens))
        if not loss.requires_grad:
            return np.zeros(len(laid.turn))
        (found,) = torch.autograd.grad(loss, tokens.logp)
        return -found.numpy()

    def _tokens(self, laid: Laid, logp: Real, sampled: Real) -> Tokens:
        batch, trained = laid.batch, laid.batch.mask > 0
        owner = np.repeat(np.arange(len(batch.owners)), np.diff(batch.bounds))[trained]
        old = sampled if self.composition.objective.proximal == "sampler" else logp
        return Tokens(
            logp=torch.tensor(logp, requires_grad=True),
            old=torch.tensor(old),
            sampled=torch.tensor(sampled),
            advantages=torch.tensor(laid.advantage),
            sequence=torch.tensor(owner),
            sequences=len(batch.owners),
            turn=torch.tensor(laid.turn),
            segment=torch.tensor(batch.segments[trained].astype(np.int64)),
            labels=batch.labels,
            group=torch.tensor(batch.groups),
            domain=torch.tensor(batch.domains),
            reward=torch.tensor(batch.rewards).double(),
        )

    # --- what comes before it ---

    def _laid(self, step: Step, facts: Facts) -> Laid | None:
        """The step behind collate, None where nothing is learnt from it; kept unless it depends on the policy."""
        if step not in self._cache or self.informed:
            self._cache[step] = self._lay(step, facts)
        return self._cache[step]

    def _lay(self, step: Step, facts: Facts) -> Laid | None:
        samples = self._admitted(self._played(step, facts))
        if not samples:
            return None
        values = self._credit(samples, facts)
        kept = [(s, v) for s, v in zip(samples, values, strict=True) if s.train]
        records, rows = [s.trajectory for s, _ in kept], [v for _, v in kept]
        batches = collate(records, rows, max_tokens=1_000_000, rewards=[s.value or 0.0 for s, _ in kept])
        return _laid_out(self.mdp, batches[0], records, rows) if batches else None

    def _played(self, step: Step, facts: Facts) -> list[list[Sample]]:
        """The step's groups as the strategy hands them over, the real one, with these episodes dealt to it."""

        async def play(found: Sequence[Episode], policy: Policy | None) -> list[Sample]:
            return [self._sample(step, episode, facts) for episode in found]

        size = len(step[0])
        strategy = strategies.make(smaller(self.composition.strategy, size), environment(self.mdp), group_size=size)
        firsts = [Episode(task=self.mdp.task(self._prompt(g)), group=f"{slot}") for slot, g in enumerate(step)]
        groups = _driven(strategy.play(Table(iter(firsts), play, deals=len(step))))
        return [[s for s in group if _there(step, s.trajectory.episode)] for group in groups]

    def _prompt(self, group: Group) -> int:
        return self.mdp.paths[_path(group[0])].prompt

    def _sample(self, step: Step, episode: Episode, facts: Facts) -> Sample:
        group, member = step[int(episode.group)], episode.member
        prompt = self._prompt(group)
        greedy = episode.guidance is not None and episode.guidance.sampling is not None
        found = self._record(int(facts.greedy[prompt]) if greedy else _path(group[member]), episode)
        given = {t.given: facts.expected[prompt] for t in self.terms if t.centre == "given"}
        told = found.trajectory
        return found._replace(trajectory=told.replace(metrics=told.metrics | given)) if given else found

    def _record(self, path: int, episode: Episode) -> Sample:
        """The path as this episode, with the labels that the terms read."""
        key = (path, episode.group, episode.member)
        if key not in self._known:
            found = self.mdp.record(self.mdp.paths[path], group=episode.group, member=episode.member)
            own = self.classes[episode.member % len(self.classes)]
            halves = {name: own for term in self.terms for name in _labels(term)}
            record = found.replace(labels=found.labels | episode.labels | halves)
            self._known[key] = Sample(record, None if record.status == "failed" else self._composed(record))
        return self._known[key]

    def _admitted(self, played: list[list[Sample]]) -> list[Sample]:
        """What is learnt from: what the buffer admits, or the composition's own `admit`."""
        own = self.composition.hooks.get("admit")
        if own is None:
            return Buffer(0, self.composition.drop_equal).take(played, 0)
        chosen = own([s.trajectory for group in played for s in group])
        return [Sample(t, None if t.status == "failed" else self._composed(t)) for t in chosen]

    def _composed(self, record: Trajectory) -> Composed:
        own = self.composition.hooks.get("reward")
        if own is not None:
            value = float(own(record))
            return Composed(value, value, (0.0,) * sum(1 for _ in record.rewards))
        return self.composer.trajectory(record, _extra(self.composer, record))

    def _credit(self, samples: Sequence[Sample], facts: Facts) -> list[Real]:
        pairs = [(s.trajectory, s.reward) for s in samples]
        own = self.composition.hooks.get("advantages")
        if own is not None:
            return [np.asarray(values, float) for values in own(pairs)]
        known = any(term.credit == "gae" for term in self.terms)
        values = [facts.values[_states(s.trajectory)] for s in samples] if known else None
        return advantages(pairs, self.terms, whiten=self.composition.whiten, values=values)


def _loss(objective: Any, tokens: Tokens, total: Any) -> Tensor:
    return compute.loss(objective, tokens, total)[0]


def _path(member: int) -> int:
    return member if member >= 0 else ~member


def _there(step: Step, episode: Episode) -> bool:
    return step[int(episode.group)][episode.member] >= 0


Found = TypeVar("Found")


def _driven(play: Coroutine[Any, Any, Found]) -> Found:
    """The result of a coroutine that never waits."""
    try:
        play.send(None)
    except StopIteration as end:
        found: Found = end.value
        return found
    raise RuntimeError("a strategy waited for something that is not an episode")


def _laid_out(mdp: MDP, batch: Batch, records: Sequence[Trajectory], values: Sequence[Real]) -> Laid:
    """Read the trained tokens off a batch."""
    at = np.flatnonzero(batch.mask)
    owner = batch.owners[np.repeat(np.arange(len(batch.owners)), np.diff(batch.bounds))][at]
    turn = batch.turns[at].astype(np.int64)
    prompt = np.asarray([mdp.prompts.index(record.task.payload["prompt"]) for record in records])
    advantage = np.asarray([values[i][k] for i, k in zip(owner, turn, strict=True)])
    state, action = batch.ids[at - 1].astype(np.int64), batch.ids[at].astype(np.int64) - len(mdp.states)
    return Laid(batch, prompt[owner], turn, state, action, advantage)


def _extra(found: Composer, record: Trajectory) -> tuple[Any, ...]:
    """Terms that the trainer fills in; the policy is its own reference here, so that a KL is 0."""
    return derived(record, [0.0] * len(record.turns)) if found.derived else ()


def _filled(declared: Any, own: Any) -> Any:
    """The declaration with the world's own one in place of the word "environment"."""
    if declared == "environment":
        return own
    if isinstance(declared, dict):
        return {name: _filled(part, own) for name, part in declared.items()}
    return [_filled(part, own) for part in declared] if isinstance(declared, list | tuple) else declared


def _unpaid(terms: Sequence[Term]) -> Iterator[str]:
    """The components that no world pays."""
    paid = {name for mdp in WORLDS.values() for moves in mdp.moves.values() for m in moves.values() for name in m.pay}
    for term in terms:
        if term.component and term.component not in paid:
            yield f"the component {term.component!r}: the worlds pay {', '.join(sorted(paid))}"


def _states(record: Trajectory) -> list[int]:
    """Where each turn was decided."""
    return [turn.action.span.prompt[0] for turn in iterate(record.turns) if turn.action.span is not None]


def _labels(term: Term) -> list[str]:
    return [part.partition(":")[2] for part in term.parts if part.startswith("label:")]


# --- the smallest step that shows an effect ---------------------------------------------------------------------


def smallest(term: Term) -> Term:
    """The term with bundles of two prompts, if it has any."""
    return term.replace(bundle=2) if "bundle" in term.parts else term


def smaller(declared: Strategy, size: int) -> Strategy:
    """The strategy for a group of this size; plain where the world cannot give what it needs, or where the listing
    of steps does its work."""
    if isinstance(declared, Contrastive):
        return Contrastive(sample=size, keep=2, statistics=declared.statistics)
    return Plain() if isinstance(declared, HINTED | DynamicFilter) else declared


def least(composition: Composition, members: int) -> int:
    """Members of a group, at least so many that a choice among them, or a half of them, is one."""
    labelled = any(_labels(term) for term in composition.advantage)
    return max(members, 4) if labelled or isinstance(composition.strategy, Contrastive) else members
