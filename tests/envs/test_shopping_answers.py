"""Answers of the shop: what the user keeps back and a product that satisfies it, in words that the agent knows."""

from __future__ import annotations

from itertools import islice

import pytest

from agentgym_envs.shopping import tasks
from agentgym_envs.shopping.env import ShoppingEnv


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_compact_answers_are_words_of_its_vocabulary(change: float) -> None:
    env = ShoppingEnv(surface="compact", change_of_mind=change, soft=1)
    known, seen = set(env.vocabulary()), set[str]()
    for task in islice(env.tasks("train", 1), 150):
        words = env.answer(task).split()
        assert set(words) <= known
        seen |= set(words)
    assert {"answer", "found", "item", "best"} <= seen
    assert ("change" in seen) == bool(change)


@pytest.mark.parametrize("surface", ["compact", "full"])
def test_an_answer_holds_every_hidden_wish_and_a_product(surface: str) -> None:
    env = ShoppingEnv(surface=surface)
    lexicon = env.world.lexicon
    for task in islice(env.tasks("train", 2), 100):
        said = env.answer(task)
        for need in tasks.brief_of(task, env.catalogue).needs:
            row = env.catalogue.row_of[need.target]
            product = lexicon.fields(row, lexicon.headline) if surface == "compact" else need.target
            assert product in said
            for c in need.hidden:
                words = f"{c.slot} {lexicon.word(c.slot, c.value)}"
                assert (words if surface == "compact" else c.slot.replace("_", " ")) in said
        assert said != env.answer(env.hidden_twin(task))


def test_answers_as_they_are_said() -> None:
    env = ShoppingEnv(surface="compact", slots=("brand", "price", "color", "seller"))
    task = next(t for t in env.tasks("train", 0) if t.labels["intent"] == "bundle")
    first, product, second, other = env.answer(task).split(" | ")
    assert first.startswith("answer item 1 ")
    assert second.startswith("answer item 2 ")
    assert product.split()[:2] == other.split()[:2] == ["found", "brand"]


def test_the_product_after_a_change_of_mind_satisfies_what_is_wanted_then() -> None:
    env = ShoppingEnv(surface="full", change_of_mind=1.0)
    changed = 0
    for task in islice(env.tasks("train", 4), 60):
        brief = tasks.brief_of(task, env.catalogue)
        if brief.change is None:
            continue
        said = env.answer(task).split("after turn ")[1]
        need, wish = brief.needs[brief.change.need], brief.change.wish
        hidden = tuple(wish if c.slot == wish.slot else c for c in need.hidden)
        rows = tasks.feasible_rows(env.catalogue, need, hidden)
        assert any(f" {env.catalogue.ids[int(row)]} " in said for row in rows)
        changed += 1
    assert changed > 20
