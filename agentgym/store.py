"""A run is a folder that a person can read and a kill cannot break.

    runs/first/
        config.toml                     the resolved config
        metrics.jsonl                   one line of figures per step
        trajectories/000000.shard       every trajectory, append-only (`agentgym.shards` has the format)
        trajectories/index.jsonl        where each lies, its episode, group, status, return and step
        checkpoints/step-000010/        whole or absent; `checkpoint.json` holds the offsets to cut the run back to
        run.lock                        who writes; a dead writer's lock is taken over

`RunFolder` writes (one process at a time); `load_run` reads, also while somebody writes.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import socket
import sys
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec

from agentgym.errors import ConfigError, StoreError, unknown
from agentgym.shards import FIRST, Appender, Entry, Shard, entry_of, frame_of, start_of_shard, writing
from agentgym.types import SCHEMA, Trajectory

SHARD_BYTES = 64 * 2**20
_CHECKPOINT = re.compile(r"step-(\d{6,})")
_LINE = msgspec.json.Encoder()
_ENTRY = msgspec.json.Decoder(Entry)


class Offsets(msgspec.Struct, frozen=True, kw_only=True):
    """How long every file of the run was at one instant: the last shard and its bytes, index, metrics."""

    shard: int = 0
    shard_bytes: int = FIRST
    index_bytes: int = 0
    metrics_bytes: int = 0


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A complete checkpoint folder. `extra` is whatever small state its writer put beside the weights."""

    step: int
    path: str
    offsets: Offsets
    extra: dict[str, Any] = {}
    schema: int = SCHEMA


# --- reading ----------------------------------------------------------------------------------------------------


class Run:
    """A run folder, read. `len(run)` counts its trajectories; a torn tail does not count."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        _require_run(self.path)
        self.config: dict[str, Any] = tomllib.loads((self.path / "config.toml").read_text("utf-8"))
        self.index: list[Entry] = _entries(self.path / "trajectories")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        lines = _lines(self.path / "metrics.jsonl")
        try:
            return [msgspec.json.decode(line) for line in lines]
        except msgspec.DecodeError as error:
            raise StoreError(f"{self.path / 'metrics.jsonl'} is damaged: {error}") from error

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        return checkpoints(self.path)

    def __len__(self) -> int:
        return len(self.index)

    def trajectories(
        self, *, status: str | None = None, step: int | Collection[int] | None = None, group: str | None = None
    ) -> Iterator[Trajectory]:
        """The trajectories in the order written, or those of a status, step (or several) and group."""
        if status not in (None, "terminated", "truncated", "failed"):
            raise unknown("status", str(status), ("terminated", "truncated", "failed"))
        steps = (step,) if isinstance(step, int) else step
        wanted = (
            e
            for e in self.index
            if (status is None or e.status == status)
            and (steps is None or e.step in steps)
            and (group is None or e.group == group)
        )
        return _read(self.path / "trajectories", wanted)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {len(self)} trajectories, {len(self.checkpoints)} checkpoints)"

    def _repr_html_(self) -> str:
        rows = {"trajectories": len(self), "checkpoints": len(self.checkpoints), **(self.metrics or [{}])[-1]}
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(name))}</th><td>{html.escape(_short(value))}</td></tr>"
            for name, value in rows.items()
        )
        return f"<table><caption>{html.escape(str(self.path))}</caption>{cells}</table>"


def load_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder, also one that was killed or is still being written. `StoreError` where there is none."""
    return Run(path)


def checkpoints(run: Path) -> list[Checkpoint]:
    """Complete checkpoints under a run folder, oldest first. Half-written ones have another name and never count."""
    found = []
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        card = path / "checkpoint.json"
        if _CHECKPOINT.fullmatch(path.name) and card.is_file():
            try:
                held = msgspec.json.decode(card.read_bytes())
                found.append(msgspec.convert({**held, "path": str(path)}, Checkpoint))
            except msgspec.MsgspecError as error:
                raise StoreError(f"{card} is damaged: {error}; remove {path} to resume from the one before") from error
    return sorted(found, key=lambda c: c.step)


def _require_run(path: Path) -> None:
    if (path / "config.toml").is_file():
        return
    around = path if path.is_dir() else path.parent
    runs = [p.parent.name for p in around.glob("*/config.toml")]
    hint = f"; {unknown('run', path.name, runs)}" if runs else ""
    raise StoreError(f"{path} is no run folder: there is no config.toml in it{hint}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file; a last one without its newline was cut off in the middle."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.shard"


def _shards(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.shard") if path.stem.isdigit())


def _indexed(folder: Path) -> list[Entry]:
    path = folder / "index.jsonl"
    try:
        return [_ENTRY.decode(line) for line in _lines(path)]
    except msgspec.MsgspecError as error:
        raise StoreError(f"{path} is damaged: {error}; delete it, it is rebuilt from the shards") from error


def _entries(folder: Path) -> list[Entry]:
    """The index, and after it the whole frames that it does not name yet."""
    entries = _indexed(folder)
    last = entries[-1] if entries else None
    for number in _shards(folder):
        if _is_stub(_shard(folder, number)) or (last is not None and number < last.shard):
            continue
        with Shard(_shard(folder, number)) as shard:
            entries += shard.entries(number, last.end if last is not None and number == last.shard else FIRST)
    return entries


def _is_stub(path: Path) -> bool:
    """A shard that was killed while its first bytes were written."""
    return path.stat().st_size < FIRST


def _read(folder: Path, entries: Iterator[Entry]) -> Iterator[Trajectory]:
    shard, number = None, -1
    try:
        for entry in entries:
            if shard is None or entry.shard != number:
                if shard is not None:
                    shard.close()
                shard, number = Shard(_shard(folder, entry.shard)), entry.shard
            trajectory = shard.trajectory(entry.offset)
            if trajectory is None:
                raise StoreError(
                    f"{shard.path} is damaged at byte {entry.offset} (episode {entry.episode}); "
                    f"RunFolder.open({str(folder.parent)!r}) cuts the run back to what is whole"
                )
            yield trajectory
    finally:
        if shard is not None:
            shard.close()


# --- writing ----------------------------------------------------------------------------------------------------


class RunFolder:
    """The one writer of a run folder. Make it by `create` or `open`; leave it by `close` or `with`.

    Raises `StoreError` where another process writes, the folder is damaged, or the disk is full. `buffer` is how many
    bytes of trajectories may wait in memory: what waits is what a kill loses.
    """

    def __init__(self, path: Path, *, shard_bytes: int = SHARD_BYTES, buffer: int = 0) -> None:
        self.path, self.folder = path, path / "trajectories"
        self._shard_bytes, self._buffer = shard_bytes, buffer
        _take_lock(path)
        try:
            self._recover()
        except BaseException:
            _drop_lock(path)
            raise

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], **options: Any) -> Self:
        """Begin a run in a new or empty folder."""
        root = Path(path)
        if root.exists() and any(root.iterdir()):
            raise StoreError(f"{root} holds something already; resume it, or choose another folder")
        text = _toml(config)
        with writing(root / "config.toml"):
            for folder in (root, root / "trajectories", root / "checkpoints"):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(root / "config.toml", text.encode())
        return cls(root, **options)

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Continue a run: cuts a torn tail, and rebuilds index lines that the kill lost."""
        _require_run(Path(path))
        return cls(Path(path), **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush, close and unlock, even where the flush fails; the index then names nothing but what is there."""
        with ExitStack() as stack:
            stack.callback(_drop_lock, self.path)
            for close in (self._metrics.close, self._close_index, self._shard.close):
                stack.callback(close)

    def _close_index(self) -> None:
        if self._shard.waiting:  # it could not be flushed; its whole frames get their lines when the run is opened
            self._index.forget()
        self._index.close()

    def append(self, trajectory: Trajectory, *, step: int = 0, value: float | None = None) -> None:
        """Store a trajectory, the step it was collected for, and its composed return."""
        if self._shard.position >= self._shard_bytes:
            self._rotate()
        data = frame_of(trajectory, step, value)
        offset = self._shard.write(data)
        self._index.write(_LINE.encode(entry_of(trajectory, self._number, offset, len(data), step, value)) + b"\n")
        if not self._shard.waiting:
            self._index.flush()

    def log(self, figures: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl. NaN and infinity become null."""
        self._metrics.write(_LINE.encode(dict(figures)) + b"\n")

    def flush(self, *, sync: bool = False) -> None:
        """Shard first, then the index: what the index names is there."""
        for file in (self._shard, self._index, self._metrics):
            file.flush(sync=sync)

    def offsets(self) -> Offsets:
        """How long every file is, waiting bytes counted."""
        return Offsets(
            shard=self._number,
            shard_bytes=self._shard.position,
            index_bytes=self._index.position,
            metrics_bytes=self._metrics.position,
        )

    # --- checkpoints

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        return checkpoints(self.path)

    @property
    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        return next(reversed(self.checkpoints), None)

    @contextmanager
    def checkpoint(self, step: int, extra: Mapping[str, Any] | None = None) -> Iterator[Path]:
        """Yields a temporary folder to fill; on leaving it is synced and renamed into place, all or nothing."""
        final = self.path / "checkpoints" / f"step-{step:06d}"
        if final.exists():
            raise StoreError(f"{final} exists; a run writes each step once (truncate_to cuts it back to an older one)")
        self.flush(sync=True)
        card = {"step": step, "offsets": self.offsets(), "extra": dict(extra or {}), "schema": SCHEMA}
        temporary = final.with_name(f".writing-{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with writing(temporary / "checkpoint.json"):
                temporary.mkdir(parents=True)
                yield temporary
                (temporary / "checkpoint.json").write_bytes(_LINE.encode(card))
                _sync_tree(temporary)
                os.replace(temporary, final)
                _sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def drop(self, checkpoint: Checkpoint) -> None:
        """Delete a checkpoint; renamed first, so that a kill in between leaves none that looks whole."""
        path = Path(checkpoint.path)
        aside = path.with_name(f".dropped-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)

    def truncate_to(self, checkpoint: Checkpoint) -> None:
        """Cut shards, index and metrics to the checkpoint's offsets; later checkpoints go, first of all, so that a
        kill in between leaves a folder that can be cut again."""
        at = checkpoint.offsets
        _require_reach(self.offsets(), at, checkpoint)
        for later in (c for c in self.checkpoints if c.step > checkpoint.step):
            self.drop(later)
        for file in (self._shard, self._index, self._metrics):
            file.close()
        for number in _shards(self.folder):
            if number > at.shard:
                _shard(self.folder, number).unlink()
        self._open_files(at.shard)
        self._shard.cut(at.shard_bytes)
        self._index.cut(at.index_bytes)
        self._metrics.cut(at.metrics_bytes)

    # --- files

    def _open_files(self, number: int) -> None:
        self._number = number
        self._shard = Appender(_shard(self.folder, number), buffer=self._buffer)
        self._index = Appender(self.folder / "index.jsonl", buffer=math.inf)
        self._metrics = Appender(self.path / "metrics.jsonl")
        if self._shard.size < FIRST:
            self._shard.cut(0)
            self._shard.write(start_of_shard())

    def _rotate(self) -> None:
        self.flush()
        self._shard.close()
        self._number += 1
        self._shard = Appender(_shard(self.folder, self._number), buffer=self._buffer)
        self._shard.write(start_of_shard())

    def _recover(self) -> None:
        """Cut what is torn. Frames without an index line get one; index lines without a frame go, with a warning."""
        self.folder.mkdir(exist_ok=True)
        numbers = _shards(self.folder) or [0]
        held = _indexed(self.folder)
        whole = _whole(self.folder, held)
        if len(whole) < len(held):
            warnings.warn(f"{self.path}: {len(held) - len(whole)} damaged trajectories are cut off", stacklevel=4)
            numbers = [n for n in numbers if n <= (whole[-1].shard if whole else numbers[0])]
        for gone in set(_shards(self.folder)) - set(numbers):
            _shard(self.folder, gone).unlink()
        if whole != held or not _ends_whole(self.folder / "index.jsonl"):
            write_atomic(self.folder / "index.jsonl", b"".join(_LINE.encode(e) + b"\n" for e in whole))
        self._open_files(numbers[-1])
        self._shard.cut(max([e.end for e in whole if e.shard == numbers[-1]], default=FIRST))
        self._metrics.cut(sum(len(line) + 1 for line in _lines(self._metrics.path)))
        if _schema(self._shard) != SCHEMA:
            self._rotate()


def _whole(folder: Path, held: list[Entry]) -> list[Entry]:
    """The entries of a run up to the first damage, checked in the last shard that the index names and after it."""
    last = held[-1].shard if held else -1
    whole = [entry for entry in held if entry.shard < last]
    for number in _shards(folder):
        if number >= last and not _is_stub(_shard(folder, number)):
            with Shard(_shard(folder, number)) as shard:
                whole += shard.entries(number)
    return whole


def _schema(appender: Appender) -> int:
    appender.flush()
    with Shard(appender.path) as shard:
        return shard.schema


def _ends_whole(path: Path) -> bool:
    return not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")


def _require_reach(now: Offsets, at: Offsets, checkpoint: Checkpoint) -> None:
    short = (now.shard, now.shard_bytes) < (at.shard, at.shard_bytes)
    if short or now.index_bytes < at.index_bytes or now.metrics_bytes < at.metrics_bytes:
        raise StoreError(
            f"{checkpoint.path} stands at {at}, beyond the run's files ({now}): they were cut or damaged; "
            f"resume from an older checkpoint"
        )


def _toml(config: Mapping[str, Any]) -> str:
    import tomli_w

    try:
        return tomli_w.dumps(_without_none(config))
    except TypeError as error:
        raise ConfigError(f"this config cannot be written as TOML: {error}") from error


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out."""
    if isinstance(value, Mapping):
        return {str(k): _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(v) for v in value]
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content: the old or the new, never a part. Raises `StoreError` on a full disk."""
    temporary = path.with_name(f".writing-{path.name}")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _sync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder durable, where the system can sync folders (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the lock ---------------------------------------------------------------------------------------------------


def _take_lock(root: Path) -> None:
    lock = root / "run.lock"
    me = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}
    with writing(lock):
        for _ in range(2):
            try:
                descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                _refuse_if_held(lock)
                lock.unlink(missing_ok=True)
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(me, file)
            return
    raise StoreError(f"{lock} was taken by another process at the same moment; try again")


def _drop_lock(root: Path) -> None:
    (root / "run.lock").unlink(missing_ok=True)


def _refuse_if_held(lock: Path) -> None:
    """A lock is held while its process lives: same pid and same start. Of another machine we cannot tell."""
    try:
        held = json.loads(lock.read_text())
        pid, started, host = int(held["pid"]), held["started"], str(held["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if host != socket.gethostname():
        raise StoreError(f"{lock.parent} is locked by process {pid} on {host}; if that is over, delete {lock}")
    if _alive(pid) and started == _started(pid):
        raise StoreError(f"{lock.parent} is being written by process {pid}; stop it first, or choose another folder")


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)
        if handle:
            ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None for a dead one, or where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
