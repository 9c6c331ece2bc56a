"""Records: packed numbers as values, immutability, and a disk format that gives back what it was given."""

from __future__ import annotations

import copy
import pickle

import msgspec
import numpy as np
import pytest
from golden_runs import rich, simple
from hypothesis import given
from hypothesis import strategies as st

from agentgym.types import (
    Action,
    Array,
    Column,
    Columns,
    Draft,
    Episode,
    Floats,
    Ids,
    Message,
    Observation,
    RewardTerm,
    Segment,
    Task,
    TokenSpan,
    ToolCall,
    Trajectory,
    Turn,
    Turns,
    VersionRun,
    decode,
    encode,
    iterate,
    only,
    say,
    terms,
)

# --- packed numbers ---------------------------------------------------------------------------------------------

_ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)
_floats = st.lists(st.floats(width=32, allow_nan=False), max_size=20)


@given(_ids, _floats)
def test_packed_numbers_are_values(ids: list[int], floats: list[float]) -> None:
    for kind, values in ((Ids, ids), (Floats, floats)):
        packed = kind(values)
        assert list(packed) == values
        assert len(packed) == len(values)
        assert packed == kind(np.asarray(values, kind.dtype)) == kind(packed) == kind(packed.data)
        assert hash(packed) == hash(kind(values))
        assert pickle.loads(pickle.dumps(packed)) == copy.deepcopy(packed) == packed
        assert packed + packed == kind(values * 2)
        assert packed[1:] == kind(values[1:])
        assert [packed[i] for i in range(len(values))] == values


def test_packed_numbers_of_another_kind_or_value_differ() -> None:
    assert Ids([1, 2]) != Ids([1, 3])
    assert Ids([]) != Floats([])
    assert Ids([0]) != Floats([0.0])
    assert len({Ids([1]), Ids([1]), Floats([1])}) == 2


def test_the_view_shares_the_bytes_and_is_read_only() -> None:
    packed = Ids(range(1000))
    view = packed.numpy()
    assert np.shares_memory(view, np.frombuffer(packed.data, np.uint8))
    assert view.nbytes == 4 * len(packed) == len(packed.data)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 7
    with pytest.raises(AttributeError, match="Ids is immutable"):
        packed.data = b""


def test_packed_numbers_say_what_they_are() -> None:
    assert repr(Ids(range(9))) == "Ids([0, 1, 2, 3, 4, 5, ...], n=9)"
    assert repr(Floats([0.5])) == "Floats([0.5], n=1)"
    with pytest.raises(IndexError):
        Ids([1])[1]


@given(st.sampled_from(["<f8", ">f4", "<i2", "|b1", "|u1"]), st.lists(st.integers(0, 1), min_size=6, max_size=6))
def test_arrays_keep_type_shape_and_bytes(dtype: str, values: list[int]) -> None:
    given_array = np.asarray(values, dtype).reshape(2, 3)
    held = Array.of(given_array)
    assert (held.numpy() == given_array).all()
    assert held.numpy().shape == (2, 3)
    assert held.dtype == np.dtype(dtype).newbyteorder("<").str
    assert not held.numpy().flags.writeable
    assert decode(encode(held), Array) == held == Array.of(given_array.copy())


def test_an_array_holds_numbers_only() -> None:
    with pytest.raises(TypeError, match="an Array holds numbers"):
        Array.of([{"a": 1}, None])
    assert Array.of(3).item() == 3


# --- records ----------------------------------------------------------------------------------------------------


def test_records_are_immutable_and_compared_by_value() -> None:
    task = Task(env="test-v0", payload={"a": 1})
    with pytest.raises(AttributeError, match="immutable"):
        task.seed = 3
    changed = task.replace(seed=3)
    assert (task.seed, changed.seed) == (0, 3)
    assert task == Task(env="test-v0", payload={"a": 1}) != changed
    with pytest.raises(TypeError):
        Task("test-v0")


def test_task_ids_depend_on_content_alone() -> None:
    task = Task(env="test-v0", payload={"a": 1, "b": 2})
    assert task.id == Task(env="test-v0", payload={"b": 2, "a": 1}).id
    assert task.id != task.replace(seed=1).id
    assert Episode(task=task, seed=4, member=2).id == f"{task.id}.4.2"
    assert Episode(task=task, seed=4, member=2, group="g7").id == "g7.4.2"


def test_spans_come_in_the_order_of_sampling() -> None:
    spans = [TokenSpan(ids=Ids([i])) for i in range(3)]
    drafts = tuple(Draft(by="agent", action=Action(span=s)) for s in spans[:2])
    turn = Turn(
        step=0,
        observation=Observation(),
        action=Action(span=spans[2]),
        drafts=(*drafts, Draft(by="x", action=Action())),
    )
    assert turn.spans == tuple(spans)
    t = simple()[0].replace(turns=Turns(items=(turn, turn)))
    assert [i for i, _ in t.spans] == [0, 0, 0, 1, 1, 1]


def test_content_forgets_what_a_clock_wrote() -> None:
    timed = rich()[0]
    later = timed.replace(
        seconds=9.0,
        turns=Turns(items=tuple(t.replace(timing=None) for t in timed.turns.items)),  # type: ignore[union-attr]
    )
    assert timed != later
    assert timed.content() == later.content()


def test_text_of_a_message_skips_images() -> None:
    assert rich()[0].turns[0].observation.messages[0].text == "look"
    assert Message(role="user", content="plain").text == "plain"


def test_columns_build_turns_in_the_order_of_steps() -> None:
    def column(steps: list[int], rewards: list[float]) -> Column:
        shape = Array.of(np.asarray(steps, "<f4")[:, None])
        return Column(steps=Ids(steps), observations=shape, actions=shape, rewards={"r": Floats(rewards)})

    turns = Columns(agents={"b": column([0, 2], [1, 2]), "a": column([0, 1], [3, float("nan")])})
    assert [(t.step, t.agent) for t in iterate(turns)] == [(0, "b"), (0, "a"), (1, "a"), (2, "b")]
    assert turns[-1] == turns[3]
    assert turns[1].rewards == (RewardTerm(name="r", value=3.0, turn=1, agent="a"),)
    assert turns[2].rewards == ()
    assert turns[3].observation.array == Array.of(np.asarray([2.0], "<f4"))
    assert (turns[0].action.logprob, turns[0].action.state, turns[0].observation.action_mask) == (None, None, None)
    with pytest.raises(IndexError):
        turns[4]


def test_small_helpers() -> None:
    assert only({"agent": 3}) == 3
    with pytest.raises(ValueError, match="too many"):
        only({"a": 1, "b": 2})
    assert [m.text for m in say("a", "b", role="system").messages] == ["a", "b"]
    assert terms({"x": 1}, level="episode", agent="a") == (RewardTerm(name="x", value=1.0, level="episode", agent="a"),)


# --- disk format ------------------------------------------------------------------------------------------------

_text = st.text(max_size=6)
_spans = st.builds(
    TokenSpan,
    prompt=_ids.map(Ids),
    ids=_ids.map(Ids),
    logprobs=_floats.map(Floats),
    versions=st.lists(st.builds(VersionRun, start=st.integers(0, 9), version=st.integers(0, 9)), max_size=2).map(tuple),
    segments=st.lists(st.builds(Segment, label=_text, start=st.just(0), stop=st.just(2)), max_size=2).map(tuple),
    parent=st.none() | st.tuples(st.integers(0, 3), st.integers(0, 9)),
    context=st.sampled_from(["original", "hinted"]),
)
_json = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | _text, lambda x: st.lists(x, max_size=2))
_calls = st.builds(ToolCall, name=_text, arguments=st.dictionaries(_text, _json, max_size=2), id=_text)
_actions = st.builds(
    Action,
    text=_text,
    tool_calls=st.lists(_calls, max_size=2).map(tuple),
    span=st.none() | _spans,
    logprob=st.none() | st.floats(-5, 0),
)
_turns = st.builds(
    Turn,
    step=st.integers(0, 5),
    observation=st.builds(say, _text),
    action=_actions,
    drafts=st.lists(st.builds(Draft, by=_text, action=_actions), max_size=1).map(tuple),
    rewards=st.dictionaries(_text, st.floats(-1, 1), max_size=2).map(terms),
)
_trajectories = st.builds(
    Trajectory,
    env=_text,
    episode=st.builds(Episode, task=st.builds(Task, env=_text, payload=st.dictionaries(_text, _json, max_size=2))),
    turns=st.lists(_turns, max_size=3).map(lambda items: Turns(items=tuple(items))),
    status=st.sampled_from(["terminated", "truncated"]),
    labels=st.dictionaries(_text, _text, max_size=2),
)


@given(_trajectories)
def test_a_trajectory_survives_the_disk_and_a_process_boundary(trajectory: Trajectory) -> None:
    assert decode(encode(trajectory), Trajectory) == trajectory
    assert pickle.loads(pickle.dumps(trajectory)) == trajectory


@pytest.mark.parametrize("trajectory", [*simple(), *rich()], ids=lambda t: t.episode.id)
def test_every_field_survives_the_disk(trajectory: Trajectory) -> None:
    again = decode(encode(trajectory), Trajectory)
    assert again == trajectory
    assert list(iterate(again.turns)) == list(iterate(trajectory.turns))
    assert list(again.rewards) == list(trajectory.rewards)


def test_tokens_cost_four_bytes_and_defaults_nothing() -> None:
    span = TokenSpan(ids=Ids(range(500)), logprobs=Floats([0.5] * 500))
    assert len(encode(span)) < 2 * 500 * 4 + 40
    assert encode(TokenSpan()) == b"\xde\x00\x00", "a map of no entry"


def test_bytes_that_are_no_such_record_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field `env`"):
        decode(encode(Message(role="user")), Task)
    with pytest.raises(TypeError, match="a record cannot hold complex"):
        encode(Task(env="x", payload={"a": 1j}))
    assert decode(encode(Task(env="x", payload={"n": np.int64(3)})), Task).payload == {"n": 3}
