"""The door of surfaces: how an episode is put into words, and words into requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from agentgym.types import Action, Observation
from agentgym_envs.shopping.desk import Desk
from agentgym_envs.shopping.requests import Event, Request


class Surface(Protocol):
    """One episode's words. `read(write(request))` gives the request back."""

    def open(self, desk: Desk) -> Observation:
        """The first observation."""
        ...

    def read(self, desk: Desk, action: Action) -> list[Request]:
        """What an action asks for; nothing an agent can write makes it raise."""
        ...

    def show(self, desk: Desk, events: Sequence[Event]) -> Observation:
        """What follows from a turn."""
        ...

    def write(self, desk: Desk, request: Request) -> Action:
        """The canonical action for a request: scripted policies act through it."""
        ...

    def fork(self) -> Self:
        """An independent copy."""
        ...
