"""What a policy would have returned, judged by what another one logged.

    log = logged(trajectories, target)                    # target: trajectory -> its log-prob of every turn's action
    estimate(log, "snips").value

A decision is a turn; its probability is that of everything sampled in it. Rows are trajectories, columns decisions;
behind a trajectory's end ratios are 1 and rewards 0, so a cumulated weight stays what it was. Tasks, not
trajectories, are independent: intervals resample tasks.

The estimators are those of the ad-load paper: inverse propensity (Horvitz and Thompson 1952), self-normalised, clipped,
doubly robust; per decision as in Precup, Sutton and Singh (2000) and Jiang and Li (1511.03722).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agentgym.errors import ConfigError, RecordError, unknown
from agentgym.rewards import Composer, Declaration, carried, composer, turn_of
from agentgym.seeding import key
from agentgym.types import Columns, Trajectory, Turn, iterate

Matrix = NDArray[np.float64]
ByTurn = Callable[[Trajectory], ArrayLike] | Sequence[ArrayLike]
"""Numbers of every turn [turns] of each trajectory: a function of it, or one array for each in their order."""
Method = Literal["ips", "snips", "clipped", "doubly_robust"]
Weighting = Literal["decision", "trajectory"]


@dataclass(frozen=True, kw_only=True)
class Logged:
    """N trajectories of at most T decisions. [N, T] unless said otherwise.

    ratios     log (target / behaviour) of each decision; -inf where the target never decides so
    rewards    what each decision brought; `base` [N] is what belongs to none of them
    tasks      [N] which task a trajectory is about
    q, v       a model's value of the decision and, in its place, of the target's own mean one; for "doubly_robust"
    """

    ratios: Matrix
    rewards: Matrix
    base: Matrix
    tasks: NDArray[np.intp]
    q: Matrix | None = None
    v: Matrix | None = None
    failed: int = 0

    @classmethod
    def of(
        cls,
        behaviour: ArrayLike,
        target: ArrayLike,
        rewards: ArrayLike,
        *,
        tasks: Sequence[object] | None = None,
        q: ArrayLike | None = None,
        v: ArrayLike | None = None,
    ) -> Logged:
        """From arrays of log-probs and rewards, [N] (one decision each) or [N, T]. Without `tasks` every row is one.

        Raises `RecordError` where the behaviour policy gave no probability to what was logged, or a number is NaN.
        """
        mu, pi, r = (
            _matrix(x, name) for x, name in ((behaviour, "behaviour"), (target, "target"), (rewards, "rewards"))
        )
        if not (mu.shape == pi.shape == r.shape) or not mu.size:
            raise ConfigError(f"behaviour, target and rewards have one shape; got {mu.shape}, {pi.shape}, {r.shape}")
        _check(mu, pi, "row")
        names = list(range(len(r))) if tasks is None else [repr(task) for task in tasks]
        model = [None if x is None else _matrix(x, name) for x, name in ((q, "q"), (v, "v"))]
        places = np.unique(np.asarray(names), return_inverse=True)[1]
        return cls(ratios=pi - mu, rewards=r, base=np.zeros(len(r)), tasks=places, q=model[0], v=model[1])


class Estimate(NamedTuple):
    """An estimate of the target's mean return.

    interval   of confidence, by resampling tasks; None with fewer than two of them
    ess        effective sample size of the trajectories' weights, in (0, N]
    weight     their mean: near 1, or the log does not cover what the target does
    heaviest   the largest of them
    """

    value: float
    interval: tuple[float, float] | None
    ess: float
    weight: float
    heaviest: float
    trajectories: int
    tasks: int


# --- from trajectories ------------------------------------------------------------------------------------------


def logged(
    trajectories: Sequence[Trajectory],
    target: ByTurn,
    *,
    behaviour: ByTurn | None = None,
    reward: Declaration = "sum",
    q: ByTurn | None = None,
    v: ByTurn | None = None,
) -> Logged:
    """The log of these trajectories; failed ones are left out and counted.

    `target` gives the target's log-prob of every turn's action. `behaviour` stands for the recorded log-probs of the
    distribution that was sampled from. Raises `RecordError` where those are missing or say probability 0.

    A decision's reward is weighed by the decisions up to the turn whose step brought it. Of a `reward` that is no sum
    over lines (a gate, a product) no part is known before the end, so all of it counts for the last turn.
    """
    good = [i for i, t in enumerate(trajectories) if t.status != "failed"]
    if not good:
        raise RecordError(f"none of {len(trajectories)} trajectories is an outcome; there is nothing to judge by")
    kept = [trajectories[i] for i in good]
    mu = _rows(trajectories, good, recorded if behaviour is None else behaviour)
    pi = _rows(trajectories, good, target)
    for t, m, p in zip(kept, mu, pi, strict=True):
        _check(m, p, f"{t.episode.id}: turn")
    compose = composer(reward)
    paid = [_paid(compose, t) for t in kept]
    return Logged(
        ratios=_padded([p - m for p, m in zip(pi, mu, strict=True)]),
        rewards=_padded([by_turn for by_turn, _ in paid]),
        base=np.asarray([base for _, base in paid]),
        tasks=np.unique([t.task.id for t in kept], return_inverse=True)[1],
        q=None if q is None else _padded(_rows(trajectories, good, q)),
        v=None if v is None else _padded(_rows(trajectories, good, v)),
        failed=len(trajectories) - len(good),
    )


def _paid(compose: Composer, trajectory: Trajectory) -> tuple[Matrix, float]:
    """(reward by the turn from which it was certain [turns], what belongs to no decision)."""
    composed, found = compose.trajectory(trajectory), np.zeros(len(trajectory.turns))
    if compose.additive:
        certain = turn_of(trajectory, composed.extra)
        brought = [i for i, _ in carried(trajectory)]
        certain[: len(brought)] = np.maximum(certain[: len(brought)], brought)
        np.add.at(found, certain, composed.shares)
        return found, composed.base
    found[-1:] = composed.value
    return found, 0.0 if len(found) else composed.value


def recorded(trajectory: Trajectory) -> Matrix:
    """The log-prob of every turn as the sampler recorded it [turns]: all that was sampled in it, drafts included."""
    turns = trajectory.turns
    if isinstance(turns, Columns):
        held = {a: None if c.logprobs is None else c.logprobs.numpy() for a, c in turns.agents.items()}
        missing = [agent for agent, x in held.items() if x is None]
        if missing:
            raise RecordError(f"{trajectory.episode.id}: agent {missing[0]!r} has no log-probs; {_WAY_OUT}")
        return np.asarray([held[agent][row] for _, agent, row in turns.order], np.float64)  # type: ignore[index]
    return np.asarray([_of_turn(trajectory, i, turn) for i, turn in enumerate(iterate(turns))], np.float64)


_WAY_OUT = "pass behaviour = a function of the trajectory, or log with a policy that records them"


def _of_turn(trajectory: Trajectory, index: int, turn: Turn) -> float:
    if not turn.spans and turn.action.logprob is not None:
        return turn.action.logprob
    held = [s.sampled_logprobs if len(s.sampled_logprobs) else s.logprobs for s in turn.spans]
    if not held or any(len(x) != len(s.ids) for x, s in zip(held, turn.spans, strict=True)):
        raise RecordError(f"{trajectory.episode.id}: turn {index} was logged without log-probs; {_WAY_OUT}")
    return sum(float(x.numpy().sum(dtype=np.float64)) for x in held)


def _rows(trajectories: Sequence[Trajectory], good: Sequence[int], source: ByTurn) -> list[Matrix]:
    """One row of numbers for each good trajectory, as long as its turns."""
    if not callable(source) and len(source) != len(trajectories):
        raise ConfigError(f"{len(source)} arrays for {len(trajectories)} trajectories; give one for each")
    found = []
    for i in good:
        row = np.asarray(source(trajectories[i]) if callable(source) else source[i], np.float64)
        if row.shape != (len(trajectories[i].turns),):
            held = f"{len(trajectories[i].turns)} turns"
            raise RecordError(f"{trajectories[i].episode.id}: numbers of shape {row.shape} for {held}")
        found.append(row)
    return found


def _padded(rows: Sequence[Matrix]) -> Matrix:
    """Rows of unlike length as a matrix, zeros behind their ends."""
    lengths = np.asarray([len(row) for row in rows])
    found = np.zeros((len(rows), max(int(lengths.max()), 1)))
    found[np.arange(found.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return found


def _matrix(x: ArrayLike, name: str) -> Matrix:
    found = np.asarray(x, np.float64)
    if np.isnan(found).any() or (name != "target" and name != "behaviour" and np.isinf(found).any()):
        raise RecordError(f"{name} holds a number that is not finite")
    return found[:, None] if found.ndim == 1 else found


def _check(behaviour: Matrix, target: Matrix, where: str) -> None:
    """Refuse log-probs that no importance weight can be formed of."""
    bad = ~np.isfinite(behaviour)
    if bad.any():
        at = int(np.argwhere(bad)[0][0])
        raise RecordError(
            f"{where} {at} was logged with propensity {float(np.exp(behaviour[bad][0])):g}: what the behaviour policy "
            "cannot do has no importance weight. Correct the log, or leave the trajectory out"
        )
    if np.isnan(target).any() or (target == np.inf).any():
        raise RecordError(
            f"{where} {int(np.argwhere(~(target < np.inf))[0][0])} has a target log-prob that is no number"
        )


# --- estimators -------------------------------------------------------------------------------------------------


def weights(log: Logged, weighting: Weighting = "decision", cap: float | None = None) -> Matrix:
    """Importance weights [N, T]: of the decisions so far, or everywhere the whole trajectory's; at most `cap`.

    Raises `RecordError` where one is too large for a number.
    """
    logs = np.cumsum(log.ratios, 1)
    logs = logs if weighting == "decision" else np.broadcast_to(logs[:, -1:], logs.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.exp(logs if cap is None else np.minimum(logs, np.log(cap)))
    if not np.isfinite(found).all():
        raise RecordError("an importance weight is too large for a number: policies this unlike share no evidence")
    return found


def effective(weights: ArrayLike) -> float:
    """The effective sample size of weights [N]: (sum w)^2 / sum w^2; 0 where all of them are."""
    w = np.asarray(weights, np.float64)
    square = float((w**2).sum())
    return float(w.sum()) ** 2 / square if square else 0.0


def estimate(
    log: Logged,
    method: Method = "snips",
    *,
    weighting: Weighting = "decision",
    cap: float = 10.0,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    """The target's mean return.

    ips            mean of w r: unbiased, of a variance that grows with the weights
    snips          sum of w r / sum of w, at every decision: biased by O(1/N), bounded by the rewards
    clipped        ips with weights of at most `cap`: biased towards 0
    doubly_robust  ips of what a model leaves unexplained: unbiased whatever the model, and less noisy with a good one

    Raises `ConfigError` for a method that lacks what it needs, `RecordError` where every weight is 0.
    """
    num, den = _sums(log, method, weighting, cap)
    whole = weights(log, "trajectory")[:, -1]
    if not (den.sum(0) > 0).all():
        raise RecordError("every importance weight is 0: the target never decides as was logged")
    return Estimate(
        value=float(_value(num.sum(0), den.sum(0))),
        interval=_bootstrap(log, num, den, seed, resamples, confidence),
        ess=effective(whole),
        weight=float(whole.mean()),
        heaviest=float(whole.max()),
        trajectories=len(whole),
        tasks=len(np.unique(log.tasks)),
    )


def _sums(log: Logged, method: Method, weighting: Weighting, cap: float) -> tuple[Matrix, Matrix]:
    """Numerators and denominators [N, T + 1]: the estimate is the sum over columns of their sums' ratios."""
    if method not in METHODS:
        raise unknown("estimator", method, METHODS)
    if not cap > 0:
        raise ConfigError(f"cap bounds weights from above and is positive; got {cap}")
    w = weights(log, weighting, cap if method == "clipped" else None)
    gained = w * log.rewards
    if method == "doubly_robust":
        gained = _doubly_robust(log, w, weighting)
    column = np.ones((len(w), 1))
    den = w if method == "snips" else np.ones_like(w)
    return np.concatenate([gained, log.base[:, None]], 1), np.concatenate([den, column], 1)


METHODS: tuple[Method, ...] = ("ips", "snips", "clipped", "doubly_robust")


def _doubly_robust(log: Logged, w: Matrix, weighting: Weighting) -> Matrix:
    """w_t (r_t - q_t) + w_(t-1) v_t."""
    if log.q is None or log.v is None or log.q.shape != w.shape or log.v.shape != w.shape:
        raise ConfigError(f"doubly_robust needs the model's q and v, of shape {w.shape} like the rewards")
    if weighting != "decision":
        raise ConfigError("doubly_robust weighs every decision by those so far; set weighting = 'decision'")
    before = np.concatenate([np.ones((len(w), 1)), w[:, :-1]], 1)
    found: Matrix = w * (log.rewards - log.q) + before * log.v
    return found


def _value(num: Matrix, den: Matrix) -> Matrix:
    found: Matrix = (num / den).sum(-1)
    return found


def _bootstrap(
    log: Logged, num: Matrix, den: Matrix, seed: int, resamples: int, confidence: float
) -> tuple[float, float] | None:
    """The percentile interval over `resamples` draws of as many tasks, with replacement."""
    count = int(log.tasks.max()) + 1
    if count < 2:
        return None
    by_task = [np.stack([np.bincount(log.tasks, c, count) for c in x.T], 1) for x in (num, den)]
    g = np.random.default_rng(key(seed, "bootstrap"))
    times = g.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)
    nums, dens = (times @ x for x in by_task)
    some = (dens > 0).all(1)  # a draw in which the target has no weight says nothing
    low, high = np.quantile(_value(nums[some], dens[some]), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
