"""Where words go: answers to standard output, everything on the way there to standard error."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import msgspec
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from agentgym.figures import figure, looks_numeric

PATIENCE = 2.0
"""Seconds of work before a progress bar appears, and between lines where there is no terminal to draw one on."""


class _Out(Console):
    """Standard output; a reader that leaves is for `main` to handle, not for rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@functools.cache
def out() -> Console:
    return _Out(highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def emit(answer: Any) -> None:
    """The one JSON object of `--json`. NaN and infinity become null: JSON has neither."""
    text = msgspec.json.format(msgspec.json.encode(answer, enc_hook=str, order="deterministic"), indent=2)
    sys.stdout.write(text.decode() + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table in the house's style; numbers are right-aligned by their look."""
    cells = [[figure(cell) for cell in row] for row in rows]
    built = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = looks_numeric([row[index] for row in cells])
        built.add_column(name, justify="right" if numeric else "left", header_style="dim", overflow="fold")
    for row in cells:
        built.add_row(*row)
    return built


class _Above(Progress):
    """A progress bar with something below it."""

    below: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below is not None:
            yield self.below


class Bar:
    """A progress bar with the time left, on standard error; it appears only once the work has taken `PATIENCE`.

    Where standard error is no terminal, a line now and then takes its place; `below` is shown on a terminal alone.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, below: RenderableType | None = None) -> None:
        self.what, self.total, self.done, self.first, self.below = what, total, done, done, below
        self.started = self.spoke = time.monotonic()
        self.console = err()
        self.progress: _Above | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress:
            self.progress.stop()

    def advance(self, note: str = "") -> None:
        """One more is done; `note` stands beside the bar."""
        self.done += 1
        now = time.monotonic()
        if self.console.is_terminal and now - self.started > PATIENCE:
            self._draw(note)
        elif not self.console.is_terminal and now - self.spoke > 5 * PATIENCE:
            self.spoke = now
            self.console.print(f"{self.what}: {self.done}/{self.total or '?'}{self._left(now)} {note}".rstrip())

    def _left(self, now: float) -> str:
        if not self.total:
            return ""
        return f", about {(now - self.started) / (self.done - self.first) * (self.total - self.done):.0f} s left"

    def _draw(self, note: str) -> None:
        if self.progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = _Above(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self.progress.below = self.below
            self.task = self.progress.add_task(self.what, total=self.total, note=note)
            self.progress.start()
        if self.task is not None:
            self.progress.update(self.task, completed=self.done, note=note)
