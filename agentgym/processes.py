"""What the ends of processes say."""

from __future__ import annotations

import signal


def exit_reason(code: int) -> str:
    """An exit code of `subprocess`, in words."""
    if code == -signal.SIGKILL:
        return "signal SIGKILL (somebody's, or the system's where memory runs out)"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
