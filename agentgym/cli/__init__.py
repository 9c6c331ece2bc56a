"""The `agentgym` command.

    0    it worked
    1    it worked, and the answer is no: a failed check, a replay that differs, a plan this machine cannot do
    2    it was asked wrongly: an unknown name, a misspelt key, a missing file (one line; --debug shows the traceback)
    130  interrupted; what can be resumed says how

With `--json` standard output carries exactly one object, and everything for people goes to standard error.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from agentgym.errors import AgentGymError

OK, NO, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    from agentgym.cli.arguments import parser

    words = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _warn
    _say_anything()
    try:
        options = parser(words).parse_args(words)
    except AgentGymError as error:
        return _complain(error)
    try:
        return int(options.run(options) or OK)
    except (AgentGymError, OSError) as error:
        if options.debug:
            raise
        return _broken_pipe() if isinstance(error, BrokenPipeError) else _complain(error)
    except KeyboardInterrupt:
        print("agentgym: interrupted", file=sys.stderr)
        return INTERRUPTED


def _say_anything() -> None:
    """Observations may hold what a terminal's encoding has not: it is shown escaped, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(error: Exception) -> int:
    print(f"agentgym: {' '.join(str(error).split())}", file=sys.stderr)
    return USAGE


def _broken_pipe() -> int:
    """Whoever read our output has seen enough (`agentgym list | head`)."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"agentgym: warning: {message}", file=sys.stderr)
