"""Hints of the shop: three levels that help more and more and never give a value or the product away."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice

import pytest

from agentgym.policy import Scripted
from agentgym.rollout import Runner
from agentgym.types import Action, Episode, Observation, ToolCall, iterate
from agentgym_envs.shopping import tasks
from agentgym_envs.shopping.env import ShoppingEnv


@pytest.mark.parametrize("surface", ["compact", "full"])
def test_no_hint_holds_a_hidden_value_or_the_product(surface: str) -> None:
    env = ShoppingEnv(surface=surface)
    for task in islice(env.tasks("train", 3), 200):
        brief = tasks.brief_of(task, env.catalogue)
        hidden = [(c.slot, c.value) for need in brief.needs for c in need.hidden]
        secret = {str(value).casefold() for _, value in hidden} | {n.target.casefold() for n in brief.needs}
        secret |= {env.world.lexicon.word(slot, value) for slot, value in hidden}
        for level in (1, 2, 3):
            said = env.hint(task, level).casefold()
            assert not secret & set(re.findall(r"[\w.]+", said))
            assert not any(word in said for word in secret if len(word) > 4)


def test_the_levels_say_more_and_the_last_is_an_action() -> None:
    compact, full = ShoppingEnv(surface="compact"), ShoppingEnv(surface="full")
    task = next(t for t in compact.tasks() if t.labels["intent"] == "single")
    brief = tasks.brief_of(task, compact.catalogue)
    slot = max(brief.needs[0].hidden, key=lambda c: c.weight).slot
    assert [compact.hint(task, level) for level in (0, 1, 2, 3, 9)] == [
        "",
        "any vague",
        f"{slot} vague",
        f"ask {slot}",
        f"ask {slot}",
    ]
    assert slot not in full.hint(task, 1)
    assert slot in full.hint(task, 2)
    assert f'{{"name":"ask_user","arguments":{{"slots":["{slot}"]}}}}' in full.hint(task, 3)


def test_compact_hints_are_words_of_its_vocabulary() -> None:
    env = ShoppingEnv(surface="compact")
    known = set(env.vocabulary())
    for task in islice(env.tasks("train", 1), 100):
        assert all(set(env.hint(task, level).split()) <= known for level in (1, 2, 3))


@pytest.mark.parametrize("surface", ["compact", "full"])
async def test_doing_what_the_strongest_hint_says_reveals_something(surface: str) -> None:
    env = ShoppingEnv(surface=surface, vague=0.0)
    told = list(islice(env.tasks("train", 2), 40))
    for task in told:
        hint = env.hint(task, 3)
        action = Action(text=hint) if surface == "compact" else _call(hint)
        episode = Episode(task=task)
        (found,) = await Runner(env, _once(action), retries=0).collect([episode])
        second = list(iterate(found.turns))[1].observation
        assert "any" not in second.messages[0].text.split()[:4], (hint, second)
        assert found.metrics["asks_revealing"] == 1.0


def _call(hint: str) -> Action:
    found = json.loads(hint[hint.index("{") :])
    return Action(tool_calls=(ToolCall(name=found["name"], arguments=found["arguments"]),))


def _once(action: Action) -> Scripted:
    """Say it, then nothing more until the user leaves."""

    def begin(episode: Episode, agent: str) -> Callable[[Observation], Action]:
        said = iter([action])
        return lambda seen: next(said, Action(text="say"))

    return Scripted(begin)
