"""What else can be an environment: gymnasium ids, tool classes, verifier functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import agentgym
from agentgym.adapters import adapt, docstring, legality, tools_of, verified
from agentgym.env import Environment
from agentgym.errors import ConfigError, MissingExtra, UnknownName
from agentgym.policy import Scripted
from agentgym.registry import catalogue, register, unregister
from agentgym.rollout import Runner, episodes
from agentgym.testing.fakes import CountingEnv
from agentgym.types import Action, Array, Message, Observation, ToolCall, Trajectory, iterate


def played(env: Environment, *actions: Action, count: int = 1) -> list[Trajectory]:
    """The first episodes with these actions in order."""

    def script(episode: object, agent: str) -> Any:
        left = iter(actions)
        return lambda observation: next(left)

    return Runner(env, Scripted(script), retries=0).run_sync(islice(episodes(env.tasks()), count))


def call(name: str, **arguments: Any) -> Action:
    return Action(tool_calls=(ToolCall(name=name, arguments=arguments, id="c1"),))


# --- gymnasium --------------------------------------------------------------------------------------------------


def test_an_unknown_gymnasium_id_says_what_gymnasium_says() -> None:
    with pytest.raises(UnknownName, match=r"gymnasium has no 'CartPole-v9'.*versioned environments: \[ `v0`, `v1` \]"):
        agentgym.make("gym:CartPole-v9")
    with pytest.raises(ConfigError, match=r"cannot make 'CartPole-v1' with \{'gravity_field': 3\}"):
        agentgym.make("gym:CartPole-v1", gravity_field=3)


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(MissingExtra, match=r"gym:CartPole-v1 needs the extra \[gym\]"):
        agentgym.make("gym:CartPole-v1")


def test_gymnasium_ids_do_not_crowd_the_catalogue() -> None:
    assert not [name for name in catalogue() if name.startswith("gym:")]


@pytest.mark.parametrize(
    ("space", "given", "taken"),
    [
        (spaces.Discrete(3), np.int64(2), 2),
        (spaces.Discrete(3), np.array([1.0]), 1),
        (spaces.Discrete(3, start=-1), -1, -1),
        (spaces.Discrete(3), 3, None),
        (spaces.Discrete(3), -1, None),
        (spaces.Discrete(3), 0.5, None),
        (spaces.Discrete(3), [0, 1], None),
        (spaces.Box(-1, 1, (2,)), [0.5, -9.0], [0.5, -1.0]),
        (spaces.Box(-1, 1, (2,)), [0.5], None),
        (spaces.Box(-1, 1, (2,)), [0.5, np.nan], None),
        (spaces.MultiDiscrete([2, 3]), [1, 2], [1, 2]),
        (spaces.MultiDiscrete([2, 3]), [2, 2], None),
        (spaces.MultiDiscrete([2, 3]), [0.5, 2], None),
        (spaces.MultiBinary(2), [0, 1], [0, 1]),
        (spaces.MultiBinary(2), [0, 2], None),
    ],
)
def test_what_an_action_array_becomes(space: Any, given: Any, taken: Any) -> None:
    found = legality(space, "gym:x")(Array.of(given))
    if taken is None:
        assert found is None
    else:
        assert np.array_equal(found, taken)
        assert space.contains(np.int64(found) if isinstance(found, int) else found)


def test_arrays_that_cannot_be_read_are_illegal_and_odd_spaces_are_refused() -> None:
    check = legality(spaces.Discrete(2), "gym:x")
    assert check(None) is None
    assert check(Array(dtype="<f4", shape=(3,), data=b"12")) is None
    assert check(Array(dtype="no such type", shape=(), data=b"1")) is None
    with pytest.raises(ConfigError, match="supported are Discrete, Box"):
        legality(spaces.Text(3), "gym:x")


def test_an_illegal_action_is_an_outcome_and_not_a_fault() -> None:
    env = agentgym.make("gym:CartPole-v1")
    (found,) = played(env, Action(array=Array.of(1)), Action(text="to the left, please"))
    assert found.status == "terminated"
    assert [(r.name, r.value) for r in found.rewards] == [("reward", 1.0), ("invalid", -1.0)]
    assert found.metrics == {"invalid": 1.0}
    assert found.turns[1].action.text == "to the left, please"


def test_action_masks_and_discrete_observations() -> None:
    env = agentgym.make("gym:" + max(name for name in gymnasium.registry if name.startswith("Taxi-v")))
    (found,) = played(env, *[Action(array=Array.of(0))] * 200)
    assert found.status == "truncated"
    first = found.turns[0].observation
    assert first.array is not None
    assert first.array.shape == ()
    assert first.action_mask is not None
    assert first.action_mask.shape == (6,)
    assert found.final


def test_config_goes_to_gymnasium() -> None:
    env = agentgym.make("gym:CartPole-v1", max_episode_steps=2)
    (found,) = played(env, *[Action(array=Array.of(1))] * 2)
    assert (found.status, len(found.turns)) == ("truncated", 2)


# --- a class with tools -----------------------------------------------------------------------------------------


class Notes:
    """A notebook that wants a number of notes."""

    def __init__(self, limit: int = 3) -> None:
        self.limit, self.notes, self.done = limit, [""][:0], False

    def reset(self, seed: int = 0, wanted: int = 2, **row: Any) -> str:
        self.wanted = wanted
        return f"Write {wanted} notes."

    async def write(self, text: str, times: int = 1, mood: Literal["calm", "cross"] = "calm") -> dict[str, int]:
        """Write a note.

        Args:
            text: What it says, in
                one line.
            times (int): How often.
        """
        self.notes += [text] * times
        self.done = len(self.notes) >= self.limit
        return {"notes": len(self.notes)}

    def read(self, index: int) -> str:
        """Read a note."""
        return self.notes[index]

    def burn(self) -> None:
        """Burn the notebook."""
        raise OSError("no matches")

    def _private(self) -> None:
        raise AssertionError("not a tool")

    def get_reward(self) -> dict[str, float]:
        return {"written": float(len(self.notes) == self.wanted)}


@pytest.fixture
def notes() -> Iterator[str]:
    register("notes-v0", Notes)
    yield "notes-v0"
    unregister("notes-v0")


def test_schemas_come_from_signatures_and_docstrings() -> None:
    tools = tools_of(Notes)
    assert sorted(tools) == ["burn", "read", "write"]
    assert tools["write"].schema == {
        "type": "function",
        "function": {
            "name": "write",
            "description": "Write a note.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "What it says, in one line."},
                    "times": {"type": "integer", "description": "How often.", "default": 1},
                    "mood": {"enum": ["calm", "cross"], "default": "calm"},
                },
                "required": ["text"],
                "additionalProperties": False,
            },
        },
    }
    assert docstring(Notes.burn) == ("Burn the notebook.", {})


def test_a_tool_class_is_an_environment(notes: str) -> None:
    env = agentgym.make(notes)
    (found,) = played(env, call("write", text="a"), call("write", text="b"), Action(text="done"))
    first, second = found.turns[0].observation, found.turns[1].observation
    assert first.messages == (Message(role="user", content="Write 2 notes."),)
    assert len(first.tools) == 3
    assert second.messages == (Message(role="tool", content='{"notes":1}', tool_call_id="c1", name="write"),)
    assert [(r.name, r.value, r.level) for r in found.rewards] == [("written", 1.0, "episode")]
    assert found.env == notes


def test_wrong_calls_are_told_and_counted(notes: str) -> None:
    wrong = [
        call("wriet", text="a"),
        call("write", note="a"),
        call("write", text="a", times="many"),
        call("read", index=7),
    ]
    (found,) = played(agentgym.make(notes), *wrong, Action(text="I give up"))
    told = [t.observation.messages[0].text for t in iterate(found.turns)][1:]
    assert told[0] == "error: no tool 'wriet'; did you mean 'write'?"
    assert "note" in told[1]
    assert "$.times" in told[2]
    assert told[3] == "error: list index out of range"
    assert (found.status, found.metrics) == ("terminated", {"invalid_calls": 4.0})


def test_a_tool_that_breaks_is_a_fault_and_done_ends_the_episode(notes: str) -> None:
    (broken,) = played(agentgym.make(notes), call("burn"))
    assert broken.failure is not None
    assert (broken.failure.kind, broken.failure.message) == ("tool", "step: burn raised OSError: no matches")
    (full,) = played(agentgym.make(notes, limit=1), call("write", text="a"))
    assert (full.status, len(full.turns)) == ("terminated", 1)


def test_rows_are_tasks_with_a_prompt_before_the_first_words(notes: str) -> None:
    rows = {"train": [{"prompt": [{"role": "system", "content": "Be brief."}], "wanted": 1}], "test": []}
    env = agentgym.make(notes, rows=rows)
    (found,) = played(env, Action(text="done"))
    assert [m.text for m in found.turns[0].observation.messages] == ["Be brief.", "Write 1 notes."]
    assert list(env.tasks("test")) == []
    with pytest.raises(UnknownName, match="no split of notes-v0 'tset'; did you mean 'test'"):
        list(env.tasks("tset"))
    with pytest.raises(UnknownName, match="did you mean 'limit'"):
        agentgym.make(notes, limt=1)


def test_episodes_of_a_tool_class_do_not_share_state(notes: str) -> None:
    found = played(agentgym.make(notes), call("write", text="a"), call("write", text="b"), Action(), count=20)
    assert [next(iter(t.rewards)).value for t in found] == [1.0] * 20


class Varied:
    def reset(self) -> None:
        return None

    def act(self, *words: str) -> str:
        return " ".join(words)


class Bare:
    def reset(self) -> None:
        return None


def test_classes_that_cannot_have_tools_say_why() -> None:
    with pytest.raises(ConfigError, match=r"tool act: \*args"):
        adapt("varied-v0", Varied, {})
    with pytest.raises(ConfigError, match="Bare has no public method besides reset"):
        adapt("bare-v0", Bare, {})


# --- verifiers --------------------------------------------------------------------------------------------------


def addition(seed: int, top: int = 10) -> tuple[str, Any]:
    a, b = seed % top, seed // top % top
    return f"{a} + {b} = ?", lambda text: float(text.strip() == str(a + b))


def test_a_function_of_a_seed_with_a_verifier() -> None:
    env = adapt("addition-v0", addition, {"top": 5})
    (right,) = Runner(env, Scripted(lambda episode, agent: _add)).run_sync(islice(episodes(env.tasks()), 1))
    (wrong,) = played(env, Action(text="eleven"))
    assert [(r.name, r.value) for t in (right, wrong) for r in t.rewards] == [("reward", 1.0), ("reward", 0.0)]
    assert [t.metrics["success"] for t in (right, wrong)] == [1.0, 0.0]
    with pytest.raises(UnknownName, match="did you mean 'top'"):
        adapt("addition-v0", addition, {"tpo": 5})


def _add(observation: Observation) -> Action:
    a, _, b, *_ = observation.messages[0].text.split()
    return Action(text=str(int(a) + int(b)))


def test_rows_with_a_verifier_and_scores_by_name() -> None:
    rows = [{"prompt": "capital of France?", "answer": "Paris"}, {"prompt": "and of Spain?", "answer": "Madrid"}]
    env = adapt(
        "quiz-v0", verified(rows, lambda text, row: {"success": row["answer"] in text, "short": len(text) < 9}), {}
    )
    found = played(env, Action(text="Paris"), count=2)
    assert [t.env for t in found] == ["quiz-v0"] * 2
    assert [{r.name: r.value for r in t.rewards} for t in found] == [
        {"success": 1, "short": 1},
        {"success": 0, "short": 1},
    ]
    assert [t.metrics["success"] for t in found] == [1.0, 0.0]


def test_a_verifier_that_returns_no_number_is_a_fault() -> None:
    env = adapt("quiz-v0", verified([{"prompt": "?"}], lambda text, row: "good"), {})
    (found,) = played(env, Action(text="x"))
    assert found.failure is not None
    assert "a reward is a number" in found.failure.message


def test_what_is_no_environment_is_refused_with_the_accepted_shapes() -> None:
    with pytest.raises(ConfigError, match=r"made int; it must make an Environment, be a class with reset\(\*\*row\)"):
        adapt("wrong-v0", lambda: 3, {})
    assert adapt("mine-v3", CountingEnv, {"turns": 2}).id == "mine-v3"
