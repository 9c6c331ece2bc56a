"""Judges: rules, another policy, mixtures and their failures; monitors and machines beside an episode."""

from __future__ import annotations

import asyncio
import math
import tomllib
from collections.abc import Sequence

import pytest
from making import span, trajectory

from agentgym.errors import ConfigError, EngineFault, RecordError, UnknownName
from agentgym.policy import Scripted
from agentgym.rewards import by_turn, composer, composites, explain, judges
from agentgym.rewards.judges import Computed, judged, matches, mixture
from agentgym.rewards.monitors import MachineJudge, Monitor, each_turn, labelling
from agentgym.types import Action, Floats, Observation, RewardTerm, Task, ToolCall, Trajectory, Turn, Turns, say

R = pytest.approx


def talk(texts: Sequence[str], tools: Sequence[str] = (), **fields: object) -> Trajectory:
    """An episode in which an agent said these texts and called these tools ("" for none)."""
    base = trajectory([{}] * len(texts), **fields)  # type: ignore[arg-type]
    turns = tuple(
        turn.replace(
            observation=say(f"question {i}"),
            action=Action(text=text, tool_calls=(ToolCall(name=tools[i]),) if i < len(tools) and tools[i] else ()),
        )
        for i, (turn, text) in enumerate(zip(base.turns.items, texts, strict=True))
    )
    return base.replace(turns=Turns(items=turns))


def ask(judge: judges.Judge, played: Trajectory) -> dict[str, float]:
    return {term.name: term.value for term in asyncio.run(judge(played))}  # type: ignore[arg-type]


# --- rules ------------------------------------------------------------------------------------------------------


def test_matches_in_the_last_any_and_all_actions() -> None:
    played = talk(["yes please", "no"])
    found = [ask(matches("m", p, w), played)["m"] for p, w in (("yes", "last"), ("yes", "any"), ("^[a-z ]+$", "all"))]  # type: ignore[arg-type]
    assert found == [0, 1, 1]
    assert ask(matches("m", "yes", "all"), talk([])) == {"m": 0}


def test_the_last_answer_counts_without_case_and_blanks() -> None:
    judge = judges.answer("right", r"answer:\s*([\w ]+)", "gold")
    said = "answer: Berlin\nanswer:  new   York"
    assert ask(judge, talk([said], labels={"gold": "New York"})) == {"right": 1}
    assert ask(judge, talk(["answer: Rome"], labels={"gold": "New York"})) == {"right": 0}
    assert ask(judge, talk(["no idea"], labels={"gold": "New York"})) == {"right": 0}
    with pytest.raises(RecordError, match="has no label 'gold'"):
        ask(judge, talk(["x"]))


@pytest.mark.parametrize(
    ("text", "accuracy", "format", "english"),
    [
        (r"<think>so</think> <answer>It is \boxed{B}</answer>", 1, 1.5, 1),
        (r"<think>so</think><answer>\boxed{A}</answer>", 0, 1, 1),
        (r"\boxed{7}", -0.5, 0, 1),
        (r"\boxed B", -1, 0, 1),
        (r"\boxed{A} \boxed{B}", -2, 0, 1),
        ("I do not know", 0, 0, 1),
        ("ja gern\u00e9", 0, 0, 7 / 8),
    ],
)
def test_the_rules_of_clinical_r1(text: str, accuracy: float, format: float, english: float) -> None:
    found = ask(judges.choice("letter"), talk([text], labels={"letter": "B"}))
    assert found == R({"accuracy": accuracy, "format": format, "english": english})


def test_a_computed_term_is_a_line_that_an_advantage_can_name() -> None:
    played = trajectory([{"tool": 1.0, "useful": 1.0, "area": 0.25}, {"accuracy": 1.0, "format": 1.0}])
    both = mixture(
        {
            "tool": Computed("dtpo.tool", composites.dtpo_tool(), turn=0),
            "outcome": Computed("dtpo.outcome", composites.dtpo_outcome()),
        }
    )
    (richer,) = asyncio.run(judged(both, [played]))
    found = [(t.name, round(t.value, 9), t.turn) for t in richer.rewards if t.name.startswith("dtpo")]
    assert found == [("dtpo.tool", 0.05, 0), ("dtpo.outcome", 1.4, 1)]


# --- mixtures and failures ----------------------------------------------------------------------------------------


class Flaky:
    """Breaks the first `times` times it is asked about each episode."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.asked = times, error, 0

    async def __call__(self, played: Trajectory) -> tuple[RewardTerm, ...]:
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return (RewardTerm(name="flaky", value=1.0),)


@pytest.mark.parametrize("error", [EngineFault("lost"), ValueError("odd reply")])
def test_a_judge_that_breaks_is_asked_again(error: Exception) -> None:
    flaky = Flaky(2, error)
    (found,) = asyncio.run(judged(mixture({"f": flaky}), [talk(["hi"])], retries=2))
    assert (found.status, flaky.asked) == ("terminated", 3)
    assert [t.value for t in found.rewards] == [1.0]


@pytest.mark.parametrize(
    ("error", "kind", "says"), [(EngineFault("lost"), "engine", "judge: lost"), (KeyError("x"), "tool", "KeyError")]
)
def test_a_judge_that_stays_broken_fails_the_trajectory_and_is_no_zero(error: Exception, kind: str, says: str) -> None:
    fine, broken = talk(["hi"]), Flaky(9, error)
    (found,) = asyncio.run(judged(mixture({"ok": matches("ok", "h"), "f": broken}), [fine], retries=1))
    assert (found.status, found.failure.kind, found.failure.attempts) == ("failed", kind, 2)
    assert says in found.failure.message
    assert not list(found.rewards)


def test_a_value_that_is_not_finite_is_a_fault() -> None:
    (found,) = asyncio.run(judged(judges.rule("r", lambda t: math.nan), [talk(["hi"])]))
    assert found.failure.message == "judge: 'r' is nan; rewards are finite"


def test_a_declaration_that_is_wrong_is_no_failure_of_an_episode() -> None:
    with pytest.raises(RecordError, match="no label"):
        asyncio.run(judged(judges.answer("a", "(x)", "gold"), [talk(["hi"])]))


def test_failed_episodes_are_passed_on_and_no_more_than_concurrency_are_read_at_once() -> None:
    most, now = 0, 0

    async def slow(played: Trajectory) -> tuple[RewardTerm, ...]:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return ()

    failed = trajectory([{}], status="failed")
    found = asyncio.run(judged(slow, [failed, *(talk(["hi"]) for _ in range(9))], concurrency=3))
    assert most == 3
    assert found[0] is failed


def test_a_task_asks_its_own_judges() -> None:
    both = {"math": matches("math", r"\d"), "safe": matches("safe", "^[^!]*$")}
    chosen = mixture(both, lambda task: ["safe", "math"] if task.labels.get("domain") == "math" else ["safe"])
    easy = talk(["4"])
    sums = easy.replace(episode=easy.episode.replace(task=Task(env="test-v0", labels={"domain": "math"})))
    assert (ask(chosen, sums), ask(chosen, easy)) == ({"math": 1, "safe": 1}, {"safe": 1})
    with pytest.raises(UnknownName, match="no judge 'kind'"):
        ask(mixture(both, lambda task: ["kind"]), easy)


# --- another policy ---------------------------------------------------------------------------------------------


def scripted(*replies: Action) -> tuple[Scripted, list[Observation]]:
    heard: list[Observation] = []

    def script(episode: object, agent: str):
        left = iter(replies)

        def act(observation: Observation) -> Action:
            heard.append(observation)
            return next(left)

        return act

    return Scripted(script), heard


def test_another_policy_judges_from_a_template() -> None:
    policy, heard = scripted(Action(text="well, good"), Action(text="I say 4 of 5: 4"))
    judge = judges.Asked("kind", policy, "Rate this for {tone}:\n{transcript}", judges.score(1, 5))
    assert ask(judge, talk(["hello"], ["wave"], labels={"tone": "calm"})) == {"kind": 4}
    asked = [o.messages[0].text for o in heard]
    assert asked[0] == "Rate this for calm:\nuser: question 0\nassistant: hello\nassistant calls wave {}"
    assert asked[1].startswith("Answer in the form")


def test_replies_that_cannot_be_read_are_a_fault() -> None:
    policy, _ = scripted(Action(text="9"), Action(text="hm"))
    (found,) = asyncio.run(judged(judges.Asked("kind", policy, "{answer}", judges.score(1, 5)), [talk(["a"])]))
    assert found.failure.kind == "tool"
    assert "2 replies that cannot be read, the last one 'hm'" in found.failure.message
    with pytest.raises(ConfigError, match="asks for 'tone'"):
        ask(judges.Asked("kind", policy, "{tone}", judges.yes), talk(["a"]))


@pytest.mark.parametrize(("text", "expected"), [("Yes, it is", 0.7), (" no.", 0.3)])
def test_a_yes_or_no_with_its_probability(text: str, expected: float) -> None:
    reply = Action(text=text, span=span([5, 6], logprobs=Floats([math.log(0.7), -2.0])))
    judge = judges.Asked("localisable", scripted(reply)[0], "{answer}?", judges.yes_probability)
    assert ask(judge, talk(["a"])) == R({"localisable": expected}, abs=1e-6)
    with pytest.raises(ConfigError, match="records no log-probs"):
        judges.yes_probability(Action(text="yes"))
    assert judges.yes(Action(text="maybe")) is None


# --- monitors and machines ----------------------------------------------------------------------------------------

LABELS = {
    "asked": {"action": "(?i)how much"},
    "pay": {"tool": "pay"},
    "warned": {"observation": "question 1"},
    "good": {"term": "r", "at_least": 0.5},
    "won": {"metric": "success"},
}


def test_labels_are_read_from_text_tools_terms_and_metrics() -> None:
    played = talk(["How much?", "here"], ["", "pay"], metrics={"success": 1.0})
    first = played.turns[0].replace(rewards=(RewardTerm(name="r", value=0.75, turn=1),))
    played = played.replace(turns=Turns(items=(first, played.turns[1])))
    assert labelling(LABELS)(played) == [{"asked"}, {"pay", "warned", "good", "won"}]
    assert each_turn(lambda turn: {"t"} if turn.step else set())(played) == [set(), {"t"}]


def test_a_violation_is_charged_to_the_turn_after_which_nothing_repairs_it() -> None:
    watch = Monitor("paid", "!pay U asked", LABELS)
    lost = watch.terms(talk(["hi", "here", "how much?"], ["", "pay"]))
    assert [(t.name, t.value, t.turn) for t in lost[:2]] == [("paid.accepted", 0, 1), ("paid.violated", 1, 1)]
    kept = watch.terms(talk(["hi", "how much?", "here"], ["", "", "pay"]))
    assert [(t.name, t.value, t.turn) for t in kept[:2]] == [("paid.accepted", 1, 1), ("paid.violated", 0, 1)]
    open_ = watch.terms(talk(["hi", "hi"]))
    assert [(t.name, t.value, t.turn) for t in open_[:2]] == [("paid.accepted", 0, 1), ("paid.violated", 0, 1)]
    assert watch.terms(talk([])) == ()
    made = composer({"op": "composite", "name": "violations", "weight": 2.0, "violation": "paid.violated"})
    played = trajectory([{}, {"utility": 1.0}, {}])
    assert by_turn(made.trajectory(played, lost), played).tolist() == [0, -1, 0]


def test_shaping_by_the_distance_to_acceptance_telescopes() -> None:
    watch = Monitor("m", "F (asked & X F pay)", LABELS)
    played = talk(["hi", "how much?", "hm", "here"], ["", "", "", "pay"])
    shaped = composer({"op": "potential", "name": "m", "gamma": 1.0})
    start = watch.potential[0]
    assert start == R(1 - 2 / 3)
    ended = shaped.trajectory(played, watch.terms(played))
    assert ended.value == R(-start)
    assert by_turn(ended, played) == R([0, 1 / 3, 0, -2 / 3])
    cut = played.replace(status="truncated")
    assert by_turn(shaped.trajectory(cut, watch.terms(cut)), cut) == R([0, 1 / 3, 0, 1 / 3])
    lost = Monitor("g", "G !pay", LABELS).terms(talk(["a", "b"], ["pay"], status="truncated"))
    assert [t.value for t in lost if t.name in ("g.before", "g.after")] == [1, 0, 0, 0]


def test_potentials_of_the_reference() -> None:
    shaping = composer({"op": "potential", "name": "m", "gamma": 0.99})
    for before, after, expected in ((0, 1, 0.99), (1, 1, -0.01)):
        terms = [RewardTerm(name="m.before", value=before), RewardTerm(name="m.after", value=after)]
        assert shaping.compose(terms).value == R(expected)


ERRAND = {
    "start": "u0",
    "terminal": ["done"],
    "edges": [{"from": "u0", "to": "u1", "when": "asked"}, {"from": "u1", "to": "done", "when": "pay", "reward": 1.0}],
}


def test_a_machine_pays_at_the_turn_of_its_edge() -> None:
    judge = MachineJudge("errand", ERRAND, LABELS)
    (found,) = asyncio.run(judged(judge, [talk(["pay", "how much?", "here", "again"], ["pay", "", "pay", "pay"])]))
    assert [(t.value, t.turn) for t in found.rewards] == [(0, 0), (0, 1), (1, 2), (0, 3)]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"pay": {"tool": "pay"}}, "no label says when 'asked' holds"),
        ({**LABELS, "asked": {"action": "x", "tool": "y"}}, "read from one of"),
        ({**LABELS, "asked": {"action": "("}}, "no regular expression"),
        ({**LABELS, "asked": {"tool": "x", "at_least": 1}}, "bounds are for a term"),
        ({**LABELS, "asked": {"tol": "x"}}, "unknown field `tol`"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(labels: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Monitor("m", "!pay U asked", labels)
    with pytest.raises(RecordError, match="0 labels for the 1 turns"):
        Monitor("m", "F a", lambda t: []).terms(talk(["x"]))


# --- as tables ----------------------------------------------------------------------------------------------------

TABLES = r"""
[[judge]]
kind = "matches"
name = "polite"
pattern = "please"

[[judge]]
kind = "answer"
name = "right"
pattern = "=(\\d+)"
label = "gold"
tasks = {domain = "sums"}

[[judge]]
kind = "monitor"
name = "order"
formula = "!pay U asked"
labels = {pay = {tool = "pay"}, asked = {action = "how much"}}

[[judge]]
kind = "machine"
name = "errand"
start = "u0"
edges = [{from = "u0", to = "u1", when = "pay", reward = 0.5}]
labels = {pay = {tool = "pay"}}

[[judge]]
kind = "computed"
name = "whole"
declaration = {op = "sum"}

[[judge]]
kind = "custom"
target = "agentgym.rewards.judges:choice"
label = "gold"
"""


def test_judges_stand_in_toml() -> None:
    judge = judges.declared(tomllib.loads(TABLES)["judge"])
    played = talk(["how much, please"], ["pay"], labels={"gold": "B"})
    found = ask(judge, played)
    assert {n: found[n] for n in ("polite", "order.violated", "errand", "whole", "accuracy")} == {
        "polite": 1, "order.violated": 0, "errand": 0.5, "whole": 0, "accuracy": 0,
    }  # fmt: skip
    assert "right" not in found


@pytest.mark.parametrize(
    ("table", "error", "says"),
    [
        ({"kind": "match"}, UnknownName, "did you mean 'matches'"),
        ({"kind": "matches", "name": "m"}, ConfigError, "missing a required argument: 'pattern'"),
        ({"kind": "matches", "name": "m", "pattern": "("}, ConfigError, "no regular expression"),
        ({"kind": "answer", "name": "m", "pattern": "x", "label": "g"}, ConfigError, "no group"),
        ({"kind": "custom", "target": "nowhere:at_all"}, ConfigError, "module:function"),
    ],
)
def test_a_judge_that_cannot_be_meant_is_refused(table: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        judges.declared([table])
    with pytest.raises(ConfigError, match="two judges are called 'm'"):
        judges.declared([{"kind": "matches", "name": "m", "pattern": "x"}] * 2)


def test_a_turn_alone_makes_a_transcript() -> None:
    assert judges.transcript(trajectory([{}])) == "assistant: hello"
    assert isinstance(trajectory([{}]).turns[0], Turn)


# --- inside a declaration -----------------------------------------------------------------------------------------

WATCHED = """
op = "monitor"
name = "order"
formula = "!pay U asked"
labels = {pay = {tool = "pay"}, asked = {action = "how much"}}

[of]
op = "gate"
when = "order.accepted"
at_least = 1
otherwise = {op = "scale", of = "order.violated", factor = -2.0}

[of.then]
op = "weighted_sum"
plus = [{op = "sum"}, {op = "potential", name = "order", gamma = 1.0}]
"""


def test_a_declaration_watches_the_episode_by_itself() -> None:
    made = composer(tomllib.loads(WATCHED), debug=True)
    kept = talk(["hi", "how much?"], ["", "pay"])
    first = kept.turns[0].replace(rewards=(RewardTerm(name="r", value=3.0),))
    kept = kept.replace(turns=Turns(items=(first, kept.turns[1])))
    found = made.trajectory(kept)
    assert found.value == R(3.0 - 0.5)
    assert by_turn(found, kept) == R([3.0 + 0.0, -0.5])
    lost = talk(["hi", "how much?"], ["pay"])
    assert made.trajectory(lost).value == -2.0
    assert by_turn(made.trajectory(lost), lost) == R([-2.0, 0.0])
    judged_before = composer("sum").trajectory(kept)
    assert judged_before.value == 3.0
    already = asyncio.run(judged(Monitor("order", "!pay U asked", LABELS), [lost]))[0]
    assert made.trajectory(already).value == -2.0
    assert "order.violated" in explain(found := made.trajectory(lost), lost.rewards)
    assert len(found.extra) == 6


def test_a_machine_inside_a_declaration_pays_each_turn() -> None:
    made = composer({"op": "machine", "name": "errand", **ERRAND, "labels": LABELS}, debug=True)
    played = talk(["pay", "how much?", "here"], ["pay", "", "pay"])
    assert by_turn(made.trajectory(played), played).tolist() == [0, 0, 1]
    with pytest.raises(RecordError, match="no reward term 'errand'"):
        made.compose([])


def test_a_page_shows_what_a_declaration_worked_out() -> None:
    from agentgym.html import trajectory_body

    played = talk(["hi", "how much?"], ["pay"])
    assert "order.violated" in trajectory_body(played, tomllib.loads(WATCHED))
    assert "policy.kl" not in trajectory_body(played, {"op": "weighted_sum", "of": {"policy.kl": -1.0}})
