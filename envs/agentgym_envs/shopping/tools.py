"""The ten tools as an agent with JSON calls sees them: their argument types, schemas, and the way into requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from agentgym.errors import unknown
from agentgym.types import ToolCall
from agentgym_envs.shopping.catalogue import Catalogue, Choice, Constraint, Number, Op
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.requests import (
    Ask,
    CartAdd,
    CartRemove,
    Checkout,
    Compare,
    ListAttributes,
    Malformed,
    ProblemKind,
    Reason,
    Recommend,
    Request,
    Search,
    Show,
    View,
)

Page = Annotated[int, Meta(ge=1, le=1000)]
Quantity = Annotated[int, Meta(ge=1, le=99)]
Ids = Annotated[tuple[str, ...], Meta(min_length=1, max_length=3)]
Filters = Annotated[
    dict[str, Any],
    Meta(description='slot -> value, {"min": x}, {"max": x} or both; e.g. {"brand": "acme", "price": {"max": 99.0}}'),
]


class Args(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the tools' arguments."""


class SearchArgs(Args, frozen=True, kw_only=True):
    query: str = ""
    filters: Filters = {}
    sort: Annotated[str, Meta(description="a numeric slot; best first")] = ""
    page: Page = 1
    in_stock: bool = True


class ViewArgs(Args, frozen=True, kw_only=True):
    product_id: str


class CompareArgs(Args, frozen=True, kw_only=True):
    ids: Annotated[tuple[str, ...], Meta(min_length=2, max_length=4)]
    slots: tuple[str, ...] = ()


class ListAttributesArgs(Args, frozen=True, kw_only=True):
    category: str = ""


class AskUserArgs(Args, frozen=True, kw_only=True):
    slots: Annotated[tuple[str, ...], Meta(min_length=1, description="at most two are answered a turn")]
    text: str = ""
    item: Annotated[int, Meta(ge=1, description="which of several wanted things, from 1")] = 1


class ShowArgs(Args, frozen=True, kw_only=True):
    ids: Ids
    text: str = ""


class CartArgs(Args, frozen=True, kw_only=True):
    sku: str
    qty: Quantity = 1


class ReasonArgs(Args, frozen=True, kw_only=True):
    id: str
    slot: str
    claim: Annotated[Any, Meta(description="a value, or a bound as in filters")]


class RecommendArgs(Args, frozen=True, kw_only=True):
    ids: Ids
    reasons: tuple[ReasonArgs, ...] = ()


class CheckoutArgs(Args, frozen=True, kw_only=True):
    reasons: tuple[ReasonArgs, ...] = ()


class Refused(Exception):
    """Arguments that name what is not there; becomes a `Malformed` request."""

    def __init__(self, kind: ProblemKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: ProblemKind = kind


class Tool(NamedTuple):
    """A tool: what it is for, its arguments, the request they make, and the arguments a request came from."""

    summary: str
    args: type[Args]
    make: Callable[[Catalogue, Any], Request]


def _search(catalogue: Catalogue, a: SearchArgs) -> Request:
    if a.sort and a.sort not in catalogue.numbers:
        raise Refused("unknown_slot", str(unknown("numeric slot", a.sort[:40], catalogue.numbers)))
    filters = tuple(wish for slot, value in a.filters.items() for wish in wishes(catalogue, slot, value))
    return Search(query=a.query, filters=filters, sort=a.sort, page=a.page, in_stock=a.in_stock)


def _compare(catalogue: Catalogue, a: CompareArgs) -> Request:
    return Compare(items=a.ids, slots=_slots(catalogue, a.slots))


def _attributes(catalogue: Catalogue, a: ListAttributesArgs) -> Request:
    if a.category:
        wishes(catalogue, "category", a.category)
    return ListAttributes(category=a.category)


def _ask(catalogue: Catalogue, a: AskUserArgs) -> Request:
    return Ask(slots=_slots(catalogue, a.slots), need=a.item - 1, text=a.text)


def _recommend(catalogue: Catalogue, a: RecommendArgs) -> Request:
    return Recommend(items=a.ids, reasons=_reasons(catalogue, a.reasons))


TOOLS: dict[str, Tool] = {
    "search": Tool("Search the shop by words, structured filters, or both.", SearchArgs, _search),
    "view": Tool("Every attribute of one item.", ViewArgs, lambda c, a: View(item=a.product_id)),
    "compare": Tool("Items side by side.", CompareArgs, _compare),
    "list_attributes": Tool("The slots and values of a category.", ListAttributesArgs, _attributes),
    "ask_user": Tool("Ask the user about slots.", AskUserArgs, _ask),
    "show": Tool("Show items to the user and hear what they think.", ShowArgs, lambda c, a: Show(items=a.ids)),
    "cart_add": Tool("Put an item into the cart.", CartArgs, lambda c, a: CartAdd(item=a.sku, quantity=a.qty)),
    "cart_remove": Tool("Take an item out.", CartArgs, lambda c, a: CartRemove(item=a.sku, quantity=a.qty)),
    "recommend": Tool("Your answer, best first, with reasons. Ends the conversation.", RecommendArgs, _recommend),
    "checkout": Tool(
        "Buy the cart. Every item must have been shown to the user. Ends the conversation.",
        CheckoutArgs,
        lambda c, a: Checkout(reasons=_reasons(c, a.reasons)),
    ),
}


def request_of(catalogue: Catalogue, name: str, arguments: Mapping[str, Any]) -> Request:
    """The request of a call; a wrong name or argument becomes a `Malformed` that says what is wrong."""
    tool = TOOLS.get(name)
    if tool is None:
        return Malformed(kind="unknown_tool", detail=str(unknown("tool", name[:40], TOOLS)))
    try:
        return tool.make(catalogue, msgspec.convert(dict(arguments), tool.args))
    except Refused as error:
        return Malformed(kind=error.kind, detail=str(error))
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        return Malformed(kind="bad_arguments", detail=f"{name}: {error}"[:200])


def wishes(catalogue: Catalogue, slot: str, value: Any) -> list[Constraint]:
    """A filter or claim as constraints: a value, or bounds of a number slot."""
    column = catalogue.columns.get(slot)
    if column is None:
        raise Refused("unknown_slot", str(unknown("slot", slot[:40], catalogue.columns)))
    if isinstance(column, Choice):
        return [_named(column, slot, value)]
    if isinstance(value, dict):
        return [_bound(slot, op, bound) for op, bound in value.items()]
    return [_bound(slot, column.bound, value)]


def _named(column: Choice, slot: str, value: Any) -> Constraint:
    """A value as the catalogue writes it; case does not matter."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise Refused("bad_arguments", f"{slot}: a value is text")
    if str(value) in column.code_of:
        return Constraint(slot, "is", str(value))
    folded = column.folded.get(str(value).casefold())
    if folded is None:
        raise Refused("unknown_value", str(unknown(f"value of {slot}", str(value)[:40], column.values[:200])))
    return Constraint(slot, "is", folded)


def _bound(slot: str, op: str, value: Any) -> Constraint:
    if op not in ("min", "max"):
        raise Refused("bad_arguments", f'{slot}: bounds are "min" and "max"')
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise Refused("bad_arguments", f"{slot}: a bound is a finite number")
    which: Op = "max" if op == "max" else "min"
    return Constraint(slot, which, float(value))


def _slots(catalogue: Catalogue, names: tuple[str, ...]) -> tuple[str, ...]:
    wrong = next((n for n in names if n not in catalogue.columns), None)
    if wrong is not None:
        raise Refused("unknown_slot", str(unknown("slot", wrong[:40], catalogue.columns)))
    return names


def _reasons(catalogue: Catalogue, reasons: tuple[ReasonArgs, ...]) -> tuple[Reason, ...]:
    return tuple(Reason(item=r.id, claim=wish) for r in reasons for wish in wishes(catalogue, r.slot, r.claim))


# --- out --------------------------------------------------------------------------------------------------------


@cache
def schemas() -> tuple[dict[str, Any], ...]:
    """The tools as JSON schemas, in the form chat templates take."""
    parameters, parts = msgspec.json.schema_components([tool.args for tool in TOOLS.values()])
    functions = (
        {"name": name, "description": tool.summary, "parameters": _inline(schema, parts)}
        for (name, tool), schema in zip(TOOLS.items(), parameters, strict=True)
    )
    return tuple({"type": "function", "function": function} for function in functions)


def _inline(schema: Any, parts: Mapping[str, Any]) -> Any:
    """The schema without references and titles."""
    if isinstance(schema, dict) and "$ref" in schema:
        return _inline(parts[schema["$ref"].rpartition("/")[2]], parts)
    if isinstance(schema, dict):
        return {k: _inline(v, parts) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return [_inline(v, parts) for v in schema] if isinstance(schema, list) else schema


def call_of(request: Request) -> ToolCall | None:
    """The canonical call of a request; None for what is no tool call (a message)."""
    arguments = _arguments(request)
    return ToolCall(name=arguments[0], arguments=arguments[1]) if arguments else None


def _arguments(request: Request) -> tuple[str, dict[str, Any]] | None:
    match request:
        case Search(query=query, filters=filters, sort=sort, page=page):
            given = {"query": query, "filters": _filters(filters), "sort": sort, "page": page if page > 1 else 0}
            return "search", {k: v for k, v in given.items() if v}
        case View(item=item):
            return "view", {"product_id": item}
        case Compare(items=items, slots=slots):
            return "compare", {"ids": list(items), **({"slots": list(slots)} if slots else {})}
        case ListAttributes(category=category):
            return "list_attributes", {"category": category} if category else {}
        case Ask(slots=slots, need=need):
            return "ask_user", {"slots": list(slots), **({"item": need + 1} if need else {})}
        case Show(items=items):
            return "show", {"ids": list(items)}
        case CartAdd(item=item, quantity=quantity):
            return "cart_add", {"sku": item, "qty": quantity}
        case CartRemove(item=item, quantity=quantity):
            return "cart_remove", {"sku": item, "qty": quantity}
        case Recommend(items=items, reasons=reasons):
            return "recommend", {"ids": list(items), "reasons": [_reason(r) for r in reasons]}
        case Checkout(reasons=reasons):
            return "checkout", {"reasons": [_reason(r) for r in reasons]}
    return None


def _filters(filters: tuple[Constraint, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for wish in filters:
        if wish.op == "is":
            found[wish.slot] = wish.value
        else:
            found.setdefault(wish.slot, {})[wish.op] = wish.value
    return found


def _reason(reason: Reason) -> dict[str, Any]:
    return {"id": reason.item, "slot": reason.claim.slot, "claim": _filters((reason.claim,))[reason.claim.slot]}


def about(desk: Desk, slot: str, rows_category: str) -> dict[str, Any]:
    """What `list_attributes` says of a slot: its most frequent values, or its range."""
    column = desk.catalogue.columns[slot]
    rows = desk.catalogue.rows_of(rows_category)
    if isinstance(column, Number):
        known = column.values[rows][column.present[rows]]
        better = "lower" if column.slot.better == "low" else "higher"
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        return {"slot": slot, "min": low, "max": high, "unit": column.slot.unit, "better": better}
    codes = set(column.codes[rows].tolist())
    return {"slot": slot, "values": [v for code, v in enumerate(column.values) if code in codes][:20]}
