"""The compact surface: a closed vocabulary of single words for small models.

    want category laptop ; color red
    ask brand price                                    ->  answer brand acme ; price p05
    search category laptop ; brand acme ; price p05    ->  found 3 : r1 brand acme price p04 ; r2 brand acme price p05
    recommend r1 because brand acme ; price p05

One space between words, never more than `MAX_WORDS` of them. A catalogue's value is one word; a number is a bucket, p01
the lowest edge; `price p05` means at most edge 5 (at least, where higher is better), and of an item the tightest edge
that holds. r1..r5 are the items last shown, c1.. those in the cart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from agentgym.types import Action, Message, Observation
from agentgym_envs.shopping.catalogue import Constraint
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.lexicon import CART, COUNTS, ERRORS, HANDLES, MAX_SLOTS, MAX_WORDS, Lexicon
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
from agentgym_envs.shopping.tasks import Brief, Need
from agentgym_envs.shopping.user import Act


class Compact:
    """The surface of one episode: reads actions into requests, writes events into words. Holds the handles."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.handles: list[int] = []

    def fork(self) -> Compact:
        twin = Compact(self.lexicon)
        twin.handles = list(self.handles)
        return twin

    # --- to the agent -------------------------------------------------------------------------------------------

    def open(self, desk: Desk) -> Observation:
        self.handles = [desk.catalogue.row_of[id] for need in desk.brief.needs for id in need.among]
        return _said(" ".join(("want", self._wants(desk.brief))))

    def show(self, desk: Desk, events: Sequence[Event]) -> Observation:
        return _said(" | ".join(self._event(desk, event) for event in events))

    def _wants(self, brief: Brief) -> str:
        many = len(brief.needs) > 1
        parts = [(f"item {i + 1} " if many else "") + self._need(need) for i, need in enumerate(brief.needs)]
        if brief.purse is not None:
            parts.append(f"budget {self.lexicon.word('price', brief.purse.level)}")
            if brief.purse.percent:
                parts.append(f"voucher {brief.purse.percent} from {self.lexicon.word('price', brief.purse.threshold)}")
            if brief.purse.one_seller:
                parts.append("one_seller")
        return " | ".join(parts)

    def _need(self, need: Need) -> str:
        parts = [f"{c.slot} {self.lexicon.word(c.slot, c.value)}" for c in need.visible]
        parts += [f"{slot} vague" for slot in need.hints]
        parts += [f"best {need.best}"] if need.best else []
        which = f" | which {' '.join(HANDLES[: len(need.among)])}" if need.among else ""
        return (" ; ".join(parts) or "any") + which

    def _event(self, desk: Desk, event: Event) -> str:
        match event:
            case Found(total=total, rows=rows):
                self.handles = list(rows)
                count = str(total) if total < len(COUNTS) else "many"
                return f"found {count}" + (f" : {self._rows(rows, HANDLES)}" if rows else "")
            case Viewed(row=row):
                return (
                    f"item {self._handle(desk, row)} {self.lexicon.fields(row, self.lexicon.slots[:MAX_SLOTS], ' ; ')}"
                )
            case Compared(rows=rows, slots=slots):
                shown = slots or desk.catalogue.schema(desk.catalogue.category(rows[0]))[:4]
                return f"table {self._rows(rows, [self._handle(desk, row) for row in rows], shown)}"
            case Attributes(slots=slots):
                return f"slots {' '.join(slots[:MAX_SLOTS]) or 'none'}"
            case Cart():
                return self._cart(desk, event)
            case Spoken(acts=acts):
                return self._acts(acts)
            case Problem(kind=kind):
                return f"error {ERRORS[kind]}"

    def _rows(self, rows: Sequence[int], names: Sequence[str], slots: Sequence[str] = ()) -> str:
        shown = [s for s in slots if s in self.lexicon.slots] or self.lexicon.headline
        pairs = zip(names, rows, strict=False)
        return " ; ".join(f"{name} {self.lexicon.fields(row, shown)}".strip() for name, row in pairs)

    def _cart(self, desk: Desk, cart: Cart) -> str:
        if not cart.lines:
            return "cart none"
        purse = desk.brief.purse
        fits = purse is None or (math.isfinite(cart.total) and purse.covers(cart.total))
        return f"cart {self._rows([row for row, _ in cart.lines], CART)} | {'within' if fits else 'over'} budget"

    def _acts(self, acts: Sequence[Act]) -> str:
        answers = [self._answer(a) for a in acts if a.kind in ("INFORM", "NO_PREF", "VAGUE")]
        lead = f"item {acts[0].need + 1} " if answers and acts[0].need else ""
        parts = [f"answer {lead}{' ; '.join(answers)}"] if answers else []
        return " | ".join(parts + [self._reaction(a) for a in acts if a.kind not in ("INFORM", "NO_PREF", "VAGUE")])

    def _answer(self, act: Act) -> str:
        if act.wish is None:
            return f"{act.slot} {'any' if act.kind == 'NO_PREF' else 'vague'}"
        return f"{act.slot} {'best' if act.wish.op == 'prefer' else self.lexicon.word(act.slot, act.wish.value)}"

    def _reaction(self, act: Act) -> str:
        if act.kind in ("REJECT", "CHANGE") and act.wish is not None:
            place = f" {act.position}" if act.position else ""
            return f"{act.kind.lower()}{place} {act.slot} {self.lexicon.word(act.slot, act.wish.value)}"
        return f"{act.kind.lower()} {act.position}" if act.position else act.kind.lower()

    def _handle(self, desk: Desk, row: int) -> str:
        """The word for an item: its handle, or its place in the cart."""
        if row in self.handles:
            return HANDLES[self.handles.index(row)]
        lines = list(desk.cart)
        return CART[lines.index(row)] if row in lines[: len(CART)] else "other"

    # --- from the agent -----------------------------------------------------------------------------------------

    def read(self, desk: Desk, action: Action) -> list[Request]:
        """The one request of an action's text; whatever is no command is a `Malformed`."""
        words = action.text[: MAX_WORDS * 32].split()
        if not words or len(words) > MAX_WORDS:
            return [Malformed(kind="unparsable", detail="no command")]
        parse = self._parsers.get(words[0])
        return [parse(desk, words[1:]) if parse else Malformed(kind="unparsable", detail=words[0])]

    @cached_property
    def _parsers(self) -> dict[str, Callable[[Desk, list[str]], Request]]:
        return {
            "ask": self._read_ask,
            "search": self._read_search,
            "view": lambda desk, w: self._one(desk, w, lambda item: View(item=item)),
            "compare": lambda desk, w: self._some(desk, w, 2, 4, lambda items: Compare(items=items)),
            "attributes": self._read_attributes,
            "show": lambda desk, w: self._some(desk, w, 1, 3, lambda items: Show(items=items)),
            "add": lambda desk, w: self._one(desk, w, lambda item: CartAdd(item=item)),
            "remove": lambda desk, w: self._one(desk, w, lambda item: CartRemove(item=item)),
            "recommend": self._read_recommend,
            "checkout": lambda desk, w: self._closing(desk, w, (), lambda reasons: Checkout(reasons=reasons)),
            "say": lambda desk, w: Say(text=" ".join(w)),
        }

    def _read_ask(self, desk: Desk, words: list[str]) -> Request:
        need = 0
        if words[:1] == ["item"] and len(words) > 1 and words[1] in COUNTS:
            need, words = int(words[1]) - 1, words[2:]
        wrong = next((w for w in words if w not in self.lexicon.slots), None)
        if wrong is not None:
            return Malformed(kind="unknown_slot", detail=wrong)
        return Ask(slots=tuple(words), need=need) if words else Malformed(kind="bad_arguments", detail="ask what?")

    def _read_search(self, desk: Desk, words: list[str]) -> Request:
        filters, sort, page = [], "", 1
        for part in _split(words, ";"):
            if len(part) != 2:
                return Malformed(kind="bad_arguments", detail=" ".join(part))
            name, value = part
            if name == "sort" and value in self.lexicon.catalogue.numbers:
                sort = value
            elif name == "page" and value in COUNTS[1:]:
                page = int(value)
            else:
                wish = self.lexicon.wish(name, value)
                if isinstance(wish, Malformed):
                    return wish
                filters.append(wish)
        return Search(filters=tuple(filters), sort=sort, page=page)

    def _read_attributes(self, desk: Desk, words: list[str]) -> Request:
        if not words:
            return ListAttributes(category=desk.brief.needs[0].category)
        value = self.lexicon.values.get("category", {}).get(words[0])
        return ListAttributes(category=value) if value else Malformed(kind="unknown_value", detail=words[0])

    def _read_recommend(self, desk: Desk, words: list[str]) -> Request:
        head = words[: words.index("because")] if "because" in words else words
        items = tuple(self._item(desk, w) for w in head)
        if not 1 <= len(items) <= 3 or "" in items:
            return Malformed(kind="bad_arguments", detail="recommend one to three of r1..r5")
        return self._closing(desk, words[len(head) :], items, lambda reasons: Recommend(items=items, reasons=reasons))

    def _closing(
        self, desk: Desk, words: list[str], items: tuple[str, ...], make: Callable[[tuple[Reason, ...]], Request]
    ) -> Request:
        """`because [r1] slot value ; ...`: reasons for the named item, else for the item before."""
        if words and words[0] != "because":
            return Malformed(kind="bad_arguments", detail=words[0])
        reasons, item = [], items[0] if items else ""
        for part in _split(words[1:], ";"):
            if len(part) == 3:
                item, part = self._item(desk, part[0]), part[1:]
            wish = self.lexicon.wish(*part) if len(part) == 2 else Malformed(kind="bad_arguments")
            if isinstance(wish, Malformed) or not item:
                return wish if isinstance(wish, Malformed) else Malformed(kind="unknown_item")
            reasons.append(Reason(item=item, claim=wish))
        return make(tuple(reasons))

    def _one(self, desk: Desk, words: list[str], make: Callable[[str], Request]) -> Request:
        return self._some(desk, words, 1, 1, lambda items: make(items[0]))

    def _some(
        self, desk: Desk, words: list[str], low: int, high: int, make: Callable[[tuple[str, ...]], Request]
    ) -> Request:
        items = tuple(self._item(desk, w) for w in words)
        if not low <= len(items) <= high or "" in items:
            return Malformed(kind="bad_arguments", detail=f"{low} to {high} handles")
        return make(items)

    def _item(self, desk: Desk, word: str) -> str:
        """The id behind a handle; the handle itself where it is not in use; "" for any other word."""
        if word in HANDLES:
            at = HANDLES.index(word)
            return desk.catalogue.ids[self.handles[at]] if at < len(self.handles) else word
        if word in CART:
            lines = list(desk.cart)
            at = CART.index(word)
            return desk.catalogue.ids[lines[at]] if at < len(lines) else word
        return ""

    # --- for scripted policies ----------------------------------------------------------------------------------

    def write(self, desk: Desk, request: Request) -> Action:
        """The canonical words of a request: what `read` turns into the same request."""
        return Action(text=" ".join(self._words(desk, request)))

    def _words(self, desk: Desk, request: Request) -> list[str]:
        match request:
            case Ask(slots=slots, need=need):
                return ["ask", *(["item", str(need + 1)] if need else []), *slots]
            case Search():
                return self._search_words(request)
            case View(item=item):
                return ["view", self._name(desk, item)]
            case CartAdd(item=item):
                return ["add", self._name(desk, item)]
            case CartRemove(item=item):
                return ["remove", self._name(desk, item)]
            case Compare(items=items):
                return ["compare", *(self._name(desk, item) for item in items)]
            case Show(items=items):
                return ["show", *(self._name(desk, item) for item in items)]
            case ListAttributes(category=category):
                return ["attributes", *([self.lexicon.word("category", category)] if category else [])]
            case Recommend(items=items, reasons=reasons):
                return ["recommend", *(self._name(desk, i) for i in items), *self._because(desk, reasons, items[0])]
            case Checkout(reasons=reasons):
                return ["checkout", *self._because(desk, reasons, "")]
            case Say(text=text):
                return ["say", *text.split()]
        return []

    def _search_words(self, request: Search) -> list[str]:
        parts = [self._pair(c) for c in request.filters]
        parts += [f"sort {request.sort}"] if request.sort else []
        parts += [f"page {request.page}"] if request.page > 1 else []
        return ["search", *([" ; ".join(parts)] if parts else [])]

    def _name(self, desk: Desk, item: str) -> str:
        return self._handle(desk, desk.catalogue.row_of.get(item, -1))

    def _because(self, desk: Desk, reasons: Sequence[Reason], item: str) -> list[str]:
        parts = []
        for reason in reasons:
            name = f"{self._name(desk, reason.item)} " if reason.item != item else ""
            item = reason.item
            parts.append(f"{name}{self._pair(reason.claim)}")
        return ["because", " ; ".join(parts)] if parts else []

    def _pair(self, claim: Constraint) -> str:
        return f"{claim.slot} {self.lexicon.word(claim.slot, claim.value)}"


def _said(text: str) -> Observation:
    return Observation(messages=(Message(role="user", content=text),))


def _split(words: Sequence[str], mark: str) -> list[list[str]]:
    """The words between the marks; nothing at all for no words."""
    parts: list[list[str]] = [[]] if words else []
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
