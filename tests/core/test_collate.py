"""Collate: every sampled token exactly once, with its own log-prob and advantage; branches; bounds; refusals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import span, trajectory

from agentgym.collate import UNRECORDED, collate, sequences, trained_tokens
from agentgym.errors import ConfigError, RecordError
from agentgym.types import (
    Action,
    Batch,
    Draft,
    Episode,
    Floats,
    Observation,
    Segment,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
)


def played(*turns: Turn) -> Trajectory:
    return Trajectory(
        env="test-v0", episode=Episode(task=Task(env="test-v0")), turns=Turns(items=turns), status="terminated"
    )


def turn(found: TokenSpan, step: int = 0, agent: str = "agent", drafts: tuple[Draft, ...] = ()) -> Turn:
    return Turn(step=step, agent=agent, observation=Observation(), action=Action(span=found), drafts=drafts)


def one(t: Trajectory, values: list[float], **options: object) -> Batch:
    (batch,) = collate([t], [np.asarray(values)], max_tokens=1000, **options)  # type: ignore[arg-type]
    return batch


# --- by hand ----------------------------------------------------------------------------------------------------


def test_columns_of_one_sequence_by_hand() -> None:
    first = span(
        [5, 6, 7],
        prompt=[1, 2],
        suffix=[9],
        versions=(VersionRun(start=0, version=3), VersionRun(start=2, version=4)),
        segments=(Segment(label="think", start=0, stop=2),),
        logprobs=Floats([-1, -2, -3]),
    )
    second = span([8], prompt=[4], logprobs=Floats([-1]), sampled_logprobs=Floats([-0.5]), versions=())
    found = one(played(turn(first), turn(second, step=1)), [0.5, -2.0])
    assert found.ids.tolist() == [1, 2, 5, 6, 7, 9, 4, 8]
    assert found.mask.tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
    assert found.advantages.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, -2]
    assert found.logprobs.tolist() == [0, 0, -1, -2, -3, 0, 0, -0.5]
    assert found.versions.tolist() == [-1, -1, 3, 3, 4, -1, -1, UNRECORDED]
    assert found.turns.tolist() == [-1, -1, 0, 0, 0, -1, -1, 1]
    assert [found.labels[s] for s in found.segments] == ["", "", "think", "think", "", "", "", ""]
    assert found.bounds.tolist() == [0, 8]
    assert found.positions.tolist() == list(range(8))
    assert (found.ids.dtype, found.mask.dtype, found.bounds.dtype) == (np.int32, np.float32, np.int64)


def test_agents_and_branches_are_sequences_of_their_own() -> None:
    base, aside = span([5, 6], prompt=[1, 2]), span([7], prompt=[3], branch=1, parent=(0, 3))
    fresh = span([8], prompt=[1], branch=2, parent=(0, 0))
    found = one(
        played(turn(base), turn(aside, 1), turn(fresh, 2), turn(span([9], prompt=[4]), 2, "critic")), [1, 2, 3, 4]
    )
    rows = [found.ids[a:b].tolist() for a, b in zip(found.bounds, found.bounds[1:], strict=False)]
    masks = [found.mask[a:b].tolist() for a, b in zip(found.bounds, found.bounds[1:], strict=False)]
    assert rows == [[1, 2, 5, 3, 7], [1, 2, 5, 6], [1, 8], [4, 9]]
    assert masks == [[0, 0, 0, 0, 1], [0, 0, 1, 1], [0, 1], [0, 1]]
    assert trained_tokens([found]) == 5
    assert sequences([found]) == 4


def test_rejected_drafts_stay_as_context_and_are_not_trained_on() -> None:
    proposal = Draft(by="agent", action=Action(span=span([5], prompt=[1])))
    remark = Draft(by="critic", action=Action(span=span([6], prompt=[2])))
    found = one(played(turn(span([7], prompt=[3]), drafts=(proposal, remark))), [1.5])
    assert found.ids.tolist() == [1, 5, 3, 7]
    assert found.mask.tolist() == [0, 0, 0, 1]
    assert found.advantages.tolist() == [0, 0, 0, 1.5]


def test_failed_and_untrained_trajectories_are_left_out() -> None:
    failed = trajectory([{}], status="failed")
    silent = trajectory([{}], tokens=0)
    good = trajectory([{}], tokens=2)
    batches = collate([failed, silent, good], [np.zeros(0), np.ones(1), np.ones(1)], max_tokens=100)
    assert [b.owners.tolist() for b in batches] == [[2]]
    assert collate([failed], [np.zeros(0)], max_tokens=100) == []


def test_imitation_needs_no_logprobs() -> None:
    demonstration = played(turn(span([5, 6], logprobs=Floats())))
    with pytest.raises(RecordError, match=r"2 sampled ids and 0 log-probs; .* behaviour=False"):
        one(demonstration, [1.0])
    assert one(demonstration, [1.0], behaviour=False).logprobs.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("t", "values", "error", "says"),
    [
        (trajectory([{}, {}]), [1.0], RecordError, "1 advantages for the 2 turns"),
        (trajectory([{}], tokens=999), [1.0], ConfigError, "1001 tokens does not fit .* max_tokens = 1000"),
        (played(turn(span([5], prompt=[]))), [1.0], RecordError, "needs a prompt"),
        (played(turn(span([5], logprobs=Floats([-1, -2])))), [1.0], RecordError, "1 sampled ids and 2 log-probs"),
        (played(turn(span([5], branch=1, parent=(0, 2)))), [1.0], RecordError, "branch 0, which does not exist"),
        (
            played(turn(span([5])), turn(span([5], branch=1, parent=(0, 9)), 1)),
            [1.0, 1.0],
            RecordError,
            "after 9 tokens of branch 0, which has 3 tokens",
        ),
    ],
)
def test_spans_that_do_not_add_up_are_refused(t: Trajectory, values: list[float], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        one(t, values)


# --- properties -------------------------------------------------------------------------------------------------

_span = st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(0, 2), st.integers(0, 2))
_episodes = st.lists(
    st.tuples(st.lists(st.tuples(_span, st.sampled_from("ab")), min_size=1, max_size=4), st.booleans()),
    min_size=1,
    max_size=6,
)


def build(rows: list, owner: int, failed: bool) -> Trajectory:
    """Sampled ids, log-probs and versions are all made unique by a running number."""
    turns, number = [], 1000 * (owner + 1)
    for step, ((prompt, sampled, suffix, branch), agent) in enumerate(rows):
        ids = range(number, number + sampled)
        number += sampled
        found = span(
            ids, prompt=[1] * prompt, suffix=[2] * suffix, branch=branch, logprobs=Floats([-i / 8 for i in ids])
        )
        turns.append(turn(found, step, agent))
    made = played(*turns)
    return made.replace(status="failed") if failed else made  # type: ignore[no-any-return]


@given(_episodes, st.integers(40, 120))
def test_every_sampled_token_is_trained_once_with_its_own_figures(rows: list, max_tokens: int) -> None:
    trajectories = [build(turns, i, failed) for i, (turns, failed) in enumerate(rows)]
    values = [np.asarray([0.5 * i - k for k in range(len(t.turns))]) for i, t in enumerate(trajectories)]
    batches = collate(trajectories, values, max_tokens=max_tokens)
    expected = Counter(
        (i, k, token, -token / 8, 0.5 * i - k)
        for i, t in enumerate(trajectories)
        if t.status != "failed"
        for k, found in t.spans
        for token in found.ids
    )
    seen: Counter = Counter()
    for b in batches:
        assert len(b.ids) <= max_tokens
        owners = np.repeat(b.owners, np.diff(b.bounds))
        on = b.mask == 1
        columns = (owners[on], b.turns[on], b.ids[on], b.logprobs[on], b.advantages[on])
        seen.update(zip(*(c.tolist() for c in columns), strict=True))
        assert not b.advantages[~on].any()
        assert not b.mask[b.bounds[:-1]].any()
        assert (b.positions == np.concatenate([np.arange(n) for n in np.diff(b.bounds)])).all()
    assert seen == expected
    assert trained_tokens(batches) == sum(expected.values())


@given(_episodes)
def test_packing_is_deterministic_and_longest_first(rows: list) -> None:
    trajectories = [build(turns, i, failed=False) for i, (turns, _) in enumerate(rows)]
    values = [np.zeros(len(t.turns)) for t in trajectories]
    once, again = (collate(trajectories, values, max_tokens=60) for _ in range(2))
    lengths = [n for b in once for n in np.diff(b.bounds).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    for a, b in zip(once, again, strict=True):
        assert a.ids.tobytes() == b.ids.tobytes()
        assert a.owners.tolist() == b.owners.tolist()
