"""The hierarchical reward: its order, its properties, the declaration against plain arithmetic, and the telescoping."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.rewards import composer
from agentgym.types import AGENT, Action, Episode, RewardTerm, Task
from agentgym_envs.shopping.catalogue import Constraint
from agentgym_envs.shopping.config import config
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.env import ShoppingEnv, World, world
from agentgym_envs.shopping.requests import (
    Ask,
    CartAdd,
    Checkout,
    Malformed,
    Reason,
    Recommend,
    Request,
    Search,
    Show,
)
from agentgym_envs.shopping.reward import HRM, Verdict, hrm, judge

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
unit = st.floats(0.0, 1.0)
flag = st.sampled_from((0.0, 1.0))
verdicts = st.builds(
    Verdict, valid=flag, finished=flag, hard=flag, share=unit, quality_utility=unit, quality_evidence=unit,
    quality=unit, efficiency=unit,
)  # fmt: skip


@given(verdicts)
def test_the_declaration_is_the_formula(v: Verdict) -> None:
    terms = [RewardTerm(name=n, value=x, level="episode") for n, x in msgspec.structs.asdict(v).items()]
    composed = composer(HRM).compose(terms)
    assert composed.value == pytest.approx(hrm(v), abs=1e-12)
    assert composed.base + sum(composed.shares) == pytest.approx(composed.value, rel=1e-9)


def test_an_episode_cut_off_from_outside_is_worth_nothing() -> None:
    composed = composer(HRM).compose(
        [RewardTerm(name="phi.before", value=0.1), RewardTerm(name="phi.after", value=0.2)]
    )
    assert (composed.value, composed.base, sum(composed.shares)) == (0.0, 0.0, 0.0)


@given(verdicts, st.sampled_from(Verdict.__struct_fields__), unit)
def test_raising_any_component_never_lowers_the_reward(v: Verdict, name: str, to: float) -> None:
    better = max(getattr(v, name), 1.0 if name in ("valid", "finished", "hard") else to)
    assert hrm(msgspec.structs.replace(v, **{name: better})) >= hrm(v) - 1e-12


def test_no_failure_beats_a_success_and_efficiency_buys_no_quality() -> None:
    failing = [hrm(Verdict(valid=1, finished=1, share=c, quality=1, efficiency=1)) for c in LEVELS]
    passing = [
        hrm(Verdict(valid=1, finished=1, hard=1, share=1, quality=q, efficiency=e)) for q, e in product(LEVELS, LEVELS)
    ]
    assert max(failing) == pytest.approx(0.30)
    assert min(passing) == pytest.approx(0.50)
    assert max(passing) == pytest.approx(1.0)
    low = hrm(Verdict(valid=1, finished=1, hard=1, share=1, quality=0.49, efficiency=1.0))
    assert low < hrm(Verdict(valid=1, finished=1, hard=1, share=1, quality=0.5, efficiency=0.0))
    assert hrm(Verdict(valid=1, finished=0)) == 0.0
    assert hrm(Verdict(valid=0, finished=1, hard=1, share=1, quality=1, efficiency=1)) == -1.0


# --- episodes by hand -------------------------------------------------------------------------------------------


def shop(**options: Any) -> World:
    return world(config({"intents": ("single",), "vague": 0.0, "soft": 0, "max_turns": 12, **options}))


def opened(w: World, number: int = 0) -> Desk:
    return w.desk(w.maker.draw("train", 0, number))


def played(desk: Desk, *requests: Request) -> Desk:
    for request in requests:
        desk.act([request])
    return desk


def answer(desk: Desk) -> tuple[str, tuple[Reason, ...]]:
    """The target's id and a true reason for each wish."""
    item = desk.brief.needs[0].target
    wishes = desk.mind.wishes[0]
    return item, tuple(Reason(item=item, claim=Constraint(c.slot, c.op, c.value)) for c in wishes)


def exact(desk: Desk) -> Search:
    return Search(filters=tuple(Constraint(c.slot, c.op, c.value) for c in desk.mind.wishes[0]))


def found(w: World, number: int = 0) -> Desk:
    """A desk that has seen its target in one search."""
    desk = opened(w, number)
    while True:
        played(desk, exact(desk))
        if desk.catalogue.row_of[answer(desk)[0]] in desk.seen:
            return desk
        number += 1
        desk = opened(w, number)


def test_a_perfect_answer_is_worth_one() -> None:
    desk = found(shop())
    item, reasons = answer(desk)
    assert hrm(judge(played(desk, Recommend(items=(item,), reasons=reasons)))) == pytest.approx(1.0)


def test_an_item_no_tool_has_shown_is_minus_one_however_right() -> None:
    desk = opened(shop())
    verdict = judge(played(desk, Recommend(items=(answer(desk)[0],))))
    assert (verdict.valid, hrm(verdict)) == (0.0, -1.0)
    ghost = found(shop())
    assert hrm(judge(played(ghost, Recommend(items=(answer(ghost)[0], "ghost"))))) == -1.0
    assert ghost.counts.hallucinated == 1


def test_three_items_score_by_the_first() -> None:
    w = shop()
    desk = found(w)
    played(desk, Search(filters=desk.brief.needs[0].visible))
    wrong = next(desk.catalogue.ids[r] for r in sorted(desk.seen) if r not in desk.feasible[0])
    right = answer(desk)[0]
    other = desk.fork()
    assert judge(played(desk, Recommend(items=(wrong, right)))).hard == 0.0
    assert judge(played(other, Recommend(items=(right, wrong)))).hard == 1.0


def test_reasons_raise_quality_and_a_false_claim_lowers_it() -> None:
    desk = found(shop())
    item, reasons = answer(desk)
    lie = Reason(item=item, claim=Constraint("brand", "is", "nobody"))
    bare, honest, lying = desk.fork(), desk.fork(), desk.fork()
    q = [
        judge(played(d, Recommend(items=(item,), reasons=r))).quality
        for d, r in ((bare, ()), (lying, (*reasons, lie)), (honest, reasons))
    ]
    assert q[0] < q[1] < q[2] == 1.0
    told = len(desk.mind.known(0))
    precision = len(reasons) / (len(reasons) + 1)
    assert q[1] == pytest.approx(0.6 + 0.4 * 2 * precision / (precision + 1))
    assert told >= 1


def test_revealing_questions_are_free_and_duplicates_and_calls_cost() -> None:
    desk = found(shop())
    item, reasons = answer(desk)
    asked, again, calls = desk.fork(), desk.fork(), desk.fork()
    slots = tuple(c.slot for c in desk.brief.needs[0].hidden)[:2]
    ask, end = Ask(slots=slots), Recommend(items=(item,), reasons=reasons)
    e = [
        judge(d).efficiency
        for d in (
            played(desk, end),
            played(asked, ask, end),
            played(again, ask, Ask(slots=slots[:1]), Ask(slots=slots[:1]), end),
            played(calls, *[Search()] * 8, end),
        )
    ]
    assert e[0] == e[1] == 1.0
    assert e[1] > e[2] > e[3]
    assert e[2] == pytest.approx(1 - 4 / 10)
    assert e[3] == pytest.approx(1 - 8 / 10)


def test_utility_is_min_max_over_the_feasible() -> None:
    w = shop(soft=1)
    spread = 0
    for number in range(40):
        desk = opened(w, number)
        rows, soft = desk.feasible[0], desk.brief.needs[0].soft
        if len(rows) < 2 or not soft:
            continue
        merit = desk.catalogue.numbers[soft[0].slot].merit(rows)
        desk.seen.update(rows.tolist())
        q = [
            judge(played(desk.fork(), Recommend(items=(desk.catalogue.ids[r],)))).quality_utility for r in rows.tolist()
        ]
        if merit.min() < merit.max():
            spread += 1
            assert q[int(merit.argmax())] == 1.0
            assert q[int(merit.argmin())] == 0.0
    assert spread > 5


def test_too_many_malformed_calls_end_the_episode_as_invalid() -> None:
    desk = opened(shop(errors_allowed=2))
    played(desk, Malformed(kind="unparsable"), Malformed(kind="unknown_slot"))
    assert desk.close is None
    verdict = judge(played(desk, Malformed(kind="unparsable")))
    assert (verdict.valid, hrm(verdict)) == (0.0, -1.0)


def bundle(number: int = 0) -> Desk:
    w = shop(intents=("bundle",), max_turns=0)
    desk = opened(w, number)
    desk.seen.update(desk.catalogue.row_of[n.target] for n in desk.brief.needs)
    return desk


def test_a_bundle_needs_every_item_confirmed_and_no_other() -> None:
    desk = bundle()
    a, b = (n.target for n in desk.brief.needs)
    add = [CartAdd(item=a), CartAdd(item=b)]
    unconfirmed = judge(played(desk.fork(), *add, Checkout()))
    assert (unconfirmed.valid, hrm(unconfirmed)) == (0.0, -1.0)
    whole = judge(played(desk.fork(), Show(items=(a, b)), *add, Checkout()))
    assert (whole.valid, whole.hard, whole.share) == (1.0, 1.0, 1.0)
    half = judge(played(desk.fork(), Show(items=(a, b)), add[0], Checkout()))
    assert half.hard == 0.0
    assert half.share == pytest.approx(0.5)
    twice = judge(played(desk.fork(), Show(items=(a, b)), *add, add[0], Checkout()))
    assert twice.hard == 0.0
    swapped = judge(played(desk.fork(), Show(items=(b, a)), *reversed(add), Checkout()))
    assert swapped.hard == 1.0


def test_a_bundle_over_its_budget_fails() -> None:
    desk = bundle()
    assert desk.brief.purse is not None
    poor = msgspec.structs.replace(desk.brief.purse, level=0.01)
    desk.brief = msgspec.structs.replace(desk.brief, purse=poor)
    a, b = (n.target for n in desk.brief.needs)
    verdict = judge(played(desk, Show(items=(a, b)), CartAdd(item=a), CartAdd(item=b), Checkout()))
    assert (verdict.hard, verdict.share) == (0.0, 1.0)
    voucher = msgspec.structs.replace(poor, level=45.0, percent=10, threshold=50.0)
    assert voucher.covers(100.0)
    assert not voucher.covers(99.99)
    assert voucher.covers(90.0)


# --- turns ------------------------------------------------------------------------------------------------------


async def ledger(env: ShoppingEnv, task: Task, name: str) -> list[tuple[RewardTerm, ...]]:
    turns = []
    async with env.demonstrations()[name].session(Episode(task=task), AGENT) as session:
        seen = await env.reset(task)
        while seen:
            result = await env.step({AGENT: await session.act(seen[AGENT])})
            turns.append(result.rewards)
            seen = result.observations
    return turns


def amount(terms: tuple[RewardTerm, ...], name: str) -> float:
    return sum(t.value for t in terms if t.name == name)


@pytest.mark.parametrize("change", [0.0, 1.0])
async def test_turn_rewards_telescope(change: float) -> None:
    """sum r_t = R - Phi_0, with what the world moved kept apart; truthful answers never lower Phi."""
    env = ShoppingEnv(surface="compact", change_of_mind=change)
    drifted = 0
    for task in islice(env.tasks("train", 5), 60):
        for name in ("random", "ask_all", "teacher"):
            turns = await ledger(env, task, name)
            steps = [amount(t, "phi.after") - amount(t, "phi.before") for t in turns]
            drift = [amount(t, "phi.drift") for t in turns]
            start = amount(turns[0], "phi.before")
            assert 0.0 < start <= 0.25 or task.labels["intent"] in ("bundle", "consult")
            assert sum(steps) + sum(drift) == pytest.approx(-start, abs=1e-9)
            assert all(s >= -1e-12 for s in steps[:-1])
            assert amount(turns[-1], "phi.after") == 0.0
            drifted += any(drift)
            assert all(t.cause == "world" for turn in turns for t in turn if t.name == "phi.drift")
    assert (drifted > 0) == (change > 0)


async def test_only_questions_move_the_potential() -> None:
    env = ShoppingEnv(surface="compact", intents=("single",), vague=0.0, max_turns=20)
    task = next(iter(env.tasks("train", 0)))
    hidden = [c[0] for c in task.payload["needs"][0]["hidden"]]
    await env.reset(task)
    moved = []
    for text in ("search", "view r1", "attributes", "compare r1 r2", f"ask {hidden[0]}", f"ask {hidden[0]}"):
        result = await env.step({AGENT: Action(text=text)})
        moved.append(amount(result.rewards, "phi.after") - amount(result.rewards, "phi.before"))
    assert moved[:4] == [0.0] * 4
    assert moved[4] > 0.0
    assert moved[5] == 0.0
