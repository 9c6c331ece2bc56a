"""Hints in three levels: that the user keeps something back, of which slot, and how to ask for it.

They name the hidden wish that weighs most and never its value, so a task and its hidden twin have the same hints. The
compact surface's words are the ones its agent already reads and writes.
"""

from __future__ import annotations

import msgspec

from agentgym_envs.shopping import tools
from agentgym_envs.shopping.requests import Ask
from agentgym_envs.shopping.tasks import Brief

LEVELS = {
    "compact": ("any vague", "{item}{slot} vague", "ask {item}{slot}"),
    "full": (
        "The customer has not told you everything that matters to them.",
        "The customer has not told you what they want in this: {item}{slot}.",
        "Ask the customer before you search: {call}",
    ),
}


def hint(brief: Brief, surface: str, level: int) -> str:
    """The hint of this level, from 1 on; "" for level 0 and where nothing is hidden."""
    hidden = [(wish.weight, -i, wish.slot) for i, need in enumerate(brief.needs) for wish in need.hidden]
    if level < 1 or not hidden:
        return ""
    _, place, slot = max(hidden, key=lambda found: found[:2])
    item = f"item {1 - place} " if place else ""
    said = LEVELS[surface]
    return said[min(level, len(said)) - 1].format(item=item, slot=slot, call=_call(slot, -place))


def _call(slot: str, need: int) -> str:
    call = tools.call_of(Ask(slots=(slot,), need=need))
    assert call is not None
    return msgspec.json.encode({"name": call.name, "arguments": call.arguments}).decode()
