"""The records hold what they were given, compare by value, and come back from the disk."""

from __future__ import annotations

import pickle

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym.types import (
    Action,
    Array,
    Column,
    Columns,
    Episode,
    Floats,
    Ids,
    Message,
    Observation,
    RewardTerm,
    Task,
    Timing,
    TokenSpan,
    ToolCall,
    Trajectory,
    Turn,
    Turns,
    decode,
    encode,
    iterate,
    say,
)


def test_packed_numbers_are_values():
    ids = Ids([1, 2, 3])
    assert ids == Ids(np.array([1, 2, 3]))
    assert hash(ids) == hash(Ids([1, 2, 3]))
    assert ids != Ids([1, 2])
    assert Ids() != Floats()
    assert (list(ids), ids[1], ids[1:], ids + Ids([4])) == ([1, 2, 3], 2, Ids([2, 3]), Ids([1, 2, 3, 4]))
    assert pickle.loads(pickle.dumps(ids)) == ids
    assert len(ids.data) == 12
    with pytest.raises(AttributeError, match="immutable"):
        ids.data = b""
    with pytest.raises(ValueError, match="read-only"):
        ids.numpy()[0] = 7


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
@settings(max_examples=30, deadline=None)
def test_floats_keep_every_float32(values):
    assert list(Floats(values)) == values


@pytest.mark.parametrize("values", [np.int64(3), np.zeros((2, 3)), np.array([True, False]), np.arange(4, dtype=">i2")])
def test_arrays_keep_dtype_and_shape(values):
    array = decode(encode(Array.of(values)), Array)
    assert array.numpy().shape == np.shape(values)
    assert np.array_equal(array.numpy(), values)


def test_arrays_hold_numbers_only():
    with pytest.raises(TypeError, match="holds numbers"):
        Array.of([object()])


def test_task_ids_depend_on_content_alone():
    one, other = (Task(env="a-v0", payload=p) for p in ({"x": 1, "y": 2}, {"y": 2, "x": 1}))
    assert one.id == other.id
    assert one.id != one.replace(seed=1).id != one.replace(split="test", seed=1).id


def trajectory():
    span = TokenSpan(prompt=Ids([1]), ids=Ids([2, 3]), logprobs=Floats([-0.5, -1.5]))
    turn = Turn(
        step=0,
        observation=say("hello"),
        action=Action(tool_calls=(ToolCall(name="f", arguments={"x": [1, None, "y"]}),), span=span),
        rewards=(RewardTerm(name="r", value=0.1, turn=0),),
        timing=Timing(start=1.0, policy=2.0, environment=3.0),
    )
    return Trajectory(
        env="a-v0", episode=Episode(task=Task(env="a-v0")), turns=Turns(items=(turn,)), status="terminated", seconds=9.0
    )


def test_trajectories_come_back_from_the_disk():
    found = decode(encode(trajectory()), Trajectory)
    assert found == trajectory()
    assert next(found.spans)[1].ids == Ids([2, 3])
    assert [term.name for term in found.rewards] == ["r"]


def test_content_leaves_out_what_a_clock_wrote():
    one = trajectory()
    later = one.replace(
        seconds=1.0, turns=Turns(items=tuple(t.replace(timing=Timing(start=5.0)) for t in one.turns.items))
    )
    assert one != later
    assert one.content() == later.content()


def test_columns_are_turns_in_order_of_steps():
    def column(steps, scale):
        rows = len(steps)
        seen, done = np.arange(rows, dtype="<f4")[:, None] * scale, np.arange(rows)
        return Column(
            steps=Ids(steps), observations=Array.of(seen), actions=Array.of(done), rewards={"r": Floats(range(rows))}
        )

    turns = Columns(agents={"b": column([0, 2], 1.0), "a": column([0, 1], 10.0)})
    assert [(t.step, t.agent) for t in iterate(turns)] == [(0, "b"), (0, "a"), (1, "a"), (2, "b")]
    assert turns[2].observation.array.item() == 10.0
    assert turns[2].rewards == (RewardTerm(name="r", value=1.0, turn=2, agent="a"),)


def test_invalid_records_are_refused_when_read():
    data = msgspec.msgpack.encode({"messages": [{"role": "narrator"}]})
    with pytest.raises(msgspec.ValidationError, match="narrator"):
        decode(data, Observation)


def test_a_lone_surrogate_does_not_cost_the_record():
    action = Action(text="\ud800", tool_calls=(ToolCall(name="f", arguments={"\udfff": ["ok", "a\ud800"]}),))
    with pytest.raises(UnicodeEncodeError):
        encode(action, strict=True)
    found = decode(encode(action), Action)
    assert found.text == "\\ud800"
    assert found.tool_calls[0].arguments == {"\\udfff": ["ok", "a\\ud800"]}
    whole = trajectory()
    marred = whole.replace(final={"agent": Observation(messages=(Message(role="user", content="\ud800"),))})
    assert decode(encode(marred), Trajectory).turns == whole.turns
