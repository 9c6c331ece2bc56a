"""One episode: the shop's counter, where requests meet the catalogue and the user.

The desk owns the episode's small state and nothing else; catalogue and index are shared. It executes typed requests,
keeps the counts that reward and metrics read, and knows the potential Phi.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentgym_envs.shopping import user
from agentgym_envs.shopping.catalogue import Catalogue, Rows
from agentgym_envs.shopping.requests import (
    Ask,
    Attributes,
    Cart,
    CartAdd,
    CartRemove,
    Checkout,
    Compare,
    Compared,
    Event,
    Found,
    ListAttributes,
    Malformed,
    Problem,
    Reason,
    Recommend,
    Request,
    Say,
    Search,
    Show,
    Spoken,
    View,
    Viewed,
)
from agentgym_envs.shopping.search import SearchBackend
from agentgym_envs.shopping.tasks import Brief, feasible_rows, visible_rows

CALLS_PER_TURN = 4


@dataclass(slots=True)
class Counter:
    """At what rate the user's words and the agent's errors go on the bill."""

    turns: int = 0
    calls: int = 0
    asks: int = 0
    errors: int = 0
    hallucinated: int = 0
    free: int = 0
    """Calls that are not charged: questions that revealed something new."""


@dataclass(slots=True)
class Close:
    """How the episode ended: with these rows, with nothing (the user left, the time ran out), or invalidly."""

    rows: tuple[int, ...] = ()
    reasons: tuple[Reason, ...] = ()
    valid: bool = True
    finished: bool = True


@dataclass(slots=True)
class Outcome:
    """One turn: what the agent sees, and the potential before, after, and moved by the world alone."""

    events: list[Event]
    before: float
    after: float
    drift: float = 0.0


@dataclass(slots=True)
class Desk:
    """The state of an episode and the ten tools. `fork` copies it."""

    catalogue: Catalogue
    index: SearchBackend
    brief: Brief
    mind: user.Mind
    page: int
    counts: Counter = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    """Rows any tool has shown (S_t)."""
    confirmed: set[int] = field(default_factory=set)
    """Rows the user has looked at and not rejected."""
    cart: dict[int, int] = field(default_factory=dict)
    close: Close | None = None
    visible: list[Rows] = field(default_factory=list)
    feasible: list[Rows] = field(default_factory=list)
    potential: float = 0.0

    @classmethod
    def open(cls, catalogue: Catalogue, index: SearchBackend, brief: Brief, seed: int, page: int) -> Desk:
        desk = cls(catalogue=catalogue, index=index, brief=brief, mind=user.fresh_mind(brief, seed), page=page)
        desk.visible = [visible_rows(catalogue, need) for need in brief.needs]
        desk.seen = {catalogue.row_of[id] for need in brief.needs for id in need.among if id in catalogue.row_of}
        desk._settle()
        return desk

    def fork(self) -> Desk:
        """An independent copy; catalogue, index and brief are shared, row arrays are never written."""
        twin = copy.copy(self)
        twin.mind = copy.deepcopy(self.mind)
        twin.counts, twin.close = copy.copy(self.counts), copy.copy(self.close)
        twin.seen, twin.confirmed, twin.cart = set(self.seen), set(self.confirmed), dict(self.cart)
        twin.visible, twin.feasible = list(self.visible), list(self.feasible)
        return twin

    def _settle(self) -> None:
        """Recompute F after the wishes changed, and Phi."""
        pairs = zip(self.brief.needs, self.visible, self.mind.wishes, strict=True)
        self.feasible = [feasible_rows(self.catalogue, need, wishes, rows) for need, rows, wishes in pairs]
        self.potential = self.phi()

    def phi(self) -> float:
        """The chance that a random item still consistent with what the user said is right: |F_t and F| / |F_t|.

        Over several needs, the product. 0 where nothing is consistent.
        """
        chance = 1.0
        for i, (need, rows, right) in enumerate(zip(self.brief.needs, self.visible, self.feasible, strict=True)):
            open_rows = feasible_rows(self.catalogue, need, self.mind.known(i), rows)
            chance *= len(np.intersect1d(open_rows, right, assume_unique=True)) / max(len(open_rows), 1)
        return chance

    # --- a turn -------------------------------------------------------------------------------------------------

    def act(self, requests: Sequence[Request]) -> Outcome:
        """Execute the requests of one turn in order, then let the user and the clock have their say."""
        before = self.potential
        self.counts.turns += 1
        events = self._execute(requests)
        told = self.phi() if self.close is None else 0.0
        self._clock(events)
        if self.close is not None:
            return Outcome(events, before, 0.0)
        self.potential = told
        changes = user.change_mind(self.mind, self.brief, self.counts.turns)
        if changes:
            events.append(Spoken(acts=tuple(changes)))
            self._settle()
        return Outcome(events, before, told, self.potential - told)

    def _execute(self, requests: Sequence[Request]) -> list[Event]:
        events: list[Event] = []
        for request in requests[:CALLS_PER_TURN]:
            self.counts.calls += 1
            events.append(self._handle(request))
            if self.close is not None:
                return events
        if len(requests) > CALLS_PER_TURN:
            events.append(self._problem("too_many_calls", f"{len(requests)} calls; at most {CALLS_PER_TURN} a turn"))
        return events

    def _clock(self, events: list[Event]) -> None:
        """The user leaves when patience or time is spent."""
        spent = max(self.counts.calls, self.counts.turns)
        if self.close is None and (self.mind.patience <= 0 or spent >= self.brief.budget):
            events.append(Spoken(acts=(user.Act(kind="LEAVE"),)))
            self.close = Close(finished=False)

    def _handle(self, request: Request) -> Event:
        handler: Callable[[Desk, Any], Event] = _HANDLERS[type(request)]
        return handler(self, request)

    def _problem(self, kind: Any, detail: str) -> Problem:
        """A typed error for the agent; too many of them end the episode as invalid."""
        self.counts.errors += 1
        if self.counts.errors > self.brief.errors_allowed:
            self.close = Close(valid=False, finished=False)
        return Problem(kind=kind, detail=detail)

    def _malformed(self, request: Malformed) -> Event:
        return self._problem(request.kind, request.detail)

    # --- the catalogue ------------------------------------------------------------------------------------------

    def _row(self, item: str) -> int | None:
        """The row of an item the agent may speak of: one that some tool has shown."""
        row = self.catalogue.row_of.get(item)
        if row is None or row not in self.seen:
            self.counts.hallucinated += 1
            return None
        return row

    def _rows(self, items: Sequence[str]) -> list[int] | Problem:
        rows = []
        for item in items:
            row = self._row(item)
            if row is None:
                return self._problem("unknown_item", f"no item {item[:40]!a} has been shown")
            rows.append(row)
        return rows

    def _search(self, request: Search) -> Event:
        hits = self.index.search(
            request.query,
            request.filters,
            sort=request.sort,
            in_stock=request.in_stock,
            start=(request.page - 1) * self.page,
            count=self.page,
        )
        shown = tuple(hits.rows.tolist())
        self.seen.update(shown)
        return Found(total=hits.total, rows=shown, page=request.page, filters=request.filters)

    def _view(self, request: View) -> Event:
        rows = self._rows((request.item,))
        return rows if isinstance(rows, Problem) else Viewed(row=rows[0])

    def _compare(self, request: Compare) -> Event:
        rows = self._rows(request.items)
        return rows if isinstance(rows, Problem) else Compared(rows=tuple(rows), slots=request.slots)

    def _attributes(self, request: ListAttributes) -> Event:
        return Attributes(category=request.category, slots=self.catalogue.schema(request.category))

    # --- the user -----------------------------------------------------------------------------------------------

    def _talk(self, acts: Callable[[], list[user.Act]]) -> Event:
        """What the user says; a question that reveals something new is free."""
        before = self.mind.revealing
        self.counts.asks += 1
        spoken = Spoken(acts=tuple(acts()))
        self.counts.free += self.mind.revealing > before
        return spoken

    def _ask(self, request: Ask) -> Event:
        if not 0 <= request.need < len(self.brief.needs):
            return self._problem("bad_arguments", f"the user wants {len(self.brief.needs)} thing(s)")
        return self._talk(lambda: user.answer(self.mind, self.brief, self.catalogue, request.need, request.slots))

    def _say(self, request: Say) -> Event:
        """A message; of several needs, the first that still keeps something back is meant."""
        hidden = [i for i, n in enumerate(self.brief.needs) if any(c.slot not in self.mind.told[i] for c in n.hidden)]
        need = hidden[0] if hidden else 0
        return self._talk(lambda: user.listen(self.mind, self.brief, self.catalogue, need, request.text))

    def _show(self, request: Show) -> Event:
        rows = self._rows(request.items)
        if isinstance(rows, Problem):
            return rows
        needs = [user.need_of(self.mind, self.catalogue, row) for row in rows]
        acts = user.react(self.mind, self.catalogue, needs, rows)
        for row, act in zip(rows, acts, strict=True):
            (self.confirmed.discard if act.kind == "REJECT" else self.confirmed.add)(row)
        return Spoken(acts=tuple(acts))

    # --- cart and end -------------------------------------------------------------------------------------------

    def _cart(self) -> Cart:
        price = self.catalogue.numbers.get("price")
        total = sum(q * float(price.values[row]) for row, q in self.cart.items()) if price is not None else math.nan
        return Cart(lines=tuple(self.cart.items()), total=total)

    def _add(self, request: CartAdd) -> Event:
        rows = self._rows((request.item,))
        if isinstance(rows, Problem):
            return rows
        if not self.catalogue.in_stock[rows[0]]:
            return self._problem("bad_arguments", "that item is out of stock")
        self.cart[rows[0]] = self.cart.get(rows[0], 0) + request.quantity
        return self._cart()

    def _remove(self, request: CartRemove) -> Event:
        row = self.catalogue.row_of.get(request.item, -1)
        if row not in self.cart:
            return self._problem("unknown_item", "that item is not in the cart")
        self.cart[row] -= request.quantity
        if self.cart[row] <= 0:
            del self.cart[row]
        return self._cart()

    def _recommend(self, request: Recommend) -> Event:
        """Ends the episode. An item no tool has shown breaks the rules, however right it is."""
        if self.brief.purse is not None:
            return self._problem("not_here", "this user buys: fill the cart and check out")
        rows = [self._row(item) for item in request.items]
        grounded = tuple(row for row in rows if row is not None)
        self.close = Close(rows=grounded, reasons=request.reasons, valid=len(grounded) == len(rows))
        return Spoken(acts=())

    def _checkout(self, request: Checkout) -> Event:
        """Ends a cart task. Buying what the user has not looked at, or has rejected, breaks the rules."""
        if self.brief.purse is None:
            return self._problem("not_here", "this user wants advice: recommend")
        if not self.cart:
            return self._problem("empty_cart", "nothing is in the cart")
        confirmed = all(row in self.confirmed for row in self.cart)
        self.close = Close(rows=tuple(self.cart), reasons=request.reasons, valid=confirmed)
        return Spoken(acts=())


_HANDLERS: dict[type, Callable[[Desk, Any], Event]] = {
    Search: Desk._search,
    View: Desk._view,
    Compare: Desk._compare,
    ListAttributes: Desk._attributes,
    Ask: Desk._ask,
    Say: Desk._say,
    Show: Desk._show,
    CartAdd: Desk._add,
    CartRemove: Desk._remove,
    Recommend: Desk._recommend,
    Checkout: Desk._checkout,
    Malformed: Desk._malformed,
}
