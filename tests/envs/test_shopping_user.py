"""The simulated user: what it tells, when, and that nothing else leads from hidden wishes to what an agent sees."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from agentgym.types import Action, Task
from agentgym_envs.shopping.catalogue import Constraint
from agentgym_envs.shopping.config import config
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.env import ShoppingEnv, World, world
from agentgym_envs.shopping.phrases import TEMPLATES
from agentgym_envs.shopping.requests import Ask, Event, Say, Search, Show, Spoken
from agentgym_envs.shopping.tasks import Brief, brief_of, feasible_rows, pack, visible_rows
from agentgym_envs.shopping.user import slots_asked


def shop(**options: Any) -> World:
    return world(config({"surface": "compact", "vague": 0.0, "intents": ("single",), **options}))


def first(w: World, number: int = 0) -> Task:
    return w.maker.draw("train", 0, number)


def acts(events: list[Event]) -> list[tuple[str, str]]:
    return [(a.kind, a.slot) for e in events if isinstance(e, Spoken) for a in e.acts]


def hidden_slots(desk: Desk) -> list[str]:
    return [c.slot for c in desk.brief.needs[0].hidden]


def indifferent_slots(desk: Desk) -> list[str]:
    need = desk.brief.needs[0]
    wanted = {c.slot for c in (*need.visible, *need.hidden, *need.soft)}
    return [s for s in desk.catalogue.schema(need.category) if s not in wanted]


def test_two_slots_a_turn_in_the_order_asked_and_a_repeat_counts() -> None:
    w = shop(hidden=(3, 3))
    desk = w.desk(first(w))
    a, b, c = hidden_slots(desk)
    assert acts(desk.act([Ask(slots=(c, a, b))]).events) == [("INFORM", c), ("INFORM", a)]
    assert (desk.mind.revealing, desk.mind.duplicates) == (2, 0)
    assert acts(desk.act([Ask(slots=(a,))]).events) == [("INFORM", a)]
    assert (desk.mind.revealing, desk.mind.duplicates) == (2, 1)
    assert {x.slot for x in desk.mind.known(0)} == {a, c} | {x.slot for x in desk.brief.needs[0].visible}


def test_a_slot_without_a_wish_is_no_preference() -> None:
    w = shop()
    desk = w.desk(first(w))
    slot = indifferent_slots(desk)[0]
    assert acts(desk.act([Ask(slots=(slot,))]).events) == [("NO_PREF", slot)]
    assert (desk.mind.indifferent, desk.mind.patience) == (1, desk.brief.patience)


def test_soft_wishes_are_told_as_preferences_and_exclude_nothing() -> None:
    w = shop(soft=1)
    desk = next(d for i in range(20) if (d := w.desk(first(w, i))).brief.needs[0].soft)
    soft = desk.brief.needs[0].soft[0]
    outcome = desk.act([Ask(slots=(soft.slot,))])
    assert acts(outcome.events) == [("INFORM", soft.slot)]
    assert outcome.after == outcome.before


def test_a_vague_answer_needs_a_second_question() -> None:
    w = shop(vague=1.0)
    desk, slot = next(
        (d, c.slot)
        for i in range(40)
        for d in [w.desk(first(w, i))]
        for c in d.brief.needs[0].hidden
        if c.op in ("max", "min")
    )
    assert acts(desk.act([Ask(slots=(slot,))]).events) == [("VAGUE", slot)]
    assert slot not in desk.mind.told[0]
    assert acts(desk.act([Ask(slots=(slot,))]).events) == [("INFORM", slot)]
    assert (desk.mind.revealing, desk.mind.duplicates) == (1, 0)


def test_patience_runs_down_with_useless_questions_and_the_user_leaves() -> None:
    w = shop(patience=2, max_turns=50)
    desk = w.desk(first(w))
    slot = hidden_slots(desk)[0]
    desk.act([Ask(slots=(slot,))])
    desk.act([Ask(slots=(slot,))])
    assert desk.close is None
    outcome = desk.act([Say(text="Lovely weather.")])
    assert ("LEAVE", "") in acts(outcome.events)
    assert desk.close is not None
    assert (desk.close.valid, desk.close.finished, outcome.after) == (True, False, 0.0)


def test_time_runs_out() -> None:
    w = shop(max_turns=3)
    desk = w.desk(first(w))
    for _ in range(2):
        desk.act([Search()])
    assert desk.close is None
    desk.act([Search()])
    assert desk.close is not None
    assert not desk.close.finished


def rejected(w: World, number: int) -> tuple[Desk, str]:
    """A desk that has seen an item which breaks a hidden wish, and the item."""
    desk = w.desk(first(w, number))
    desk.act([Search(filters=(Constraint("category", "is", desk.brief.needs[0].category),))])
    row = next(r for r in sorted(desk.seen) if r not in desk.feasible[0])
    return desk, desk.catalogue.ids[row]


def test_a_shown_item_is_rejected_once_with_the_most_important_reason() -> None:
    w = shop(rejections=1, max_turns=20)
    desk, item = rejected(w, 0)
    broken = [c for c in desk.mind.wishes[0] if not desk.catalogue.satisfies(desk.catalogue.row_of[item], c)]
    ((kind, slot),) = acts(desk.act([Show(items=(item,))]).events)
    assert kind == "REJECT"
    assert slot == max(broken, key=lambda c: c.weight).slot
    assert slot in desk.mind.told[0]
    assert acts(desk.act([Show(items=(item,))]).events)[0][0] == "UNSURE"


def test_an_item_that_fits_is_accepted() -> None:
    w = shop()
    desk = w.desk(first(w))
    desk.act([Search(filters=desk.mind.wishes[0])])
    row = next(r for r in desk.seen if r in desk.feasible[0])
    assert acts(desk.act([Show(items=(desk.catalogue.ids[row],))]).events)[0][0] == "ACCEPT"


def test_a_change_of_mind_is_announced_and_is_the_world_s_doing() -> None:
    w = shop(change_of_mind=1.0, max_turns=20)
    changed = 0
    for number in range(30):
        desk = w.desk(first(w, number))
        change = desk.brief.change
        if change is None:
            continue
        changed += 1
        for turn in range(1, 4):
            last = desk.potential
            outcome = desk.act([Search()])
            assert outcome.before == outcome.after == last
            kinds = [k for k, _ in acts(outcome.events)]
            assert kinds == (["CHANGE"] if turn == change.turn else [])
            assert outcome.after + outcome.drift == pytest.approx(desk.potential)
        assert change.wish in desk.mind.known(0)
        assert len(desk.feasible[0]) >= 1
    assert changed >= 20


# --- free text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("What brand do you like?", ["brand"]),
        ("Which colour, and what's your budget?", ["color", "price"]),
        ("Tell me about the price.", ["price"]),
        ("Please let me know the material", ["material"]),
        ("Let me make a list.", []),
        ("I will order by size and ship it.", []),
        ("The brand is good.", []),
        ("Is the brandy nice? Any colorful idea?", []),
        ("The price is fine. What brand?", ["brand"]),
        ("priceless? unpriced? re-brand it!", []),
        ("", []),
        ("?" * 100_000, []),
        ("x" * 5000 + " what brand?", []),
        ("What battery   RUNTIME do you need? Weight?", ["battery", "weight"]),
    ],
)
def test_free_text_counts_only_whole_words_in_questions(text: str, slots: list[str]) -> None:
    assert slots_asked(text, shop().catalogue) == slots


def test_a_free_question_and_a_structured_one_are_worth_the_same() -> None:
    w = shop()
    tasks = (first(w, i) for i in range(30))
    task = next(t for t in tasks if any(c[0] == "brand" for c in t.payload["needs"][0]["hidden"]))
    one, other = w.desk(task), w.desk(task)
    a = one.act([Ask(slots=("brand",), text="tell me")])
    b = other.act([Say(text="So, is there any particular brand you have in mind?")])
    assert (a.before, a.after) == (b.before, b.after)
    assert acts(a.events) == acts(b.events) == [("INFORM", "brand")]


# --- tasks ------------------------------------------------------------------------------------------------------


def briefs(w: World, split: str, count: int, seed: int = 0) -> list[Brief]:
    return [brief_of(t, w.catalogue) for t in islice(w.maker.stream(split, seed), count)]


def test_tasks_keep_the_acceptance_rule_and_wishes_are_true_of_the_target() -> None:
    w = world(config({}))
    seen = set()
    for brief in briefs(w, "train", 150):
        seen.add(brief.intent)
        for need in brief.needs:
            matching = visible_rows(w.catalogue, need)
            feasible = feasible_rows(w.catalogue, need, need.hidden)
            assert w.catalogue.row_of[need.target] in feasible
            assert need.among or len(matching) >= 8
            assert 1 <= len(feasible) <= len(matching) / 4
            assert not {c.slot for c in need.visible} & {c.slot for c in need.hidden}
            edges = {c.slot: c.value for c in need.hidden if c.op != "is"}
            assert all(value in w.catalogue.numbers[slot].edges for slot, value in edges.items())
    assert len(seen) == 6


def test_a_bundle_s_targets_meet_its_budget() -> None:
    w = world(config({"intents": ("bundle",)}))
    vouchers = 0
    for brief in briefs(w, "train", 60):
        assert brief.purse is not None
        rows = [w.catalogue.row_of[n.target] for n in brief.needs]
        assert brief.purse.covers(float(w.catalogue.numbers["price"].values[rows].sum()))
        vouchers += brief.purse.percent > 0
        if brief.purse.one_seller:
            assert len({w.catalogue.columns["seller"].read(r) for r in rows}) == 1
    assert 10 < vouchers < 50


def test_splits_share_no_target_whatever_the_seed() -> None:
    w = world(config({}))
    models: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        targets = [b.needs[0].target for seed in (0, 1, 2) for b in briefs(w, split, 60, seed)]
        models[split] = {w.catalogue.models[w.catalogue.row_of[t]] for t in targets}
    assert not models["train"] & models["test"]
    assert not models["train"] & models["val"]
    assert not models["val"] & models["test"]
    assert all(len(m) > 20 for m in models.values())


def test_a_twin_is_told_apart_only_after_something_is_revealed() -> None:
    """Every rung's actions on a task and on its twin: equal words until an act that tells a wish or judges an item."""
    texts = ("ask brand price", "search", "view r1", "attributes", "ask color rating", "show r1", "compare r1 r2")
    telling = {"INFORM", "REJECT", "ACCEPT", "UNSURE", "CHANGE"}
    w = world(config({"surface": "compact", "vague": 0.3}))
    env, compared, apart = ShoppingEnv(w), 0, 0
    for task in islice(w.maker.stream("test", 3), 60):
        twin = env.hidden_twin(task)
        assert twin.id != task.id
        one, other = w.desk(task), w.desk(twin)
        left, right = w.surface(), w.surface()
        assert left.open(one) == right.open(other)
        for text in texts:
            a = one.act(left.read(one, Action(text=text)))
            b = other.act(right.read(other, Action(text=text)))
            if telling & {k for k, _ in (*acts(a.events), *acts(b.events))} or one.close or other.close:
                apart += left.show(one, a.events) != right.show(other, b.events)
                break
            assert left.show(one, a.events) == right.show(other, b.events)
            compared += 1
    assert compared > 20
    assert apart > 20


def test_a_packed_brief_reads_back() -> None:
    w = shop()
    task = first(w)
    assert pack(brief_of(task, w.catalogue), split=task.split, seed=task.seed) == task


def test_at_least_five_templates_an_act_and_all_of_them_format() -> None:
    blanks = {"wish": "w", "slot": "s", "position": 1, "better": "b", "need": "n"}
    for kind, texts in TEMPLATES.items():
        assert len(set(texts)) >= 5, kind
        assert all(t.format(**blanks) for t in texts)
