"""Trajectories and their advantages become packed batches: the last torch-free stage before the learner.

One sequence per (trajectory, agent, branch), tokens exactly as they were rendered and sampled. A branch that forked
begins with a copy of its parent's tokens as context. Only ids that a turn's action sampled are trained on (mask 1).
Rejected drafts stay in the branch where they were sampled, because later tokens were conditioned on them, as context
(mask 0); a sequence without a trained token is left out, and so is every failed trajectory.

Where an episode's guidance says context = "original", its hinted prompts are replaced by what they would have been
without the hint. The log-probs stay those of the sampler, which read the hint: off-policy, and for the ratio to mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from agentgym import seeding
from agentgym.errors import ConfigError, RecordError
from agentgym.types import Batch, Ids, TokenSpan, Trajectory, Turn, iterate

UNRECORDED = -1
"""In `Batch.versions`: a token nobody sampled, or sampled without saying by which weights."""

_COLUMNS = {
    "ids": np.int32,
    "mask": np.float32,
    "advantages": np.float32,
    "logprobs": np.float32,
    "versions": np.int32,
    "turns": np.int32,
    "segments": np.int16,
}
Chunk = dict[str, NDArray[np.generic]]


@dataclass(slots=True)
class _Sequence:
    """A branch under construction: chunks of the columns, `length` tokens of which `trained` are trained on.

    `removed` holds, for each hinted prompt built without its hint, where it stood in the record: (start, stop, tokens
    fewer).
    """

    owner: int
    agent: str
    branch: int
    chunks: list[Chunk] = field(default_factory=list)
    removed: list[tuple[int, int, int]] = field(default_factory=list)
    length: int = 0
    trained: int = 0

    @property
    def recorded(self) -> int:
        """Its length in the record."""
        return self.length + sum(fewer for _, _, fewer in self.removed)

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.length += len(chunk["ids"])
        self.trained += int(chunk["mask"].sum())

    def column(self, name: str) -> NDArray[np.generic]:
        return np.concatenate([chunk[name] for chunk in self.chunks])


def collate(
    trajectories: Sequence[Trajectory],
    turn_advantages: Sequence[NDArray[np.float64]],
    *,
    max_tokens: int,
    behaviour: bool = True,
    rewards: Sequence[float] | None = None,
) -> list[Batch]:
    """Pack into micro-batches of at most `max_tokens` tokens, longest sequences first, ties in the order given.

    turn_advantages  one value per turn for each trajectory [turns], as `advantages.advantages` returns them
    behaviour        the sampler's log-probs are needed; False (imitation) puts 0 where they were not recorded
    rewards          the composed reward of each trajectory, for objectives that read it

    Raises `ConfigError` for a sequence longer than `max_tokens`, `RecordError` for spans that do not add up.
    `Batch.owners` indexes `trajectories`; `Batch.labels` is the same for all batches of a call.
    """
    labels: dict[str, int] = {"": 0}
    found: list[_Sequence] = []
    for owner, (trajectory, values) in enumerate(zip(trajectories, turn_advantages, strict=True)):
        if trajectory.status != "failed":
            found += _Branches(owner, trajectory, values, labels, behaviour).sequences()
    found.sort(key=lambda s: (-s.length, s.owner, s.agent, s.branch))
    facts = _Facts.of(trajectories, rewards)
    return [_pack(group, tuple(labels), facts) for group in _fill(found, max_tokens)]


def trained_tokens(batches: Iterable[Batch]) -> int:
    """Tokens with mask 1 over all micro-batches: the global denominator of a token mean."""
    return int(sum(batch.mask.sum(dtype=np.float64) for batch in batches))


def sequences(batches: Iterable[Batch]) -> int:
    """Sequences over all micro-batches: the global denominator of a sequence mean."""
    return sum(len(batch.owners) for batch in batches)


# --- one trajectory ---------------------------------------------------------------------------------------------


class _Branches:
    """Lays the spans of one trajectory end to end, branch by branch."""

    def __init__(
        self,
        owner: int,
        trajectory: Trajectory,
        values: NDArray[np.float64],
        labels: dict[str, int],
        behaviour: bool,
    ) -> None:
        if len(values) != len(trajectory.turns):
            raise RecordError(
                f"{len(values)} advantages for the {len(trajectory.turns)} turns of {trajectory.episode.id}"
            )
        self.owner, self.trajectory, self.values = owner, trajectory, values
        self.labels, self.behaviour = labels, behaviour
        guidance = trajectory.episode.guidance
        self.original = guidance is not None and guidance.context == "original"
        self.found: dict[tuple[str, int], _Sequence] = {}

    def sequences(self) -> list[_Sequence]:
        """Every branch that trains at least one token."""
        for i, turn in enumerate(iterate(self.trajectory.turns)):
            self._turn(i, turn)
        return [s for s in self.found.values() if s.trained]

    def _turn(self, index: int, turn: Turn) -> None:
        for draft in turn.drafts:
            if draft.action.span is not None:
                self._span(index, draft.by or turn.agent, draft.action.span, trained=False)
        if turn.action.span is not None:
            self._span(index, turn.agent, turn.action.span, trained=True)

    def _span(self, index: int, agent: str, span: TokenSpan, trained: bool) -> None:
        sequence = self._branch(agent, span)
        prompt = self._prompt(index, sequence, span)
        if trained and len(span.ids) and not sequence.length + len(prompt):
            raise RecordError(f"{self._where(index)}: the first token of a sequence was sampled; it needs a prompt")
        if len(prompt):
            sequence.add(_plain(prompt.numpy()))
        if len(span.ids):
            sequence.add(self._sampled(index, span) if trained else _plain(span.ids.numpy(), index))
        if len(span.suffix):
            sequence.add(_plain(span.suffix.numpy()))

    def _prompt(self, index: int, sequence: _Sequence, span: TokenSpan) -> Ids:
        """The prompt this span is trained under."""
        if span.context != "hinted" or not self.original:
            return span.prompt
        if not len(span.unhinted):
            raise RecordError(
                f"{self._where(index)}: a hinted span without its unhinted prompt, for context 'original'"
            )
        start = sequence.recorded
        sequence.removed.append((start, start + len(span.prompt), len(span.prompt) - len(span.unhinted)))
        return span.unhinted

    def _branch(self, agent: str, span: TokenSpan) -> _Sequence:
        """The branch this span extends; a new one begins with its parent's tokens as context."""
        key = (agent, span.branch)
        if key not in self.found:
            self.found[key] = _Sequence(self.owner, agent, span.branch)
            if span.parent is not None:
                self._inherit(self.found[key], *span.parent)
        return self.found[key]

    def _inherit(self, sequence: _Sequence, branch: int, length: int) -> None:
        """Begin a sequence with `length` recorded tokens of another branch."""
        parent = self.found.get((sequence.agent, branch))
        held = "does not exist" if parent is None else f"has {parent.recorded} tokens"
        if parent is None or not 0 <= length <= parent.recorded:
            self._misfork(branch, length, held)
        if any(start < length < stop for start, stop, _ in parent.removed):
            self._misfork(branch, length, "was hinted just there: it cannot be trained under the original prompt")
        removed = [cut for cut in parent.removed if cut[1] <= length]
        kept = length - sum(fewer for _, _, fewer in removed)
        sequence.add(_plain(parent.column("ids")[:kept] if kept else np.zeros(0, np.int32)))
        sequence.removed = removed

    def _misfork(self, branch: int, length: int, why: str) -> NoReturn:
        raise RecordError(f"{self.trajectory.episode.id}: forked after {length} tokens of branch {branch}, which {why}")

    def _sampled(self, index: int, span: TokenSpan) -> Chunk:
        """The columns of sampled ids: [N] each."""
        chunk = _plain(span.ids.numpy(), index)
        chunk["mask"] = np.ones(len(span.ids), np.float32)
        chunk["advantages"] = np.full(len(span.ids), self.values[index], np.float32)
        chunk["logprobs"] = self._logprobs(index, span)
        for run in span.versions:
            chunk["versions"][run.start :] = run.version
        for segment in span.segments:
            chunk["segments"][segment.start : segment.stop] = self.labels.setdefault(segment.label, len(self.labels))
        return chunk

    def _logprobs(self, index: int, span: TokenSpan) -> NDArray[np.float32]:
        """Of the distribution the ids were drawn from."""
        held = span.sampled_logprobs if len(span.sampled_logprobs) else span.logprobs
        if len(held) == len(span.ids):
            return held.numpy()
        if len(held) or self.behaviour:
            raise RecordError(
                f"{self._where(index)}: {len(span.ids)} sampled ids and {len(held)} log-probs"
                + ("" if len(held) else "; to imitate actions without log-probs, pass behaviour=False")
            )
        return np.zeros(len(span.ids), np.float32)

    def _where(self, index: int) -> str:
        return f"turn {index} of {self.trajectory.episode.id}"


def _plain(ids: NDArray[np.generic], turn: int = -1) -> Chunk:
    """Columns of tokens that are not trained on."""
    chunk: Chunk = {name: np.zeros(len(ids), kind) for name, kind in _COLUMNS.items()}
    chunk["ids"] = ids
    chunk["versions"] = np.full(len(ids), UNRECORDED, np.int32)
    chunk["turns"] = np.full(len(ids), turn, np.int32)
    return chunk


# --- packing ----------------------------------------------------------------------------------------------------


def _fill(found: Sequence[_Sequence], max_tokens: int) -> list[list[_Sequence]]:
    """Next-fit over sequences sorted by length: neighbours are alike, so a learner may pad within a micro-batch."""
    groups: list[list[_Sequence]] = []
    room = 0
    for sequence in found:
        if sequence.length > max_tokens:
            raise ConfigError(
                f"a sequence of {sequence.length} tokens does not fit a micro-batch of max_tokens = {max_tokens}; "
                f"raise max_tokens, or lower the engine's max_length"
            )
        if sequence.length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(sequence)
        room -= sequence.length
    return groups


class _Facts(NamedTuple):
    """What a sequence inherits from its trajectory, [trajectories] each. Hashes agree between calls and processes."""

    groups: NDArray[np.int64]
    domains: NDArray[np.int64]
    rewards: NDArray[np.float32]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], rewards: Sequence[float] | None) -> _Facts:
        domains = [t.labels.get("domain", t.env) for t in trajectories]
        return cls(
            np.asarray([seeding.key("group", *t.prompt) >> 1 for t in trajectories], np.int64),
            np.asarray([seeding.key("domain", d) >> 1 for d in domains], np.int64),
            np.full(len(trajectories), np.nan, np.float32) if rewards is None else np.asarray(rewards, np.float32),
        )


def _pack(group: Sequence[_Sequence], labels: tuple[str, ...], facts: _Facts) -> Batch:
    lengths = [sequence.length for sequence in group]
    owners = np.asarray([sequence.owner for sequence in group], np.int32)
    columns = {name: np.concatenate([s.column(name) for s in group]).astype(kind) for name, kind in _COLUMNS.items()}
    return Batch(
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        bounds=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        owners=owners,
        groups=facts.groups[owners],
        domains=facts.domains[owners],
        rewards=facts.rewards[owners],
        labels=labels,
        **columns,
    )
