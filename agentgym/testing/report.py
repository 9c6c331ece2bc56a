"""What a conformance suite found: a list of checks, and the machinery that runs each within its time."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from agentgym.errors import AgentGymError
from agentgym.types import Record

CheckStatus = Literal["passed", "failed", "not_claimed", "skipped"]
_STYLE = {"passed": "green", "failed": "bold red", "not_claimed": "dim", "skipped": "yellow"}
NOT_RUN = "not run"
GRACE = 2.0
"""Seconds beyond its deadline after which a loop that does not answer counts as blocked."""
T = TypeVar("T")


class CheckFailed(AgentGymError, AssertionError):
    """What was checked does not hold; the message says at which step, and what differs."""


class NotClaimed(Exception):
    """The subject does not declare what this check is about."""


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


class Check(Record, frozen=True, kw_only=True):
    """One line of a report."""

    name: str
    status: CheckStatus
    detail: str = ""
    seconds: float = 0.0


class CheckReport(Record, frozen=True, kw_only=True):
    """Every check of one subject, in the order they ran."""

    subject: str
    checks: tuple[Check, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing failed. What is not claimed or skipped does not count against the subject."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.status == "failed")

    @property
    def exit_code(self) -> int:
        """For a command line: 0 when ok, else 1."""
        return 0 if self.ok else 1

    def __getitem__(self, name: str) -> Check:
        return {c.name: c for c in self.checks}[name]

    def raise_for_failures(self) -> None:
        """`CheckFailed` with every failed check, one a line; nothing when ok."""
        if self.failures:
            lines = "\n".join(f"  {c.name}: {c.detail}" for c in self.failures)
            raise CheckFailed(f"{self.subject} fails {len(self.failures)} of {len(self.checks)} checks\n{lines}")

    def to_json(self) -> str:
        """One JSON object: subject, ok, checks."""
        found = {"subject": self.subject, "ok": self.ok, "checks": [msgspec.structs.asdict(c) for c in self.checks]}
        return msgspec.json.encode(found).decode()

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.checks), default=0)
        lines = (f"  {c.status.replace('_', ' '):<11}  {c.name:<{width}}  {c.detail}".rstrip() for c in self.checks)
        return "\n".join([f"{self.subject}: {self._verdict}", *lines])

    @property
    def _verdict(self) -> str:
        counts = ((s.replace("_", " "), sum(c.status == s for c in self.checks)) for s in _STYLE)
        return ", ".join(f"{n} {s}" for s, n in counts if n)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.subject}: {self._verdict}", title_justify="left")
        for column in ("check", "status", "detail", "seconds"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for c in self.checks:
            status = Text(c.status.replace("_", " "), style=_STYLE[c.status])
            table.add_row(Text(c.name), status, Text(c.detail), f"{c.seconds:.2f}")
        return table


class Item(msgspec.Struct, frozen=True):
    """A check to run. `run` returns the detail of a pass; `needs` names checks that must not have failed before."""

    name: str
    run: Callable[[Any], Coroutine[Any, Any, str]]
    needs: tuple[str, ...] = ()


def run_checks(subject: str, context: Any, items: Iterable[Item], seconds: float) -> CheckReport:
    """Run the items in order on one event loop, each for at most `seconds`; one whose need failed is skipped."""
    done: dict[str, Check] = {}
    stage = Stage()
    try:
        for item in items:
            done[item.name] = _checked(stage, item, context, seconds, done)
    finally:
        stage.leave()
    return CheckReport(subject=subject, checks=tuple(done.values()))


def _checked(stage: Stage, item: Item, context: Any, seconds: float, done: Mapping[str, Check]) -> Check:
    """The line of one item, which is not run where one of its needs failed or was not run itself."""
    for need in item.needs:
        if done[need].status == "failed" or done[need].detail.startswith(NOT_RUN):
            return Check(name=item.name, status="skipped", detail=f"{NOT_RUN}, as {need} fails")
    began = time.perf_counter()
    status, detail = _verdict(stage, item, context, seconds)
    return Check(name=item.name, status=status, detail=detail, seconds=round(time.perf_counter() - began, 3))


def _verdict(stage: Stage, item: Item, context: Any, seconds: float) -> tuple[CheckStatus, str]:
    try:
        return "passed", stage.run(item.run(context), seconds)
    except NotClaimed as found:
        return "not_claimed", str(found)
    except Skipped as found:
        return "skipped", str(found)
    except CheckFailed as found:
        return "failed", str(found)
    except Exception as error:
        return "failed", f"raised {describe(error)}"


class Stage:
    """An event loop in a daemon thread. When work blocks it, both are left behind and the next work gets new ones."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The result of the work; `CheckFailed` after `seconds`, naming the line where the loop is blocked."""
        loop, thread = self._enter()
        future = asyncio.run_coroutine_threadsafe(_limited(work, seconds), loop)
        try:
            return future.result(seconds + GRACE)
        except TimeoutError as error:
            if future.done():
                raise CheckFailed(f"does not finish within {seconds:g} s (pass a larger `seconds`?)") from error
            loop.call_soon_threadsafe(loop.stop)
            self.loop = self.thread = None
            raise CheckFailed(f"blocks the event loop for more than {seconds:g} s{_where(thread)}") from error

    def _enter(self) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        if self.loop is None or self.thread is None:
            self.loop = asyncio.new_event_loop()
            self.thread = threading.Thread(target=_serve, args=(self.loop,), name="agentgym-check", daemon=True)
            self.thread.start()
        return self.loop, self.thread

    def leave(self) -> None:
        """Stop the loop; whatever still runs on it is cancelled."""
        if self.loop is not None and self.thread is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(GRACE)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()


async def _limited(work: Coroutine[Any, Any, T], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await work


def _where(thread: threading.Thread) -> str:
    """The line at which a thread is stuck, in words."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f", at {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})" if frame else ""


def describe(error: BaseException) -> str:
    """An exception in one line: its kind, its message cut short, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:200]!s}{place}".encode(errors="backslashreplace").decode()
