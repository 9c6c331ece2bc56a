"""Append-only files that survive being killed: framed trajectories, their index, and plain lines.

A shard is `MAGIC`, the record schema (u32), then frames: length u32, CRC-32 u32, step i64, return f64 (NaN: none),
then the trajectory as msgpack; little-endian; the CRC covers everything after itself. What was cut off in the middle
of a write fails its length or CRC and is never taken for whole.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from agentgym.errors import AgentGymError, StoreError
from agentgym.types import SCHEMA, Trajectory, decode, encode

MAGIC = b"AGSHARD\n"
_START = struct.Struct("<8sI")
_HEAD = struct.Struct("<II")
_KEY = struct.Struct("<qd")
OVERHEAD = _HEAD.size + _KEY.size
FIRST = _START.size
"""Where the first frame of a shard lies."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the index: where a trajectory lies, and enough to choose by without reading it."""

    shard: int
    offset: int
    length: int
    episode: str
    group: str = ""
    status: str
    value: float | None = None
    step: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


# --- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a failed write into one `StoreError` with the way out."""
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, AgentGymError) else _refused(error)
        if reason is None:
            raise
        try:
            free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there"
        except OSError:
            free = "the folder cannot be read"
        raise StoreError(
            f"cannot write {path}: {reason} ({free}). What was written before is whole: make room, "
            f"then resume the run from its folder"
        ) from error


def _refused(error: Exception) -> str | None:
    """What the operating system refused, or None for another error. Native writers (safetensors) say it in words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if "(os error " in str(error) else None


class Appender:
    """A file that only grows, or is cut. Bytes wait in memory until `flush`; a failed write leaves no half record.

    `buffer` is how many bytes may wait: 0 hands every write to the operating system at once.
    """

    def __init__(self, path: Path, *, buffer: float = 0) -> None:
        self.path, self._limit, self._waiting = path, buffer, bytearray()
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self.size = self._file.seek(0, os.SEEK_END)

    @property
    def waiting(self) -> int:
        """Bytes that a kill would lose."""
        return len(self._waiting)

    @property
    def position(self) -> int:
        """Where the next byte goes, waiting ones counted."""
        return self.size + len(self._waiting)

    def write(self, data: bytes) -> int:
        """Append; returns where the data begins. Data that brings a flush which fails is not kept."""
        start = self.position
        self._waiting += data
        if len(self._waiting) > self._limit:
            try:
                self.flush()
            except StoreError:
                del self._waiting[-len(data) :]
                raise
        return start

    def flush(self, *, sync: bool = False) -> None:
        """Hand everything to the operating system, with `sync` to the disk. Raises `StoreError` on a full disk; what
        waits is kept, and the file ends where it did before, so the call can be repeated."""
        with writing(self.path):
            if self._waiting:
                try:
                    _write_all(self._file.fileno(), bytes(self._waiting))
                except OSError:
                    self._restore()
                    raise
                self.size += len(self._waiting)
                self._waiting.clear()
            if sync:
                os.fsync(self._file.fileno())

    def _restore(self) -> None:
        try:
            os.ftruncate(self._file.fileno(), self.size)
        except OSError:
            return  # no regular file: there is nothing to cut

    def cut(self, size: int) -> None:
        """Drop everything from `size` on."""
        self.flush()
        with writing(self.path):
            os.ftruncate(self._file.fileno(), size)
            self.size = size

    def forget(self) -> None:
        """Let go of what waits."""
        self._waiting.clear()

    def close(self) -> None:
        """Flush and close; the file is closed even where the flush fails."""
        try:
            if not self._file.closed:
                self.flush()
        finally:
            self._file.close()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def start_of_shard(schema: int = SCHEMA) -> bytes:
    return _START.pack(MAGIC, schema)


def frame(payload: bytes, step: int, value: float | None) -> bytes:
    """One record: head, key, payload."""
    key = _KEY.pack(step, math.nan if value is None else value)
    return b"".join((_HEAD.pack(len(payload), zlib.crc32(payload, zlib.crc32(key))), key, payload))


def frame_of(trajectory: Trajectory, step: int, value: float | None) -> bytes:
    return frame(encode(trajectory), step, value)


def entry_of(trajectory: Trajectory, shard: int, offset: int, length: int, step: int, value: float | None) -> Entry:
    return Entry(
        shard=shard,
        offset=offset,
        length=length,
        episode=trajectory.episode.id,
        group=trajectory.episode.group,
        status=trajectory.status,
        value=value,
        step=step,
    )


# --- reading ----------------------------------------------------------------------------------------------------


class Shard:
    """A shard open for reading. Raises `StoreError` where the file is no shard, or of a schema yet to come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        start = self._file.read(FIRST)
        if len(start) < FIRST or start[: len(MAGIC)] != MAGIC:
            self._file.close()
            raise StoreError(f"{path} is no trajectory shard (it does not begin with {MAGIC!r})")
        self.schema: int = _START.unpack(start)[1]
        if self.schema > SCHEMA:
            self._file.close()
            raise StoreError(
                f"{path} was written with record schema {self.schema}, this agentgym reads up to {SCHEMA}: "
                f"upgrade with pip install -U agentgym-suite"
            )

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int) -> tuple[bytes, int, float | None, int] | None:
        """(payload, step, return, frame length) of the frame at `offset`; None where no whole frame lies."""
        self._file.seek(offset)
        head = self._file.read(OVERHEAD)
        if len(head) < OVERHEAD:
            return None
        length, crc = _HEAD.unpack_from(head)
        if not length or offset + OVERHEAD + length > os.fstat(self._file.fileno()).st_size:
            return None
        payload = self._file.read(length)
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(head[_HEAD.size :])) != crc:
            return None
        step, value = _KEY.unpack_from(head, _HEAD.size)
        return payload, step, None if math.isnan(value) else value, OVERHEAD + length

    def trajectory(self, offset: int) -> Trajectory | None:
        found = self.read(offset)
        return None if found is None else decode_trajectory(found[0], self.schema)

    def entries(self, shard: int, offset: int = FIRST) -> Iterator[Entry]:
        """What the index would say of every whole frame from `offset` on; ends at the first that is not whole."""
        while (found := self.read(offset)) is not None:
            payload, step, value, length = found
            trajectory = decode_trajectory(payload, self.schema)
            yield entry_of(trajectory, shard, offset, length, step, value)
            offset += length


def decode_trajectory(payload: bytes, schema: int) -> Trajectory:
    """A trajectory as it is today, from the bytes of any schema so far."""
    try:
        if schema == SCHEMA:
            return decode(payload, Trajectory)
        raw: dict[str, Any] = msgspec.msgpack.decode(payload)
        for version in range(schema, SCHEMA):
            raw = _MIGRATIONS[version](raw)
        return decode(msgspec.msgpack.encode(raw), Trajectory)
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise StoreError(f"a whole frame of schema {schema} holds no trajectory: {error}") from error


def _from_schema_0(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 0 had task and seed in the open, `done` for the status, turns as a bare list with rewards by name."""
    raw = dict(raw)
    done = raw.pop("done", False)
    episode = {"task": raw.pop("task"), "seed": raw.pop("seed", 0), "group": raw.pop("group", "")}
    items = []
    for index, turn in enumerate(raw.pop("turns", ())):
        amounts = turn.get("rewards", {})
        ledger = [{"name": name, "value": value, "turn": index} for name, value in amounts.items()]
        items.append({**turn, "step": turn.get("step", index), "rewards": ledger})
    status = "failed" if raw.get("failure") else "terminated" if done else "truncated"
    return {**raw, "schema": 1, "episode": episode, "status": status, "turns": {"type": "turns", "items": items}}


def _from_schema_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 had no `stale` in its spans."""
    return {**raw, "schema": 2}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_schema_0, 1: _from_schema_1}
"""From the schema that is the key to the next one."""
