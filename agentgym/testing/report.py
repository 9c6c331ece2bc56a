"""What a conformance suite found: a list of checks, and the machinery that runs each within its time."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, TypeVar

import msgspec

from agentgym.errors import AgentGymError
from agentgym.types import Record

CheckStatus = Literal["passed", "failed", "not_claimed", "skipped"]
_STYLE = {"passed": "green", "failed": "bold red", "not_claimed": "dim", "skipped": "yellow"}
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
    run: Callable[[Any], Awaitable[str]]
    needs: tuple[str, ...] = ()


def run_checks(subject: str, context: Any, items: Iterable[Item], seconds: float) -> CheckReport:
    """Run the items in order, each on an event loop and a thread of its own for at most `seconds`.

    The thread is what lets a check end although the subject blocks its loop; it is a daemon and is left behind then.
    """
    done: dict[str, Check] = {}
    for item in items:
        broken = [n for n in item.needs if done[n].status == "failed" or done[n].detail.startswith("not run")]
        if broken:
            done[item.name] = Check(name=item.name, status="skipped", detail=f"not run, as {broken[0]} does not hold")
            continue
        began = time.perf_counter()
        status, detail = _verdict(item, context, seconds)
        done[item.name] = Check(
            name=item.name, status=status, detail=detail, seconds=round(time.perf_counter() - began, 3)
        )
    return CheckReport(subject=subject, checks=tuple(done.values()))


def _verdict(item: Item, context: Any, seconds: float) -> tuple[CheckStatus, str]:
    try:
        return "passed", in_thread(item.run, context, seconds)
    except NotClaimed as found:
        return "not_claimed", str(found)
    except Skipped as found:
        return "skipped", str(found)
    except CheckFailed as found:
        return "failed", str(found)
    except Exception as error:
        return "failed", f"raised {describe(error)}"


def in_thread(work: Callable[[Any], Awaitable[T]], context: Any, seconds: float) -> T:
    """`asyncio.run(work(context))` in a daemon thread; `CheckFailed` naming the line when it is blocked for longer."""
    answer: list[T] = []
    problem: list[BaseException] = []

    async def main() -> T:
        async with asyncio.timeout(seconds):
            return await work(context)

    def body() -> None:
        try:
            answer.append(asyncio.run(main()))
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=body, name="agentgym-check", daemon=True)
    thread.start()
    thread.join(seconds + 2.0)
    if thread.is_alive():
        raise CheckFailed(f"blocks the event loop for more than {seconds:g} s{_where(thread)}")
    if problem and isinstance(problem[0], TimeoutError):
        raise CheckFailed(f"does not finish within {seconds:g} s")
    if problem:
        raise problem[0]
    return answer[0]


def _where(thread: threading.Thread) -> str:
    """The line at which a thread is stuck, in words."""
    frame = sys._current_frames().get(thread.ident or 0)
    return f", at {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})" if frame else ""


def describe(error: BaseException) -> str:
    """An exception in one line: its kind, its message cut short, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:200]!s}{place}".encode(errors="backslashreplace").decode()
