"""The threads of a process that computes: how many torch may use, and on which cores."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from agentgym.errors import ConfigError


def pin(threads: int | None, cores: Sequence[int] = ()) -> None:
    """Let the calling thread, and those that torch starts from it, use so many threads (0 or None: as they are) on
    these cores (none: any). Raises `ConfigError` for a core that this process may not use; does nothing about cores
    where the system cannot pin threads."""
    if threads:
        torch.set_num_threads(threads)
    if cores and hasattr(os, "sched_setaffinity"):
        check_cores(cores)
        os.sched_setaffinity(0, cores)


def check_cores(cores: Sequence[int]) -> None:
    """Raises `ConfigError` for a core that this process may not use."""
    allowed = os.sched_getaffinity(os.getpid()) if hasattr(os, "sched_getaffinity") else set(cores)
    strange = sorted(set(cores) - allowed)
    if strange:
        raise ConfigError(f"this process has no core {strange[0]}; it may use {sorted(allowed)}")
