"""What an agent asks of the shop, and what it gets back: typed, before any surface puts it into words.

A surface turns an `Action` into requests and events into a message; the desk sees only these records.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agentgym_envs.shopping.catalogue import Constraint
from agentgym_envs.shopping.user import Act

ProblemKind = Literal[
    "unparsable", "unknown_tool", "bad_arguments", "unknown_slot", "unknown_value", "unknown_item", "not_here",
    "empty_cart", "too_many_calls",
]  # fmt: skip


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """A claim about an item: this wish is true of it."""

    item: str
    claim: Constraint


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """`page` counts from 1; `sort` is a number slot, best first."""

    query: str = ""
    filters: tuple[Constraint, ...] = ()
    sort: str = ""
    page: int = 1
    in_stock: bool = True


class View(msgspec.Struct, frozen=True, kw_only=True):
    item: str


class Compare(msgspec.Struct, frozen=True, kw_only=True):
    items: tuple[str, ...]
    slots: tuple[str, ...] = ()


class ListAttributes(msgspec.Struct, frozen=True, kw_only=True):
    category: str = ""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """`need` counts from 0: which of the things in a bundle is meant."""

    slots: tuple[str, ...]
    need: int = 0
    text: str = ""


class Say(msgspec.Struct, frozen=True, kw_only=True):
    text: str


class Show(msgspec.Struct, frozen=True, kw_only=True):
    items: tuple[str, ...]
    text: str = ""


class CartAdd(msgspec.Struct, frozen=True, kw_only=True):
    item: str
    quantity: int = 1


class CartRemove(msgspec.Struct, frozen=True, kw_only=True):
    item: str
    quantity: int = 1


class Recommend(msgspec.Struct, frozen=True, kw_only=True):
    items: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()


class Checkout(msgspec.Struct, frozen=True, kw_only=True):
    reasons: tuple[Reason, ...] = ()


class Malformed(msgspec.Struct, frozen=True, kw_only=True):
    """A call that is none, with what is wrong with it. The desk counts it and says so."""

    kind: ProblemKind
    detail: str = ""


Buying = CartAdd | CartRemove | Checkout
Talking = Ask | Say | Show | Recommend
Request = Search | View | Compare | ListAttributes | Talking | Buying | Malformed


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """`rows` is the page asked for, of `total` matches."""

    total: int
    rows: tuple[int, ...]
    page: int = 1
    filters: tuple[Constraint, ...] = ()


class Viewed(msgspec.Struct, frozen=True, kw_only=True):
    row: int


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    rows: tuple[int, ...]
    slots: tuple[str, ...]


class Attributes(msgspec.Struct, frozen=True, kw_only=True):
    category: str
    slots: tuple[str, ...]


class Spoken(msgspec.Struct, frozen=True, kw_only=True):
    acts: tuple[Act, ...]


class Cart(msgspec.Struct, frozen=True, kw_only=True):
    """`total` is before any voucher; nan when a price is unknown."""

    lines: tuple[tuple[int, int], ...]
    total: float


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    kind: ProblemKind
    detail: str = ""


Event = Found | Viewed | Compared | Attributes | Spoken | Cart | Problem
