"""The full surface: JSON tool calls and natural text, for pretrained models.

Calls come as `Action.tool_calls`, or in the text as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` or as
bare JSON; any other text is a message to the user. A broken call is answered with a typed error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from agentgym.types import Action, Message, Observation, ToolCall
from agentgym_envs.shopping import tools
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.phrases import Phrases
from agentgym_envs.shopping.requests import (
    Attributes,
    Cart,
    Compared,
    Event,
    Found,
    Malformed,
    Problem,
    Request,
    Say,
    Spoken,
    Viewed,
)

SYSTEM = (
    "You help a customer of a shop. Find out what they want, search, and end with recommend (or, when they buy several "
    "things, cart_add and checkout). Recommend only items a tool has shown you; give true reasons; show items before "
    "you check out. Use one tool at a time; plain text is said to the customer. You have {budget} steps."
)
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
MAX_TEXT = 20_000
"""Characters of an action that are read."""


class Full:
    """The surface of one episode. It remembers the calls of the turn, to join the answers to them."""

    def __init__(self) -> None:
        self.pending: list[ToolCall | None] = []

    def fork(self) -> Full:
        twin = Full()
        twin.pending = list(self.pending)
        return twin

    # --- to the agent -------------------------------------------------------------------------------------------

    def open(self, desk: Desk) -> Observation:
        system = Message(role="system", content=SYSTEM.format(budget=desk.brief.budget))
        user = Message(role="user", content=self._phrases(desk).opening(desk.brief))
        return Observation(messages=(system, user), tools=tools.schemas())

    def show(self, desk: Desk, events: Sequence[Event]) -> Observation:
        """One tool message per call; what the user says of their own accord is a user message."""
        calls = [*self.pending, *[None] * len(events)]
        return Observation(messages=tuple(self._message(desk, e, c) for e, c in zip(events, calls, strict=False)))

    def _message(self, desk: Desk, event: Event, call: ToolCall | None) -> Message:
        if isinstance(event, Spoken) and call is None:
            return Message(role="user", content=self._phrases(desk).say(event.acts, desk.counts.turns))
        text = msgspec.json.encode(self._content(desk, event)).decode()
        if call is None:
            return Message(role="user", content=text)
        return Message(role="tool", content=text, tool_call_id=call.id, name=call.name)

    def _phrases(self, desk: Desk) -> Phrases:
        return Phrases(desk.catalogue, desk.mind.seed)

    def _content(self, desk: Desk, event: Event) -> dict[str, Any]:
        match event:
            case Found(total=total, rows=rows, page=page):
                return {"total": total, "page": page, "items": [self._line(desk, row) for row in rows]}
            case Viewed(row=row):
                return msgspec.to_builtins(desk.catalogue.product(row))  # type: ignore[no-any-return]
            case Compared(rows=rows, slots=slots):
                shown = slots or desk.catalogue.schema(desk.catalogue.category(rows[0]))
                return {"items": [self._line(desk, row, shown) for row in rows]}
            case Attributes(category=category, slots=slots):
                return {"category": category, "slots": [tools.about(desk, slot, category) for slot in slots]}
            case Cart(lines=lines, total=total):
                items = [{**self._line(desk, row), "qty": quantity} for row, quantity in lines]
                return {"cart": items, "total": round(total, 2) if total == total else None}
            case Spoken(acts=acts):
                return {"customer": self._phrases(desk).say(acts, desk.counts.turns)}
            case Problem(kind=kind, detail=detail):
                return {"error": kind, "detail": detail}

    def _line(self, desk: Desk, row: int, slots: Sequence[str] = ("category", "brand", "price")) -> dict[str, Any]:
        read = ((slot, desk.catalogue.columns[slot].read(row)) for slot in slots if slot in desk.catalogue.columns)
        known = {slot: value for slot, value in read if value is not None}
        return {"id": desk.catalogue.ids[row], "title": desk.catalogue.titles[row], **known}

    # --- from the agent -----------------------------------------------------------------------------------------

    def read(self, desk: Desk, action: Action) -> list[Request]:
        """Requests of an action. An unfinished <tool_call> reads to the end of the text."""
        calls: list[ToolCall | Malformed] = list(action.tool_calls) or _calls_in(action.text[:MAX_TEXT])
        self.pending = [call if isinstance(call, ToolCall) else ToolCall(name="") for call in calls]
        if not calls:
            return [Say(text=action.text[:MAX_TEXT])]
        return [self._request(desk, call) for call in calls]

    def _request(self, desk: Desk, call: ToolCall | Malformed) -> Request:
        return tools.request_of(desk.catalogue, call.name, call.arguments) if isinstance(call, ToolCall) else call

    # --- for scripted policies ----------------------------------------------------------------------------------

    def write(self, desk: Desk, request: Request) -> Action:
        """The canonical action of a request."""
        call = tools.call_of(request)
        if call is None:
            return Action(text=request.text if isinstance(request, Say) else "")
        return Action(tool_calls=(call,))


def _calls_in(text: str) -> list[ToolCall | Malformed]:
    """Tool calls written in text, broken ones as `Malformed`; none where the text is a message."""
    marked = _CALL.findall(text)
    if marked:
        return [_call(body) or Malformed(kind="unparsable", detail="no JSON call in <tool_call>") for body in marked]
    bare = _call(text) if text.lstrip().startswith("{") else None
    return [bare] if bare else []


def _call(body: str) -> ToolCall | None:
    """A call from JSON: name, and arguments as an object or as a string that holds one."""
    try:
        found = msgspec.json.decode(body.strip())
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        return None
    return ToolCall(name=found["name"], arguments=arguments) if isinstance(arguments, dict) else None
