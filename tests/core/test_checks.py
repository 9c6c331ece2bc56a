"""`check_env` and `check_policy` find each defect, name it, and blame nothing else."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager

import pytest
from broken_envs import BROKEN, BlocksOnGarbage, Clerk, Duel, GlobalRandom, HangsOnGarbage, HashOrder, RaisesOnGarbage
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agentgym import Action
from agentgym.policy import Scripted
from agentgym.seeding import rng
from agentgym.testing import CheckFailed, CountingEnv, FakePolicy, SimulatedPolicy, check_env, check_policy
from agentgym.testing.actions import garbage, random_action, value_of
from agentgym.testing.capabilities import paired_interval, t_quantile
from agentgym.testing.drive import difference
from agentgym.testing.policy_checks import sound_span
from agentgym.types import Array, Floats, Ids, Observation, TokenSpan, VersionRun

QUICK = {"episodes": 6, "patience": 1.0, "seconds": 10.0}


def failed(report):
    return [c.name for c in report.failures]


def test_a_sound_environment_passes_every_check():
    report = check_env(Clerk(), **{**QUICK, "seconds": 60.0})  # a loaded machine needs patience
    report.raise_for_failures()
    assert {c.status for c in report.checks} == {"passed"}, str(report)
    assert report.exit_code == 0


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_each_defect_fails_its_check_and_no_other(kind):
    seconds = 1.0 if kind is BlocksOnGarbage else 60.0  # a loaded machine needs patience
    report = check_env(kind(), **{**QUICK, "seconds": seconds}, processes=kind is HashOrder)
    assert failed(report) == [kind.expected], str(report)
    assert report.exit_code == 1


def test_details_say_where_and_what():
    detail = check_env(GlobalRandom(), **QUICK, processes=False)["same_seed"].detail
    assert "at step" in detail
    assert "content: from character" in detail
    detail = check_env(RaisesOnGarbage(), **QUICK, processes=False)["garbage_actions"].detail
    assert "step 1 (agent: call 'ask'" in detail or "raised" in detail
    assert "broken_envs.py" in detail


def test_a_hang_is_told_from_a_blocked_loop():
    hang = check_env(HangsOnGarbage(), **QUICK, processes=False)["garbage_actions"].detail
    assert "takes longer than 1 s" in hang


def test_what_is_absent_is_not_claimed():
    class Plain(Clerk):
        capabilities = frozenset()

    report = check_env(Plain(), **QUICK, processes=False)
    assert report.ok
    assert [c.name for c in report.checks if c.status == "not_claimed"] == [
        "replay",
        "fork",
        "ladder",
        "hidden_twin",
        "hints",
        "answer",
    ]


def test_an_unheard_capability_is_named():
    class Misspelt(Clerk):
        capabilities = frozenset({"reply"})

    assert "did you mean 'replay'" in check_env(Misspelt(), **QUICK, processes=False)["replay"].detail


def test_an_environment_that_cannot_travel_skips_the_processes():
    env = Clerk()
    env.handle = lambda: None
    report = check_env(env, **QUICK)
    assert report["two_processes"].status == "skipped"
    assert "pickled" in report["two_processes"].detail


def test_agents_that_act_at_once():
    report = check_env(Duel(), **QUICK)
    report.raise_for_failures()
    assert report["two_processes"].status == report["concurrency"].status == "passed"


async def test_works_inside_a_running_loop():
    assert check_env(CountingEnv(), episodes=2, processes=False).ok


def test_reports_as_text_table_and_json():
    report = check_env(GlobalRandom(), **QUICK, processes=False)
    assert "failed       same_seed" in str(report)
    told = json.loads(report.to_json())
    assert told["ok"] is False
    assert [c["name"] for c in told["checks"] if c["status"] == "failed"] == ["same_seed"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert "same_seed" in console.export_text()
    with pytest.raises(CheckFailed, match="same_seed: task"):
        report.raise_for_failures()


def test_paired_interval_by_hand():
    # differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.3027, half width 2.4841
    low, high = paired_interval([0, 0, 0], [1, 2, 3])
    assert low == pytest.approx(2 - 2.4841, abs=0.15)
    assert high == pytest.approx(2 + 2.4841, abs=0.15)
    assert t_quantile(31) == pytest.approx(2.0395, abs=1e-3)
    assert t_quantile(7) == pytest.approx(2.3646, abs=5e-3)


def test_differences_in_words():
    assert difference({"a": [1, 2]}, {"a": [1, 2]}) == ""
    assert difference({"a": 1, "b": 2}, {"b": 2, "a": 1}).endswith(
        "the keys come in another order, ['a', 'b'] and ['b', 'a']"
    )
    told = difference({"moves": [{"result": {"text": "red apple"}}]}, {"moves": [{"result": {"text": "red anvil"}}]})
    assert told == "at step 0, text: from character 5 on, 'red apple' and 'red anvil'"


# --- policies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FakePolicy(("1", "2")), SimulatedPolicy(), *CountingEnv().ladder().values()])
def test_sound_policies_pass(policy):
    check_policy(policy, CountingEnv()).raise_for_failures()


class Forgetful:
    """Counts over all sessions what it should count per session."""

    deterministic = True

    def __init__(self):
        self.turns = 0

    def session(self, episode, agent):
        def decide(seen):
            self.turns += 1
            return Action(text=str(self.turns))

        return Scripted(lambda e, a: decide).session(episode, agent)


class Undying(FakePolicy):
    """Acts on after its session was left."""

    def session(self, episode, agent):
        @asynccontextmanager
        async def lease():
            yield Scripted(lambda e, a: lambda seen: Action(text="on")).session(episode, agent)

        return lease()


class Stuck(FakePolicy):
    """One lease at a time, and a cancelled one never comes back."""

    def __init__(self):
        super().__init__()
        self.lock = None

    @asynccontextmanager
    async def session(self, episode, agent):
        self.lock = self.lock or asyncio.Lock()
        await self.lock.acquire()
        session = Scripted(lambda e, a: self.decide).session(episode, agent)
        yield session
        self.lock.release()
        await session.__aexit__(None, None, None)

    async def decide(self, seen):
        await asyncio.sleep(0.001)
        return Action(text="1")


class WrongSpan(SimulatedPolicy):
    """One log-prob too few."""

    def session(self, episode, agent):
        inner = super().session(episode, agent)
        act = inner.act

        async def short(seen):
            action = await act(seen)
            return action.replace(span=action.span.replace(logprobs=action.span.logprobs[1:]))

        return Scripted(lambda e, a: short).session(episode, agent)


@pytest.mark.parametrize(
    ("policy", "check"),
    [(Forgetful(), "same_key"), (Undying(), "after_close"), (Stuck(), "released"), (WrongSpan(), "spans")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_each_defect_of_a_policy_fails_its_check(policy, check):
    report = check_policy(policy, CountingEnv(), patience=1.0, deterministic=check == "same_key")
    assert failed(report) == [check], str(report)


def test_spans_must_add_up():
    sound = TokenSpan(
        prompt=Ids([1]), ids=Ids([2, 3]), logprobs=Floats([-1, -2]), versions=(VersionRun(start=0, version=1),)
    )
    sound_span(sound, "here", first=True)
    for changes, told in [
        ({"prompt": Ids()}, "empty prompt"),
        ({"logprobs": Floats([-1])}, "1 log-probs"),
        ({"logprobs": Floats([-1, float("nan")])}, r"logprobs\[1\] = nan"),
        ({"logprobs": Floats([-1, 0.5])}, r"logprobs\[1\] = 0.5"),
        ({"versions": ()}, r"version runs start at \[\]"),
        ({"versions": (VersionRun(start=1, version=1),)}, r"version runs start at \[1\]"),
    ]:
        with pytest.raises(CheckFailed, match=told):
            sound_span(sound.replace(**changes), "here", first=True)


# --- random actions ---------------------------------------------------------------------------------------------


def test_random_actions_obey_the_mask():
    mask = Observation(array=Array.of([0.0]), action_mask=Array.of([0, 1, 0, 1]))
    drawn = {random_action(rng("mask", n), mask, (), []).array.item() for n in range(50)}
    assert drawn == {1, 3}


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": 3, "maximum": 5},
            {"type": "number", "minimum": -1, "maximum": 1},
            {"type": "boolean"},
            {"enum": ["a", 2]},
            {"const": None},
            {"type": "string", "maxLength": 4},
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda s: {"type": "array", "items": s, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda many: {"anyOf": many}),
        st.dictionaries(st.sampled_from("xyz"), inner, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": sorted(p)[:1]}
        ),
    ),
    max_leaves=5,
)


def fits(value, schema):
    """Whether a value is valid under the part of JSON schema that `value_of` reads."""
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(fits(value, s) for s in schema["anyOf"])
    match schema["type"], value:
        case "array", list():
            return 1 <= len(value) <= 2 and all(fits(v, schema["items"]) for v in value)
        case "object", dict():
            inside = all(fits(v, schema["properties"][k]) for k, v in value.items())
            return inside and set(schema["required"]) <= set(value)
        case "string", str():
            return len(value) <= 4
        case "boolean", bool():
            return True
        case ("integer", int()) | ("number", float()):
            return schema["minimum"] <= value <= schema["maximum"]
    return False


@given(SCHEMAS, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_random_arguments_obey_their_schema(schema, seed):
    value = value_of(rng(seed), schema, ["word"])
    assert fits(value, schema)
    assert value == value_of(rng(seed), schema, ["word"])


def test_garbage_is_the_same_for_the_same_seed():
    tools = ({"type": "function", "function": {"name": "find", "parameters": {"properties": {"query": {}}}}},)
    one, other = (list(garbage(3, tools)) for _ in range(2))
    assert [repr(a) for a in one] == [repr(a) for a in other]
    assert len(one) == 200
    assert len(one[0].text) == len(one[1].tool_calls[0].arguments["query"]) == 1_000_000
    assert {"find", "no_such_tool"} <= {c.name for a in one for c in a.tool_calls}
