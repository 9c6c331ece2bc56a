"""Small records for the tests of the core: language trajectories with spans, and ledgers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agentgym.rewards import composer
from agentgym.types import (
    Action,
    Episode,
    Failure,
    Floats,
    Ids,
    Observation,
    RewardTerm,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
)


def span(ids: Sequence[int], prompt: Sequence[int] = (1, 2), suffix: Sequence[int] = (), **fields: object) -> TokenSpan:
    given = {
        "logprobs": Floats([-0.125 * (i % 7) - 0.25 for i in ids]),
        "versions": (VersionRun(start=0, version=3),),
        **fields,
    }
    return TokenSpan(prompt=Ids(prompt), ids=Ids(ids), suffix=Ids(suffix), **given)  # type: ignore[arg-type]


def ledger(amounts: Mapping[str, float], turn: int = -1) -> tuple[RewardTerm, ...]:
    return tuple(RewardTerm(name=name, value=value, turn=turn) for name, value in amounts.items())


def trajectory(
    rewards: Sequence[Mapping[str, float]],
    *,
    tokens: Sequence[int] | int = 1,
    group: str = "g",
    anchors: Sequence[str] = (),
    status: str = "terminated",
    **fields: object,
) -> Trajectory:
    """One turn for every table of rewards; `tokens` sampled ids in each turn."""
    counts = [tokens] * len(rewards) if isinstance(tokens, int) else tokens
    turns = tuple(
        Turn(
            step=i,
            observation=Observation(anchor=anchors[i] if anchors else ""),
            action=Action(text="hello", span=span(range(10 * i + 5, 10 * i + 5 + counts[i]))),
            rewards=ledger(amounts, turn=i),
        )
        for i, amounts in enumerate(rewards)
    )
    failure = Failure(kind="environment", message="broken") if status == "failed" else None
    episode = Episode(task=Task(env="test-v0"), group=group)
    return Trajectory(
        env="test-v0", episode=episode, turns=Turns(items=turns), status=status, failure=failure, **fields
    )  # type: ignore[arg-type]


def samples(trajectories: Sequence[Trajectory], declaration: object = "sum") -> list:
    compose = composer(declaration)  # type: ignore[arg-type]
    return [(t, None if t.status == "failed" else compose.trajectory(t)) for t in trajectories]
