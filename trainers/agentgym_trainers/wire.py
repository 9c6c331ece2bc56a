"""What the learner's process and the rollouts' say to each other: msgpack in frames, over a pair of sockets.

    channel = await Channel.over(socket)
    channel.send(Ask(id=1, what=unit))
    message = await channel.receive()        # None: the other side is gone

Records travel as a journal holds them; nothing that is received is ever run.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import traceback
from typing import Any

from agentgym import errors
from agentgym.errors import AgentGymError
from agentgym.policy import Load
from agentgym.types import Record, decode, encode
from agentgym_trainers.rollouts import Played, Unit
from agentgym_trainers.shared import Place

_HEAD = struct.Struct("<I")
_LIMIT = 2**22
"""Bytes read ahead of the frame that is waited for."""
SETUP = 0
"""The number of the first answer."""


class Message(Record, frozen=True, kw_only=True, tag=True):
    """What may be sent."""


# --- to the worker ----------------------------------------------------------------------------------------------


class Setup(Message, frozen=True, kw_only=True):
    """The first message: be the rollout side of this run. Answered under the number `SETUP`.

    `model`, `reference`: folders; `fd`, `places`: the block of weights; `path`, `registered`: where the learner's
    process finds modules, and the arguments with which it registered names itself.
    """

    config: dict[str, Any]
    model: str
    reference: str
    fd: int
    places: tuple[Place, ...]
    version: int
    path: list[str]
    registered: list[dict[str, Any]]


class Publish(Message, frozen=True, kw_only=True):
    """The block holds the weights of this version: act with them."""

    version: int


class Ask(Message, frozen=True, kw_only=True):
    """Do this, and answer under this number."""

    id: int
    what: Unit | Publish


class Drop(Message, frozen=True, kw_only=True):
    """Nobody waits for this answer any more."""

    id: int


class Reprice(Message, frozen=True, kw_only=True):
    """As `Rollouts.reprice`."""

    multipliers: dict[str, Any]


class Restore(Message, frozen=True, kw_only=True):
    """As `Rollouts.restore`."""

    memory: dict[str, Any]


# --- from the worker --------------------------------------------------------------------------------------------


class Trouble(Message, frozen=True, kw_only=True):
    """An exception, as text."""

    kind: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        trace = "".join(traceback.format_exception(error))
        return cls(kind=type(error).__name__, message=str(error), trace=trace)

    def error(self) -> Exception:
        """The same error of the gym, or of anybody else a `RuntimeError`; the worker's traceback is its note."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, AgentGymError):
            found: Exception = kind.__new__(kind, self.message)
        else:
            found = RuntimeError(f"{self.kind}: {self.message}")
        found.add_note(f"In the rollouts' process:\n{self.trace}")
        return found


class Answer(Message, frozen=True, kw_only=True):
    """To what was asked under this number."""

    id: int
    what: Played | Trouble | None


class Beat(Message, frozen=True, kw_only=True):
    """Sent all the time: the worker lives, and its engine is that busy."""

    load: Load


ToWorker = Ask | Drop | Reprice | Restore
FromWorker = Answer | Beat


class Channel:
    """One end of the pair. `expects` are the messages of the other side; others raise `msgspec.ValidationError`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expects: Any) -> None:
        self.reader, self.writer, self.expects = reader, writer, expects

    @classmethod
    async def over(cls, end: socket.socket, expects: Any) -> Channel:
        return cls(*await asyncio.open_unix_connection(sock=end, limit=_LIMIT), expects)

    def send(self, message: Message) -> None:
        """Raises where the message holds what no record may. To a side that is gone, it is a message lost."""
        data = encode(message)
        self.writer.write(_HEAD.pack(len(data)))
        self.writer.write(data)

    async def receive(self) -> Any:
        """The next message; None at the end."""
        try:
            (length,) = _HEAD.unpack(await self.reader.readexactly(_HEAD.size))
            return decode(await self.reader.readexactly(length), self.expects)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def end(self) -> None:
        """Nothing more is sent: the other side is to come to an end, and may still answer."""
        self.writer.write_eof()

    def close(self) -> None:
        """At once; what was not sent yet is lost."""
        self.writer.transport.abort()
