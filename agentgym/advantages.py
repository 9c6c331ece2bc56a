"""Composed rewards become advantages: one number per turn, a sum of declared terms.

A term is a place on five axes: group key x centre x scale x credit x weight. A method of the literature is a short
list of terms:

    GRPO              Term()
    Dr.GRPO           Term(scale="none")
    RLOO              Term(centre="leave_one_out", scale="none")
    REINFORCE++       Term(key="none", centre="none", scale="tokens", credit="return_to_go")
    OPO               Term(centre="length_weighted", scale="none")
    GiGPO             Term(scale="none"), Term(key=("prompt", "anchor"), scale="none", credit="return_to_go", gamma=.95)
    GDPO              Term(key=("prompt", "component")), with whiten="trajectories"
    Complementary RL  Term(key=("prompt", "label:experience"))
    DTPO              Term(component="outcome"), Term(component="tool", credit="turn", weight=0.3)
    HRPO              Term(), Term(key="none", centre="none", scale="none", credit="turn", component="action")

A failed trajectory enters no statistic and gets an empty array: no advantage, which is not an advantage of zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.rewards import POTENTIAL_SUFFIXES, Composed, by_turn, carried, turn_of
from agentgym.types import Columns, Trajectory, Turn, iterate

Real = NDArray[np.float64]
Sample = tuple[Trajectory, Composed | None]

_TURN_KEYS = ("anchor", "turn", "agent")
_CHOICES = {
    "centre": ("mean", "leave_one_out", "length_weighted", "given", "none"),
    "scale": ("none", "std", "batch", "tokens"),
    "credit": ("trajectory", "turn", "return_to_go"),
    "singleton": ("zero", "keep"),
}


@dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of an advantage. Units are trajectories (credit "trajectory") or turns (the other two).

    key        what units share a baseline: "prompt", "batch", "none", or several of "prompt", "anchor" (the state
               without its history), "turn" (index; biased: late indices exist only in long trajectories), "agent",
               "label:NAME" (a subgroup), "component" (every reward name apart, each a term of its own)
    centre     subtract the group's mean; the mean of the others; the mean weighted by sampled tokens (OPO); a figure
               of the trajectory (`metrics[given]`); or nothing
    scale      divide by the group's std + eps; "batch" / "tokens" whiten over all units, each counted once / by its
               sampled tokens (verl's masked whitening); or nothing
    credit     a trajectory's value to all its turns; each turn its own reward; or each turn what came from it on,
               discounted by `gamma` per step
    component  read this reward name's raw terms, and not the composed reward; with credit "turn" only the turns that
               carry such a term take part, the others get 0 (DTPO's tool turns, HRPO's action rewards)
    singleton  a group of one has no baseline: advantage zero, or keep its score (verl's GRPO)
    """

    key: str | tuple[str, ...] = "prompt"
    centre: Literal["mean", "leave_one_out", "length_weighted", "given", "none"] = "mean"
    scale: Literal["none", "std", "batch", "tokens"] = "std"
    ddof: int = 1
    eps: float = 1e-6
    credit: Literal["trajectory", "turn", "return_to_go"] = "trajectory"
    component: str = ""
    gamma: float = 1.0
    weight: float = 1.0
    singleton: Literal["zero", "keep"] = "zero"
    given: str = "baseline"

    def __post_init__(self) -> None:
        for axis, choices in _CHOICES.items():
            if getattr(self, axis) not in choices:
                raise unknown(axis, getattr(self, axis), choices)
        for part in self.parts:
            if part not in ("prompt", "batch", "none", "component", *_TURN_KEYS) and not part.startswith("label:"):
                raise unknown("group key", part, ("prompt", "batch", "none", "component", *_TURN_KEYS, "label:NAME"))
        self._check_combination()
        if "turn" in self.parts:
            warnings.warn("the key 'turn' is biased: late turns exist only in long trajectories", stacklevel=3)

    def _check_combination(self) -> None:
        turn_keys = [part for part in self.parts if part in _TURN_KEYS]
        if self.credit == "trajectory" and turn_keys:
            raise ConfigError(f"the key {turn_keys[0]!r} is of turns; set credit to 'turn' or 'return_to_go'")
        if "none" in self.parts and (self.centre not in ("none", "given") or self.scale == "std"):
            raise ConfigError("the key 'none' makes no groups; use centre 'none' or 'given' and scale other than 'std'")
        if ("component" in self.parts) and self.component:
            raise ConfigError(f"the key 'component' splits by every reward name; drop component={self.component!r}")
        if self.ddof not in (0, 1) or self.eps < 0 or not 0 <= self.gamma <= 1:
            raise ConfigError(f"ddof is 0 or 1, eps >= 0, gamma in [0, 1]; got {self.ddof}, {self.eps}, {self.gamma}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The key as a tuple."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)


def advantages(
    samples: Sequence[Sample],
    terms: Sequence[Term],
    *,
    whiten: Literal["none", "trajectories", "turns", "tokens"] = "none",
) -> list[Real]:
    """The weighted sum of the terms: per trajectory one value per turn [turns], and [0] for a failed one.

    `whiten` normalises the sum once more over the batch (ddof 1, eps 1e-6): every trajectory counts once, or every
    turn, or every sampled token.
    """
    if whiten not in ("none", "trajectories", "turns", "tokens"):
        raise unknown("way to whiten", whiten, ("none", "trajectories", "turns", "tokens"))
    good = [(t, c) for t, c in samples if t.status != "failed" and c is not None]
    stray = next((t.episode.id for t, c in samples if t.status != "failed" and c is None), None)
    if stray is not None:
        raise RecordError(f"episode {stray} did not fail, and yet has no composed reward")
    batch = _Batch(good)
    total = np.zeros(batch.size)
    for term in terms:
        for single in _split(term, batch):
            total += single.weight * batch.per_turn(_estimate(single, batch), single)
    if whiten != "none":
        total = _whiten(total, batch.weights(whiten), 1, 1e-6)
    found = iter(np.split(total, batch.starts[1:-1]))
    return [np.zeros(0) if t.status == "failed" else next(found) for t, _ in samples]


def to_tokens(trajectory: Trajectory, per_turn: Real) -> NDArray[np.float32]:
    """A value per turn, repeated for each token that the turn's action sampled: [sampled tokens]."""
    if len(per_turn) != len(trajectory.turns):
        raise RecordError(f"{len(per_turn)} values for the {len(trajectory.turns)} turns of {trajectory.episode.id}")
    return np.repeat(per_turn, _sampled(trajectory)).astype(np.float32)


def _sampled(trajectory: Trajectory) -> NDArray[np.intp]:
    """Sampled tokens of each turn's action: [turns]. Numeric actions have none."""
    if isinstance(trajectory.turns, Columns):
        return np.zeros(len(trajectory.turns), np.intp)
    spans = (turn.action.span for turn in iterate(trajectory.turns))
    return np.asarray([0 if span is None else len(span.ids) for span in spans], np.intp)


# --- the samples, seen as turns ---------------------------------------------------------------------------------


class _Batch:
    """The trajectories that did not fail, flattened: P trajectories, `size` = K turns in all.

    starts [P+1]: turns of trajectory p are starts[p]:starts[p+1]. owner [K], tokens [K].
    """

    def __init__(self, samples: Sequence[tuple[Trajectory, Composed]]) -> None:
        self.samples = samples
        counts = np.asarray([len(t.turns) for t, _ in samples], np.intp)
        self.starts = np.concatenate(([0], np.cumsum(counts))).astype(np.intp)
        self.size = int(self.starts[-1])
        self.owner = np.repeat(np.arange(len(samples)), counts)
        self.tokens = np.concatenate([np.zeros(0), *(_sampled(t) for t, _ in samples)]).astype(np.float64)

    def weights(self, count: str) -> Real:
        """How much each turn counts, so that every trajectory, turn or sampled token counts once: [K]."""
        per_owner = 1.0 / np.maximum(np.diff(self.starts), 1)
        return {"trajectories": per_owner[self.owner], "turns": np.ones(self.size), "tokens": self.tokens}[count]

    def scores(self, term: Term) -> Real:
        """The score of each unit, [P] or [K]."""
        if term.credit == "trajectory":
            return np.asarray(
                [c.value if not term.component else _amounts(t, term).sum() for t, c in self.samples], float
            )
        per = (by_turn(c, t) if not term.component else _amounts(t, term) for t, c in self.samples)
        if term.credit == "return_to_go":
            per = (_to_go(r, _steps(t), term.gamma) for r, (t, _) in zip(per, self.samples, strict=True))
        return np.concatenate([np.zeros(0), *per])

    def groups(self, term: Term) -> NDArray[np.intp]:
        """The group of each unit as a number, [P] or [K]."""
        keys: list[Hashable]
        if term.credit == "trajectory":
            keys = [tuple(_PARTS[_kind(p)](p, t) for p in term.parts) for t, _ in self.samples]
        else:
            keys = [key for t, _ in self.samples for key in _turn_keys(term, t)]
        if "none" in term.parts:
            return np.arange(len(keys), dtype=np.intp)
        numbers: dict[Hashable, int] = {}
        return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], np.intp)

    def lengths(self, term: Term) -> Real:
        """Sampled tokens of each unit."""
        if term.credit != "trajectory":
            return self.tokens
        return np.bincount(self.owner, self.tokens, len(self.samples)).astype(np.float64)

    def units(self, term: Term) -> NDArray[np.bool_]:
        """Which of them the term is about: of a component's turns, those that carry a term of its name."""
        if term.credit != "turn" or not term.component:
            return np.ones(len(self.samples) if term.credit == "trajectory" else self.size, bool)
        carried = (np.bincount(turn_of(t), _named(t, term), len(t.turns)) > 0 for t, _ in self.samples)
        return np.concatenate([np.zeros(0, bool), *carried])

    def given(self, term: Term) -> Real:
        """`metrics[term.given]` of each unit's trajectory."""
        for t, _ in self.samples:
            if term.given not in t.metrics:
                raise unknown(f"metric (the given baseline) of episode {t.episode.id}:", term.given, t.metrics)
        found = np.asarray([t.metrics[term.given] for t, _ in self.samples], float)
        return found if term.credit == "trajectory" else found[self.owner]

    def per_turn(self, values: Real, term: Term) -> Real:
        return values[self.owner] if term.credit == "trajectory" else values


def _named(trajectory: Trajectory, term: Term) -> list[bool]:
    """Which terms of the ledger the component is made of."""
    return [r.name == term.component and r.cause == "policy" for _, r in carried(trajectory)]


def _amounts(trajectory: Trajectory, term: Term) -> Real:
    """The raw amount of one reward name in each turn: [turns]."""
    values = np.asarray([r.value for _, r in carried(trajectory)], float) * _named(trajectory, term)
    return np.bincount(turn_of(trajectory), values, len(trajectory.turns)).astype(np.float64)


def _steps(trajectory: Trajectory) -> list[int]:
    turns = trajectory.turns
    return [step for step, _, _ in turns.order] if isinstance(turns, Columns) else [turn.step for turn in turns.items]


def _to_go(rewards: Real, steps: list[int], gamma: float) -> Real:
    """G_k = sum over j >= k of gamma^(step_j - step_k) r_j."""
    out, later = np.empty_like(rewards), 0.0
    for k in range(len(rewards) - 1, -1, -1):
        gap = steps[k + 1] - steps[k] if k + 1 < len(rewards) else 0
        later = rewards[k] + gamma**gap * later
        out[k] = later
    return out


def _split(term: Term, batch: _Batch) -> list[Term]:
    """A term with the key "component" is one term for every reward name of the batch."""
    if "component" not in term.parts:
        return [term]
    names = {r.name for t, _ in batch.samples for _, r in carried(t) if r.cause == "policy"}
    key = tuple(part for part in term.parts if part != "component") or "batch"
    return [replace(term, key=key, component=n) for n in sorted(names) if not n.endswith(POTENTIAL_SUFFIXES)]


# --- group keys -------------------------------------------------------------------------------------------------


def _kind(part: str) -> str:
    return part.partition(":")[0]


def _prompt(part: str, t: Trajectory) -> Hashable:
    return t.env, t.episode.group or t.task.id, t.episode.seed


def _label(part: str, t: Trajectory) -> Hashable:
    name = part.partition(":")[2]
    if name not in t.labels:
        raise unknown(f"label of episode {t.episode.id}:", name, t.labels)
    return t.labels[name]


_PARTS: dict[str, Callable[[str, Trajectory], Hashable]] = {
    "prompt": _prompt,
    "label": _label,
    "batch": lambda part, t: "",
    "none": lambda part, t: "",
}
_TURN_PARTS: dict[str, Callable[[int, Turn], Hashable]] = {
    "anchor": lambda i, turn: turn.observation.anchor or object(),  # no name: a state of its own
    "turn": lambda i, turn: i,
    "agent": lambda i, turn: turn.agent,
}


def _turn_keys(term: Term, t: Trajectory) -> list[Hashable]:
    shared = tuple(_PARTS[_kind(p)](p, t) for p in term.parts if p not in _TURN_PARTS)
    own = [_TURN_PARTS[p] for p in term.parts if p in _TURN_PARTS]
    if not own:
        return [shared] * len(t.turns)
    keys: list[Hashable] = [(*shared, *(part(i, turn) for part in own)) for i, turn in enumerate(iterate(t.turns))]
    if "anchor" in term.parts and keys and not any(turn.observation.anchor for turn in iterate(t.turns)):
        raise ConfigError(f"the key 'anchor' needs Observation.anchor; {t.env} gives none")
    return keys


# --- estimators -------------------------------------------------------------------------------------------------


def _estimate(term: Term, batch: _Batch) -> Real:
    """Centre and scale the scores of one term: one value per unit, 0 for turns that are none of its units."""
    x, g, lengths = batch.scores(term), batch.groups(term), batch.lengths(term)
    given = batch.given(term) if term.centre == "given" else np.zeros_like(x)
    units = batch.units(term)
    out = np.zeros_like(x)
    if units.any():
        g = np.unique(g[units], return_inverse=True)[1]
        out[units] = _normalise(term, x[units], g, lengths[units], given[units])
    return out


def _normalise(term: Term, x: Real, g: NDArray[np.intp], lengths: Real, given: Real) -> Real:
    """All arrays [units]; `g` numbers the groups from 0 without gaps."""
    n = np.bincount(g).astype(np.float64)
    centred = x - given if term.centre == "given" else _centre(term, x, g, n, lengths)
    if term.scale == "std":
        centred = centred / (_group_std(x, g, n, term.ddof)[g] + term.eps)
    if term.centre not in ("given", "none"):
        centred = np.where(n[g] == 1, x if term.singleton == "keep" else 0.0, centred)
    if term.scale in ("batch", "tokens"):
        return _whiten(centred, lengths if term.scale == "tokens" else np.ones_like(x), term.ddof, term.eps)
    return centred


def _centre(term: Term, x: Real, g: NDArray[np.intp], n: Real, lengths: Real) -> Real:
    if term.centre == "none":
        return x
    if term.centre == "leave_one_out":
        return (x - _group_mean(x, g, np.ones_like(x))[g]) * (n / np.maximum(n - 1, 1))[g]
    weights = lengths if term.centre == "length_weighted" else np.ones_like(x)
    return x - _group_mean(x, g, weights)[g]


def _group_mean(x: Real, g: NDArray[np.intp], weights: Real) -> Real:
    """Weighted mean of each group; exactly the common value where all are equal, so that those give exact zeros.

    A group without any weight has its plain mean.
    """
    weights = np.where(np.bincount(g, weights)[g] > 0, weights, 1.0)
    low, high = np.full(g.max() + 1, np.inf), np.full(g.max() + 1, -np.inf)
    np.minimum.at(low, g, x)
    np.maximum.at(high, g, x)
    mean = np.bincount(g, weights * x) / np.bincount(g, weights)
    return np.where(low == high, low, mean)


def _group_std(x: Real, g: NDArray[np.intp], n: Real, ddof: int) -> Real:
    residual = x - _group_mean(x, g, np.ones_like(x))[g]
    spread: Real = np.sqrt(np.bincount(g, residual**2) / np.maximum(n - ddof, 1))
    return spread


def _whiten(x: Real, weights: Real, ddof: int, eps: float) -> Real:
    """(x - mean) / (std + eps), units counted by weight; zeros where there is no spread to divide by."""
    count = weights.sum()
    if len(x) and not count:
        raise ConfigError("there are no sampled tokens to whiten by; whiten by trajectories or turns")
    if count <= ddof:
        return np.zeros_like(x)
    one = np.zeros(len(x), np.intp)
    centred = x - _group_mean(x, one, weights)[0]
    spread = np.sqrt((weights * centred**2).sum() / (count - ddof))
    return centred / (spread + eps) if spread > 0 else np.zeros_like(x)
