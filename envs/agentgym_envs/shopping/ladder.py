"""Reference policies from worst to best, and the teacher of the warm start.

Each is a script: a generator that yields requests and is sent the events that follow. It acts through a mirror of the
episode (the desk is deterministic), so one script serves both surfaces. Except for the oracle, scripts read only what
the user has said.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from random import Random

from agentgym.policy import Scripted
from agentgym.seeding import rng
from agentgym.types import Action, Episode, Observation
from agentgym_envs.shopping.catalogue import Constraint
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.requests import (
    Ask,
    CartAdd,
    Checkout,
    Event,
    Found,
    Reason,
    Recommend,
    Request,
    Say,
    Search,
    Show,
)
from agentgym_envs.shopping.reward import utilities
from agentgym_envs.shopping.surfaces import Surface

Steps = Generator[Request, list[Event], None]
Script = Callable[[Desk, Random], Steps]
Opening = Callable[[Episode], tuple[Desk, Surface]]

ASKING = 0.3
"""Share of the teacher's episodes in which it asks."""
QUESTIONS = 3
"""How many slots the teacher tries, at most, to learn one thing."""
ORACLE_FILTERS = 12


def policies(opening: Opening) -> dict[str, Scripted]:
    """random, never_ask, ask_one, ask_all, oracle."""
    scripts = {"random": wander, "never_ask": never_ask, "ask_one": ask_one, "ask_all": ask_all, "oracle": oracle}
    return {name: scripted(opening, name, script) for name, script in scripts.items()}


def scripted(opening: Opening, name: str, script: Script) -> Scripted:
    """A script as a policy. Its own random numbers hang on the episode's seed and member."""

    def begin(episode: Episode, agent: str) -> Callable[[Observation], Action]:
        return _Acting(*opening(episode), rng(episode.task.seed, episode.seed, episode.member, name), script).act

    return Scripted(begin)


class _Acting:
    """One session: the mirror of the episode and the running script."""

    def __init__(self, desk: Desk, surface: Surface, g: Random, script: Script) -> None:
        self.desk, self.surface = desk, surface
        surface.open(desk)
        self.steps = script(desk, g)
        self.request: Request | None = next(self.steps, None)

    def act(self, observation: Observation) -> Action:
        """The next action; a script that has run out says nothing until the episode ends."""
        action = self.surface.write(self.desk, self.request or Say(text=""))
        if self.desk.close is None:
            outcome = self.desk.act(self.surface.read(self.desk, action))
            self.surface.show(self.desk, outcome.events)
            try:
                self.request = self.steps.send(outcome.events)
            except StopIteration:
                self.request = None
        return action


# --- scripts ----------------------------------------------------------------------------------------------------


def never_ask(desk: Desk, g: Random) -> Steps:
    """Search for what was said at the start and take the first result."""
    yield from _finish(desk)


def ask_one(desk: Desk, g: Random) -> Steps:
    """Ask for the first slot the user has not named, of each need."""
    for need in range(len(desk.brief.needs)):
        yield from _ask(desk, need, _unnamed(desk, need)[:1])
    yield from _finish(desk)


def ask_all(desk: Desk, g: Random) -> Steps:
    """Ask for every slot, two at a time, while time for the rest remains."""
    for need in range(len(desk.brief.needs)):
        slots = _unnamed(desk, need)
        while slots and _time_left(desk):
            yield from _ask(desk, need, slots[:2])
            slots = slots[2:]
    yield from _finish(desk)


def teacher(desk: Desk, g: Random) -> Steps:
    """Mostly never ask, now and then ask one random slot: asking is possible, but not known to pay.

    A slot the user does not care about is not counted: it goes on to another, at most `QUESTIONS` of them, until it has
    learned one thing. It never asks once it has learned something.
    """
    if g.random() < ASKING:
        for need in range(len(desk.brief.needs)):
            slots, known = _unnamed(desk, need), len(desk.mind.known(need))
            for slot in g.sample(slots, min(QUESTIONS, len(slots))):
                if len(desk.mind.known(need)) == known and _time_left(desk):
                    yield from _ask(desk, need, [slot])
    yield from _finish(desk)


def wander(desk: Desk, g: Random) -> Steps:
    """Legal requests at random, then a random one of the items shown."""
    for _ in range(g.randint(1, 3)):
        yield _random_request(desk, g)
    events = yield Search(filters=_random_filter(desk, g))
    rows = _rows(events)
    if rows and desk.brief.purse is None:
        yield _recommend(desk, g.choice(rows))
    elif rows:
        yield CartAdd(item=desk.catalogue.ids[g.choice(rows)])
        yield Checkout()


def oracle(desk: Desk, g: Random) -> Steps:
    """Knows every wish: finds the best item by its own attributes and recommends it."""
    rows = _best_rows(desk)
    for row in rows:
        if row not in desk.seen:
            yield from _find(desk, row, _profile(desk, row))
        if desk.brief.purse is not None:
            item = desk.catalogue.ids[row]
            yield Show(items=(item,))
            yield CartAdd(item=item)
    reasons = tuple(r for need, row in enumerate(rows) for r in _reasons(desk, row, desk.mind.wishes[need]))
    if desk.brief.purse is None:
        yield Recommend(items=(desk.catalogue.ids[rows[0]],), reasons=reasons)
    else:
        yield Checkout(reasons=reasons)


# --- steps they share -------------------------------------------------------------------------------------------


def _schema(desk: Desk, need: int) -> list[str]:
    return list(desk.catalogue.schema(desk.brief.needs[need].category))


def _unnamed(desk: Desk, need: int) -> list[str]:
    """Slots the user may still keep something back about, hints first."""
    wanted = desk.brief.needs[need]
    hints = [*wanted.hints, *(s for s in _schema(desk, need) if s not in wanted.hints)]
    return [s for s in hints if s not in desk.mind.told[need] and s != wanted.best]


def _ask(desk: Desk, need: int, slots: Sequence[str]) -> Steps:
    """Ask, and ask once more for what was answered vaguely."""
    if slots:
        yield Ask(slots=tuple(slots), need=need)
        vague = tuple(s for s in slots if (need, s) in desk.mind.vague and s not in desk.mind.told[need])
        if vague and _time_left(desk):
            yield Ask(slots=vague, need=need)


def _time_left(desk: Desk) -> bool:
    rest = 2 if desk.brief.purse is None else 3 * len(desk.brief.needs) + 1
    return desk.brief.budget - max(desk.counts.calls, desk.counts.turns) > rest


def _finish(desk: Desk) -> Steps:
    """Search by what is known and take the first result: recommend it, or buy one of each."""
    for need in range(len(desk.brief.needs)):
        row = yield from _pick(desk, need)
        if row is None:
            return
        if desk.brief.purse is None:
            yield _recommend(desk, row)
            return
        row = yield from _confirmed(desk, need, row)
        yield CartAdd(item=desk.catalogue.ids[row])
    bought = list(desk.cart)
    pairs = zip(range(len(desk.brief.needs)), bought, strict=False)
    yield Checkout(reasons=tuple(r for need, row in pairs for r in _reasons(desk, row, desk.mind.known(need))))


def _confirmed(desk: Desk, need: int, row: int) -> Generator[Request, list[Event], int]:
    """Show an item; where it is rejected, the reason given is a wish more to search by."""
    yield Show(items=(desk.catalogue.ids[row],))
    while row not in desk.confirmed:
        other = yield from _pick(desk, need)
        row = row if other is None else other
        yield Show(items=(desk.catalogue.ids[row],))
    return row


def _pick(desk: Desk, need: int) -> Generator[Request, list[Event], int | None]:
    """The first item consistent with what is known."""
    wanted, known = desk.brief.needs[need], desk.mind.known(need)
    if wanted.among:
        rows = [desk.catalogue.row_of[id] for id in wanted.among]
        return next((r for r in rows if all(desk.catalogue.satisfies(r, w) for w in known)), rows[0])
    sort = wanted.best or ("price" if desk.brief.purse is not None else "")
    rows = _rows((yield Search(filters=tuple(_bare(w) for w in known), sort=sort)))
    return rows[0] if rows else None


def _rows(events: list[Event]) -> list[int]:
    return [row for event in events if isinstance(event, Found) for row in event.rows]


def _bare(wish: Constraint) -> Constraint:
    return Constraint(wish.slot, wish.op, wish.value)


def _reasons(desk: Desk, row: int, wishes: Sequence[Constraint]) -> list[Reason]:
    """A reason for each wish that is true of the item."""
    true = [w for w in wishes if desk.catalogue.satisfies(row, w)]
    return [Reason(item=desk.catalogue.ids[row], claim=_bare(w)) for w in true]


def _recommend(desk: Desk, row: int) -> Recommend:
    return Recommend(items=(desk.catalogue.ids[row],), reasons=tuple(_reasons(desk, row, desk.mind.known(0))))


def _find(desk: Desk, row: int, filters: tuple[Constraint, ...]) -> Steps:
    """Page through the results until the item has been shown."""
    page = 1
    while row not in desk.seen and page <= 3:
        yield Search(filters=filters, page=page)
        page += 1


def _best_rows(desk: Desk) -> list[int]:
    """For each need the feasible item of highest utility; for a budget, the best pair that fits it."""
    ranked = []
    for need, rows in zip(desk.brief.needs, desk.feasible, strict=True):
        u = utilities(desk.catalogue, need.soft, rows)
        ranked.append([int(rows[i]) for i in sorted(range(len(rows)), key=lambda i: -u[i])][:50])
    if desk.brief.purse is None:
        return ranked[0][:1] or [desk.catalogue.row_of[desk.brief.needs[0].target]]
    pairs = ([a, b] for a in ranked[0] for b in ranked[1] if a != b and _affordable(desk, a, b))
    return next(pairs, [desk.catalogue.row_of[n.target] for n in desk.brief.needs])


def _affordable(desk: Desk, a: int, b: int) -> bool:
    purse, price = desk.brief.purse, desk.catalogue.numbers["price"].values
    if purse is None or not purse.covers(float(price[a] + price[b])):
        return False
    return not purse.one_seller or len({desk.catalogue.columns["seller"].read(r) for r in (a, b)}) == 1


def _profile(desk: Desk, row: int) -> tuple[Constraint, ...]:
    """A row's own values as filters, those of its need's hard wishes first."""
    slots = dict.fromkeys([*(w.slot for wishes in desk.mind.wishes for w in wishes), *desk.catalogue.columns])
    wishes = (desk.catalogue.columns[slot].wish(row) for slot in slots)
    return tuple(w for w in wishes if w is not None)[:ORACLE_FILTERS]


def _random_filter(desk: Desk, g: Random) -> tuple[Constraint, ...]:
    """What a random item would be asked for in a random slot."""
    row = int(g.choice(desk.catalogue.sold))
    wishes = [w for c in desk.catalogue.columns.values() if (w := c.wish(row)) is not None]
    return (g.choice(wishes),) if wishes else ()


def _random_request(desk: Desk, g: Random) -> Request:
    slots = _schema(desk, 0)
    if slots and g.random() < 0.25:
        return Ask(slots=(g.choice(slots),))
    return Search(filters=_random_filter(desk, g))
