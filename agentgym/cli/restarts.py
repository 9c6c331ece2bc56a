"""`agentgym train --restarts N`: training in a process of its own, and resumed when a crash ends it.

What asks it to end (Ctrl-C, SIGTERM) ends it, and so does an error that it reports itself: the next life would meet
that again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentgym.cli.output import err
from agentgym.processes import exit_reason
from agentgym.store import checkpoints

COMMAND = (sys.executable, "-m", "agentgym.cli")
ASKED = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if hasattr(signal, "SIGHUP") else set())
"""Signals that ask for an end."""


def keep_going(options: Namespace, folder: Path) -> int:
    """The exit code of the training in the end; of one that a signal ended, 128 and the signal's number, as a shell
    has it. It is resumed at most `options.restarts` times in a row without progress."""
    left, reached, begun = options.restarts, progress(folder), bool(options.resume)
    while True:
        code = _run(words(options, folder, begun))
        if code >= 0 or -code in ASKED:
            return code if code >= 0 else 128 - code
        if (now := progress(folder)) > reached:
            left, reached = options.restarts, now
        err().print(f"the training died: {exit_reason(code)}; {left} restarts left", markup=False)
        if left < 1:
            return 128 - code
        left, begun = left - 1, (folder / "config.toml").is_file()


def words(options: Namespace, folder: Path, begun: bool) -> list[str]:
    """The arguments of the next life of a run that was begun, or was not."""
    flags = [f"--{name}" for name in ("json", "debug") if getattr(options, name)]
    if begun:
        return ["train", "--resume", str(folder), *flags]
    settings = [word for setting in options.settings for word in ("--set", setting)]
    return ["train", options.preset, "--out", str(folder), *settings, *flags]


def progress(folder: Path) -> tuple[int, int]:
    """How far a run has come: its newest checkpoint, and the bytes in its journal of what was played since."""
    done = [checkpoint.step for checkpoint in checkpoints(folder)]
    return max(done, default=-1), sum(file.stat().st_size for file in folder.glob("journal/*.frames"))


def _run(arguments: Sequence[str]) -> int:
    """One life. A terminal's Ctrl-C reaches it by itself; other requests to end are passed on."""
    with subprocess.Popen([*COMMAND, *arguments]) as process, _passing(process):
        return process.wait()


@contextmanager
def _passing(process: subprocess.Popen[Any]) -> Iterator[None]:
    def answer(number: int, _: Any) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, answer) for number in ASKED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
