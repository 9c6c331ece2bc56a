"""What happened since the last checkpoint, event by event, so that a kill at any instant loses unfinished units alone.

    journal/000120.frames      Unit (begun) | Played (finished) | Taken (by which update), in the order they happened

Each event is handed to the operating system as one frame (length, CRC-32, msgpack) before anything is made of it. A
checkpoint begins a new file with what is still open at that moment; files older than the newest checkpoint go. A run
that is resumed from checkpoint c reads all files from c on: they are one history, told twice in places. Somebody who
goes back to a checkpoint whose own file is gone goes on without a history.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import msgspec

from agentgym.shards import Appender, writing
from agentgym.types import Record, decode, encode
from agentgym_trainers.rollouts import Played, Unit

_HEAD = struct.Struct("<II")


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How far play has come at a checkpoint: units begun, tasks drawn of each domain, what the strategy remembers."""

    begun: int = 0
    drawn: dict[str, int] = msgspec.field(default_factory=dict)
    memory: dict[str, Any] = msgspec.field(default_factory=dict)


class Taken(Record, frozen=True, kw_only=True, tag=True):
    """The units that update `step` (weights of that number come of it) learns from."""

    step: int
    units: list[int]


Event = Unit | Played | Taken


class History:
    """Events folded: units begun, what they came to, and who was taken by which update."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.begun: dict[int, Unit] = {}
        self.played: dict[int, Played] = {}
        self.taken: dict[int, list[int]] = {}
        self.memory: dict[str, Any] = {}
        """The strategy's, after what was played last."""
        for event in events:
            match event:
                case Unit():
                    self.begun[event.number] = event
                case Played():
                    self.played[event.number] = event
                    self.memory = event.memory
                case Taken():
                    self.taken[event.step] = event.units


class Journal:
    """The journal of the run in `folder`, from checkpoint `position` on."""

    def __init__(self, folder: Path, position: int) -> None:
        self.folder = folder / "journal"
        self.folder.mkdir(exist_ok=True)
        self.prune(position if self._path(position).is_file() else math.inf)
        newest = next(reversed(self._files()), self._path(position))
        self._file = Appender(newest)
        self._file.cut(sum(_HEAD.size + len(frame) for frame in _frames(newest)))

    def history(self) -> History:
        """What it holds by now. It is read anew, and not kept: an earlier life of the run may have played much."""
        return History(event for path in self._files() for event in read(path))

    def write(self, event: Event) -> None:
        """Add an event: it survives a kill from here on. Raises `StoreError` on a full disk, and holds none of it."""
        self._file.write(_framed(event))

    def begin(self, position: int, open_: Iterable[Event]) -> None:
        """A checkpoint with this number is about to be written: go on in a file of its own, with what is open now. It
        replaces whatever an earlier life wrote from there on, all or nothing."""
        path = self._path(position)
        with closing(Appender(path.with_suffix(".writing"))) as fresh:
            fresh.cut(0)
            for event in open_:
                fresh.write(_framed(event))
        self._file.close()
        with writing(path):
            os.replace(fresh.path, path)
        self._file = Appender(path)
        for later in self._files():
            if later > path:
                later.unlink()

    def sync(self, position: int) -> None:
        """What this checkpoint began with is on the disk, and it may be renamed. For another thread to wait."""
        with writing(self._path(position)), open(self._path(position), "rb+") as file:
            os.fsync(file.fileno())

    def prune(self, position: float) -> None:
        """The checkpoint is whole: what lies before it is not needed any more."""
        for path in self._files():
            if int(path.stem) < position:
                path.unlink()

    def close(self) -> None:
        self._file.close()

    def _path(self, position: int) -> Path:
        return self.folder / f"{position:06d}.frames"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.frames"))


def read(path: Path) -> Iterator[Event]:
    """The whole events of a file; a last one that was cut off in the middle does not count."""
    return (decode(frame, cast(type[Unit], Event)) for frame in _frames(path))


def _framed(event: Event) -> bytes:
    data = encode(event)
    return _HEAD.pack(len(data), zlib.crc32(data)) + data


def _frames(path: Path) -> Iterator[bytes]:
    data = path.read_bytes() if path.is_file() else b""
    at = 0
    while len(data) - at >= _HEAD.size:
        length, crc = _HEAD.unpack_from(data, at)
        frame = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(frame) < length or zlib.crc32(frame) != crc:
            return
        yield frame
        at += _HEAD.size + length
