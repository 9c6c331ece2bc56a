"""The records: everything that passes through a door of the gym, and the whole picture of the system.

    Task -> Observation -> Action(+TokenSpan) -> StepResult -> Turn -> Trajectory -> Batch -> WeightsVersion

They are immutable, keyword-only and know no torch. A record that a disk holds is versioned by `SCHEMA`; `store`
migrates what older versions wrote. Sequences of numbers are value types over packed bytes (`Ids`, `Floats`,
`Array`): 4 bytes a token, a zero-copy numpy view, and equality and hash that records can rely on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from agentgym.packed import Floats as Floats
from agentgym.packed import Ids as Ids
from agentgym.packed import Packed as Packed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

SCHEMA = 2

Level = Literal["token", "turn", "segment", "episode", "agent", "team"]
Status = Literal["terminated", "truncated", "failed"]
FailureKind = Literal["environment", "tool", "sandbox", "engine", "timeout", "stale", "cancelled"]
Role = Literal["system", "user", "assistant", "tool"]

AGENT = "agent"  # the key of the only agent in a single-agent environment


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Base of every record: immutable, keyword-only, compared by value.

    The garbage collector does not visit records: they hold values, never cycles, and at a thousand episodes at once
    its passes over them would take a quarter of the runner's time.
    """

    def replace(self, **changes: Any) -> Any:
        """A copy with these fields changed."""
        return msgspec.structs.replace(self, **changes)


class Array(Record, frozen=True, kw_only=True):
    """A numpy array as a value: what numeric agents see and do."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: ArrayLike) -> Array:
        import numpy as np

        array = np.asarray(values)
        if array.dtype == object:
            raise TypeError(f"an Array holds numbers, not {values!r:.80}")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls(dtype=array.dtype.str, shape=array.shape, data=array.tobytes())

    def numpy(self) -> NDArray[Any]:
        """A read-only view of the bytes, without a copy."""
        import numpy as np

        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def item(self) -> Any:
        return self.numpy().item()


# --- what goes in -----------------------------------------------------------------------------------------------


class Task(Record, frozen=True, kw_only=True):
    """What an episode is about. The same task always gives the same start state, so a group shares one.

    `labels` (intent, domain, difficulty class) are copied to the trajectory: figures are broken down by them.
    """

    env: str
    split: str = "train"
    seed: int = 0
    difficulty: float = 0.0
    payload: dict[str, Any] = {}
    labels: dict[str, str] = {}

    @property
    def id(self) -> str:
        """A content hash: equal tasks have equal ids in any process."""
        from agentgym.seeding import digest

        return digest(msgspec.msgpack.encode(self, order="deterministic"), size=8).hex()


class Guidance(Record, frozen=True, kw_only=True):
    """What a rollout strategy gives an episode besides its task. Part of the record, so nothing is learnt in secret.

    start     actions already taken: the runner plays them, tells the session of them, and then the policy goes on.
              Their turns have no span of the policy, so nothing of them is trained on
    hint      text that the policy reads at the end of its first observation
    begin     the first reply begins with this text; `share` is the probability with which the strategy says so, and
              its logarithm the sampled log-prob of the first of these tokens (0 of the others)
    sampling  replaces the runner's for this episode
    context   what a hinted sample is trained under: the prompt that the sampler saw ("sampled"), or the prompt
              without the hint ("original"), which makes it off-policy
    """

    start: tuple[Action, ...] = ()
    hint: str = ""
    begin: str = ""
    share: float = 1.0
    sampling: Sampling | None = None
    context: Literal["sampled", "original"] = "sampled"


class Episode(Record, frozen=True, kw_only=True):
    """The key of one episode: everything random about it hangs from here.

    Members of a group share `task` and `seed` and differ in `member`, which only the policy's sampling noise reads, and
    in `guidance`. `labels` (condition, hint level) join the task's in the trajectory.
    """

    task: Task
    seed: int = 0
    member: int = 0
    group: str = ""
    guidance: Guidance | None = None
    labels: dict[str, str] = {}

    @property
    def id(self) -> str:
        return f"{self.group or self.task.id}.{self.seed}.{self.member}"


class MediaRef(Record, frozen=True, kw_only=True):
    """An image by content hash. Images are stored once; messages and ids only point at them."""

    hash: str
    mime: str = "image/png"
    grid: tuple[int, ...] = ()
    start: int = 0
    length: int = 0


class Text(Record, frozen=True, kw_only=True, tag="text"):
    text: str


class Image(Record, frozen=True, kw_only=True, tag="image"):
    media: MediaRef


Content = str | tuple[Text | Image, ...]


class ToolCall(Record, frozen=True, kw_only=True):
    """A call of a named tool. `id` joins the call to the tool message that answers it."""

    name: str
    arguments: dict[str, Any] = {}
    id: str = ""


class Message(Record, frozen=True, kw_only=True):
    role: Role
    content: Content = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The textual part of the content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, Text))


class Observation(Record, frozen=True, kw_only=True):
    """What one agent sees: messages that are new since its last turn, or an array. Numeric and language agents alike.

    `action_mask` marks the legal discrete actions; `tools` are JSON schemas, given with the first observation;
    `anchor` names the state without its history (equal anchors may share a baseline).
    """

    messages: tuple[Message, ...] = ()
    array: Array | None = None
    action_mask: Array | None = None
    tools: tuple[dict[str, Any], ...] = ()
    anchor: str = ""


# --- what comes out ---------------------------------------------------------------------------------------------


class Sampling(Record, frozen=True, kw_only=True):
    """How tokens are drawn (`plain`: as the model says). Stop strings end a reply and stay in it; `top_k` 0: all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0


class VersionRun(Record, frozen=True, kw_only=True, array_like=True):
    """From token `start` of the sampled ids on, `version` of the weights was at work."""

    start: int
    version: int


class Segment(Record, frozen=True, kw_only=True, array_like=True):
    """Sampled tokens [start, stop) under one label: control, think, tool, answer."""

    label: str
    start: int
    stop: int


class TokenSpan(Record, frozen=True, kw_only=True):
    """Exactly what the sampler used and produced in one call. Nothing here is ever decoded and encoded again.

    prompt        ids added to the branch before sampling: the new messages, rendered once (not trained on)
    ids           sampled ids [N], authoritative even where the text has another canonical tokenisation
    suffix        ids appended after sampling that nobody sampled: a missing end mark (not trained on)
    logprobs      of `ids` under the raw model distribution (temperature 1, nothing cut) [N]
    sampled_logprobs   of `ids` under the distribution they were drawn from (temperature, top-p, top-k); empty = same
    branch, parent     the token sequence this span extends; `parent` = (branch, length) where a new branch forked
    context       "original", or "hinted" when the sampler saw a hint that training may take away
    unhinted      the prompt as it would have been without the hint; only where `context` is "hinted"
    stale         some of its tokens attended to keys and values cached under older weights than `versions` says
    """

    prompt: Ids = Ids()
    ids: Ids = Ids()
    suffix: Ids = Ids()
    logprobs: Floats = Floats()
    sampled_logprobs: Floats = Floats()
    versions: tuple[VersionRun, ...] = ()
    segments: tuple[Segment, ...] = ()
    sampling: Sampling | None = None
    finish: Literal["stop", "length", "interrupted", ""] = ""
    branch: int = 0
    parent: tuple[int, int] | None = None
    call_id: str = ""
    media: tuple[MediaRef, ...] = ()
    context: Literal["original", "hinted"] = "original"
    unhinted: Ids = Ids()
    stale: bool = False


class Action(Record, frozen=True, kw_only=True):
    """What an agent does: text, tool calls or an array; with the tokens behind it when a model produced it.

    Numeric policies add what their learner needs: log-prob, value and recurrent state of this decision.
    """

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    array: Array | None = None
    span: TokenSpan | None = None
    logprob: float | None = None
    value: float | None = None
    state: Array | None = None


class Draft(Record, frozen=True, kw_only=True):
    """A policy call inside a turn that was not the turn's action: a guard's rejected proposal, a critic's remark."""

    by: str
    action: Action
    verdict: str = "rejected"
    reason: str = ""


class RewardTerm(Record, frozen=True, kw_only=True):
    """One line of the ledger: a named amount at its level. Stored unchanged; composers read it, nothing rewrites it.

    `turn` is filled in by the runner. `segment` gives the sampled tokens [start, stop) of that turn for levels
    "token" and "segment". `cause` is "policy", or "world" for what the policy did not bring about. `by` says who wrote
    the line: the environment, which a replay asks again, or a judge that read the finished trajectory.
    """

    name: str
    value: float
    level: Level = "turn"
    turn: int = -1
    agent: str = ""
    segment: tuple[int, int] | None = None
    cause: Literal["policy", "world"] = "policy"
    by: Literal["environment", "judge"] = "environment"


class StepResult(Record, frozen=True, kw_only=True):
    """What the environment answers. The agents in `observations` are the ones that act next.

    `terminated`: the task came to its own end. `truncated`: it was cut off (turn budget), the state still has value.
    `metrics` are kept with the trajectory (later values replace earlier ones); `info` is for whoever drives the
    environment by hand and is not recorded.
    """

    observations: dict[str, Observation] = {}
    rewards: tuple[RewardTerm, ...] = ()
    terminated: bool = False
    truncated: bool = False
    metrics: dict[str, float] = {}
    info: dict[str, Any] = {}


class Timing(Record, frozen=True, kw_only=True, array_like=True):
    """Seconds: when the turn began (since the episode's start), in the policy, in the environment."""

    start: float = 0.0
    policy: float = 0.0
    environment: float = 0.0


class Turn(Record, frozen=True, kw_only=True):
    """One decision of one agent and what followed. Agents that act at once have turns with the same `step`."""

    step: int
    agent: str = AGENT
    observation: Observation
    action: Action
    drafts: tuple[Draft, ...] = ()
    rewards: tuple[RewardTerm, ...] = ()
    timing: Timing | None = None

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """Every span of this turn in the order of sampling, rejected proposals first."""
        actions = (*(d.action for d in self.drafts), self.action)
        return tuple(a.span for a in actions if a.span is not None)


class Failure(Record, frozen=True, kw_only=True):
    """Why an episode is not an outcome. It stays out of baselines, is counted by kind, and is never a zero."""

    kind: FailureKind
    message: str = ""
    step: int = 0
    attempts: int = 1


# --- trajectories: one record, two storages ---------------------------------------------------------------------


class Turns(Record, frozen=True, kw_only=True, tag="turns"):
    """Storage for language agents: a list of turns."""

    items: tuple[Turn, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Turn:
        return self.items[index]


class Column(Record, frozen=True, kw_only=True):
    """One agent of a numeric episode: row r is what it saw, did and got at `steps[r]`. T rows.

    observations [T, ...], actions [T, ...], masks [T, A] or None, rewards {term name: [T]} (NaN: no such term in
    that row), logprobs / values [T] and states [T, H] or None.
    """

    steps: Ids
    observations: Array
    actions: Array
    masks: Array | None = None
    rewards: dict[str, Floats] = {}
    logprobs: Floats | None = None
    values: Floats | None = None
    states: Array | None = None


class Columns(Record, frozen=True, kw_only=True, tag="columns", dict=True, gc=True):
    """Storage for numeric agents: columns (agents x steps); a `Turn` is only built when somebody looks at it."""

    agents: dict[str, Column]

    @functools.cached_property
    def order(self) -> list[tuple[int, str, int]]:
        """(step, agent, row) of every turn, by step, then in the order of the agents."""
        rows = ((s, rank, name, r) for rank, (name, c) in enumerate(self.agents.items()) for r, s in enumerate(c.steps))
        return [(step, name, row) for step, _, name, row in sorted(rows)]

    def __len__(self) -> int:
        return sum(len(column.steps) for column in self.agents.values())

    def __getitem__(self, index: int) -> Turn:
        index = range(len(self))[index]
        step, name, row = self.order[index]
        c = self.agents[name]
        return Turn(
            step=step,
            agent=name,
            observation=Observation(
                array=_row(c.observations, row), action_mask=None if c.masks is None else _row(c.masks, row)
            ),
            action=Action(
                array=_row(c.actions, row),
                logprob=None if c.logprobs is None else c.logprobs[row],
                value=None if c.values is None else c.values[row],
                state=None if c.states is None else _row(c.states, row),
            ),
            rewards=tuple(
                RewardTerm(name=term, value=value, turn=index, agent=name)
                for term, value in ((term, amounts[row]) for term, amounts in c.rewards.items())
                if value == value
            ),
        )


def _row(array: Array, row: int) -> Array:
    return Array.of(array.numpy()[row])


class Trajectory(Record, frozen=True, kw_only=True):
    """One episode, whole. `turns` is a sequence of `Turn` whichever way it is stored.

    `final` holds the observations after the last step (what a truncated episode bootstraps from); `metrics` are the
    environment's own figures about the episode; `labels` are the strings that group it: condition, hint, domain.
    """

    schema: int = SCHEMA
    env: str
    env_version: str = ""
    episode: Episode
    turns: Turns | Columns = Turns()
    status: Status
    failure: Failure | None = None
    final: dict[str, Observation] = {}
    metrics: dict[str, float] = {}
    labels: dict[str, str] = {}
    seconds: float = 0.0
    code_version: str = ""

    @property
    def task(self) -> Task:
        return self.episode.task

    @property
    def prompt(self) -> tuple[str, str, int]:
        """What the members of its group share, and nobody else."""
        return (self.env, self.episode.group or self.task.id, self.episode.seed)

    @property
    def rewards(self) -> Iterator[RewardTerm]:
        """The ledger: every reward term in order."""
        return (term for turn in iterate(self.turns) for term in turn.rewards)

    @property
    def spans(self) -> Iterator[tuple[int, TokenSpan]]:
        """(turn index, span) of every policy call in order."""
        return ((i, span) for i, turn in enumerate(iterate(self.turns)) for span in turn.spans)

    def content(self) -> Trajectory:
        """The same episode without what a clock wrote into it: compare these."""
        turns = self.turns
        if isinstance(turns, Turns):
            turns = Turns(items=tuple(t.replace(timing=None) for t in turns.items))
        bare: Trajectory = self.replace(turns=turns, seconds=0.0)
        return bare

    def _repr_html_(self) -> str:
        from agentgym.html import trajectory_html

        return trajectory_html(self)


def iterate(turns: Turns | Columns) -> Iterator[Turn]:
    """The turns in order, whichever way they are stored."""
    return iter(turns.items) if isinstance(turns, Turns) else (turns[i] for i in range(len(turns)))


# --- to and from a learner --------------------------------------------------------------------------------------


class WeightsVersion(Record, frozen=True, kw_only=True):
    """A published set of weights. `number` counts optimiser steps; `path` is where a checkpoint of it lies, if any."""

    number: int
    path: str = ""


class Batch(msgspec.Struct, kw_only=True):
    """Sequences packed end to end without padding, as numpy: the last torch-free stage before the learner.

    N tokens in all, S sequences. Position n predicts token n; the first token of a sequence has no prediction.

    ids [N] int32; positions [N] int32 (restart at 0 in each sequence); bounds [S+1] int64 (sequence s is
    bounds[s]:bounds[s+1]); mask [N] float32 (1 where the token was sampled and is trained on); advantages [N];
    logprobs [N] (behaviour: of the distribution sampled from); versions [N] int32; turns [N] int32 (turn index, -1 for
    prompt); owners [S] int32 (index of the trajectory); segments [N] int16 with their names in `labels`; groups and
    domains [S] int64 (hashes: equal ones share a prompt, a domain); rewards [S] float32 (composed; NaN where none was
    given).
    """

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    bounds: NDArray[np.int64]
    mask: NDArray[np.float32]
    advantages: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    turns: NDArray[np.int32]
    owners: NDArray[np.int32]
    segments: NDArray[np.int16]
    labels: tuple[str, ...] = ("",)
    groups: NDArray[np.int64] | None = None
    domains: NDArray[np.int64] | None = None
    rewards: NDArray[np.float32] | None = None


# --- disk format ------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Record)


def _encode_hook(value: Any) -> Any:
    if isinstance(value, Packed):
        return value.data
    if hasattr(value, "item"):  # a numpy scalar in somebody's info
        return value.item()
    raise TypeError(f"a record cannot hold {type(value).__name__}: {value!r:.80}")


def _decode_hook(kind: type, value: Any) -> Any:
    if issubclass(kind, Packed):
        return kind(bytes(value))
    raise TypeError(f"no way to read {kind.__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_hook)


@functools.cache
def _decoder(kind: type[Record]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind, dec_hook=_decode_hook)


def encode(record: Record, *, strict: bool = False) -> bytes:
    """msgpack; packed numbers travel as bytes.

    Text that UTF-8 cannot hold (lone surrogates, which JSON parsers let through) is written with backslash escapes, so
    that one such reply does not cost a run; `strict` raises its `UnicodeEncodeError` instead.
    """
    try:
        return _ENCODER.encode(record)
    except UnicodeEncodeError:
        if strict:
            raise
        return _ENCODER.encode(_escaped(msgspec.to_builtins(record, enc_hook=_encode_hook, builtin_types=(bytes,))))


def _escaped(value: Any) -> Any:
    """The same builtins with every lone surrogate escaped."""
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, Mapping):
        return {_escaped(k): _escaped(v) for k, v in value.items()}
    return [_escaped(v) for v in value] if isinstance(value, list | tuple) else value


def utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold as backslash escapes."""
    return text.encode(errors="backslashreplace").decode()


def decode(data: bytes, kind: type[R]) -> R:
    """The inverse of `encode`; raises `msgspec.ValidationError` where the bytes are not such a record."""
    found: R = _decoder(kind).decode(data)
    return found


def only(mapping: Mapping[str, Any]) -> Any:
    """The value of a one-agent mapping."""
    (value,) = mapping.values()
    return value


def say(*texts: str, role: Role = "user") -> Observation:
    """An observation of plain messages."""
    return Observation(messages=tuple(Message(role=role, content=text) for text in texts))


def terms(values: Mapping[str, float], level: Level = "turn", agent: str = "") -> tuple[RewardTerm, ...]:
    """Reward terms from a plain mapping."""
    return tuple(RewardTerm(name=n, value=float(v), level=level, agent=agent) for n, v in values.items())
