"""Counterfactual credit: what each turn was worth, by playing on from before and after it.

    found = await counterfactual(runner, trajectory, composer(env.reward), continuations=8)
    found.values[k]        # V(s_k): what the policy would still get from the state before turn k
    found.advantages[k]    # A_k = r_k + V(s_k+1) - V(s_k)

Monte-Carlo values from intermediate states, as VinePPO (2410.01679) forms them over steps of reasoning; here a state is
an episode's recorded actions, replayed (`Guidance.start`), so the environment must replay. Nothing is learnt, every
estimate is unbiased, and the price is turns x continuations episodes.

For a composed reward that is no sum over turns, V(s_k) is the expected return of the whole episode given its first k
turns, less what the trajectory's own attribution has paid for them. So the advantages always add up to the return less
its expectation at the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentgym.errors import ConfigError, Fault, RecordError
from agentgym.rewards import Composer, by_turn
from agentgym.rollout import Runner
from agentgym.seeding import key
from agentgym.types import Action, Episode, Guidance, Trajectory, iterate

Real = NDArray[np.float64]


class Counterfactual(NamedTuple):
    """K turns; NaN where no turn was asked for.

    values [K+1] with standard errors [K+1] (the last is 0: the episode is over); advantages [K] with standard errors
    [K]; `failures` counts continuations that failed, which are in no mean.
    """

    values: Real
    advantages: Real
    value_errors: Real
    advantage_errors: Real
    failures: int


class Alternatives(NamedTuple):
    """Q(s_k, a) of each action at one turn, and its standard error; A actions. Less V(s_k) it is an advantage."""

    values: Real
    errors: Real
    failures: int


async def counterfactual(
    runner: Runner,
    trajectory: Trajectory,
    composer: Composer,
    *,
    continuations: int = 8,
    turns: Sequence[int] | None = None,
    seed: int = 0,
) -> Counterfactual:
    """Values before and after each of `turns` (all by default) from `continuations` episodes each, played by `runner`.

    Draws hang on (`seed`, episode, turn, continuation). Raises `ConfigError` for fewer than two continuations,
    `RecordError` for a failed trajectory or an environment that does not replay it, `Fault` where every continuation
    of a state failed.
    """
    taken, count = _taken(trajectory, composer), len(trajectory.turns)
    asked = range(count) if turns is None else turns
    if any(not 0 <= turn < count for turn in asked):
        raise ConfigError(f"turns are 0 to {count - 1} in this trajectory; got {list(asked)}")
    states = sorted({state for turn in asked for state in (turn, turn + 1)} - {count})
    starts = {state: (*taken[:state],) for state in states}
    means, errors, failures = await _returns(runner, trajectory, composer, starts, continuations, seed)
    whole = composer.trajectory(trajectory)
    expected, spread = np.full(count + 1, np.nan), np.full(count + 1, np.nan)
    expected[[*states, count]], spread[[*states, count]] = [*means, whole.value], [*errors, 0.0]
    return Counterfactual(
        values=expected - _earned(trajectory, composer),
        advantages=np.diff(expected),
        value_errors=spread,
        advantage_errors=np.hypot(spread[1:], spread[:-1]),
        failures=failures,
    )


async def alternatives(
    runner: Runner,
    trajectory: Trajectory,
    composer: Composer,
    turn: int,
    actions: Sequence[Action],
    *,
    continuations: int = 8,
    seed: int = 0,
) -> Alternatives:
    """What each of `actions` would have been worth at `turn`, in place of the one taken; see `counterfactual`."""
    taken = _taken(trajectory, composer)
    if not 0 <= turn < len(taken):
        raise ConfigError(f"turns are 0 to {len(taken) - 1} in this trajectory; got {turn}")
    starts = {number: (*taken[:turn], action) for number, action in enumerate(actions)}
    means, errors, failures = await _returns(runner, trajectory, composer, starts, continuations, seed, turn)
    return Alternatives(np.asarray(means) - _earned(trajectory, composer)[turn], np.asarray(errors), failures)


def _earned(trajectory: Trajectory, composer: Composer) -> Real:
    """What the trajectory was paid before each turn, its base included: [K+1]."""
    whole = composer.trajectory(trajectory)
    return whole.base + np.concatenate(([0.0], np.cumsum(by_turn(whole, trajectory))))


def _taken(trajectory: Trajectory, composer: Composer) -> list[Action]:
    """The actions of the trajectory, with their spans where it has them or was given them."""
    if trajectory.status == "failed":
        raise RecordError(f"{trajectory.episode.id} failed: it has no return to give credit for")
    if composer.derived:
        raise ConfigError(
            f"the reward reads {', '.join(composer.derived)}, which continuations do not have; leave it out"
        )
    given = trajectory.episode.guidance.start if trajectory.episode.guidance else ()
    actions = [turn.action for turn in iterate(trajectory.turns)]
    return [*given[: len(actions)], *actions[len(given) :]]


async def _returns(
    runner: Runner,
    trajectory: Trajectory,
    composer: Composer,
    starts: Mapping[int, tuple[Action, ...]],
    continuations: int,
    seed: int,
    *kind: int,
) -> tuple[list[float], list[float], int]:
    """Mean return and its standard error behind each start, and how many continuations failed."""
    if continuations < 2:
        raise ConfigError(f"a standard error needs at least 2 continuations; got {continuations}")
    episodes = [e for n, s in starts.items() for e in _continuations(trajectory, s, continuations, seed, n, *kind)]
    played = await runner.collect(episodes)
    means, errors, failures = [], [], 0
    for at, start in enumerate(starts.values()):
        mine = played[at * continuations : (at + 1) * continuations]
        good = [t for t in mine if t.status != "failed"]
        failures += len(mine) - len(good)
        _check(trajectory, mine, good, len(start) - len(kind))
        returns = np.asarray([composer.trajectory(t).value for t in good])
        means.append(float(returns.mean()))
        errors.append(float(returns.std(ddof=1) / np.sqrt(len(good))) if len(good) > 1 else np.inf)
    return means, errors, failures


def _continuations(
    trajectory: Trajectory, start: tuple[Action, ...], count: int, seed: int, *state: int
) -> list[Episode]:
    """Keyed episodes of the same task behind this start. The hint stays; a first reply that was said is not begun."""
    episode, given = trajectory.episode, trajectory.episode.guidance or Guidance()
    said = len(start) > len(given.start)
    guidance = given.replace(start=start, begin="" if said else given.begin)
    drawn = key(seed, "counterfactual", episode.id, *state) >> 11
    group = f"{episode.id}@{'.'.join(map(str, state))}"
    return [episode.replace(seed=drawn, member=member, group=group, guidance=guidance) for member in range(count)]


def _check(trajectory: Trajectory, played: Sequence[Trajectory], good: Sequence[Trajectory], same: int) -> None:
    """Every continuation saw what the trajectory saw up to the turn where it departs."""
    if not good:
        failure = played[0].failure
        why = "" if failure is None else f": {failure.kind}: {failure.message}"
        raise Fault(f"all {len(played)} continuations behind {same} turns of {trajectory.episode.id} failed{why}")
    recorded = [(t.agent, t.observation) for t in iterate(trajectory.turns)][: same + 1]
    for found in good:
        if [(t.agent, t.observation) for t in iterate(found.turns)][: same + 1] != recorded:
            raise RecordError(
                f"the recorded actions of {trajectory.episode.id} lead elsewhere in its first {same + 1} turns: "
                f"{trajectory.env} does not replay, and has no counterfactuals"
            )
