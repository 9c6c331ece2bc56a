"""Conformance suites, public: hand them an environment or a policy, also one of your own, and read what broke.

    from agentgym.testing import check_env
    report = check_env("shopping-v0")
    print(report)
    report.raise_for_failures()

The names below are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentgym.testing.actions import RandomActions, garbage
    from agentgym.testing.drive import Trace, drive
    from agentgym.testing.env_checks import check_env
    from agentgym.testing.fakes import LATENCIES, CountingEnv, FakePolicy, FlakyEnv, SimulatedPolicy
    from agentgym.testing.policy_checks import check_policy
    from agentgym.testing.report import Check, CheckFailed, CheckReport

_HOMES = {
    "actions": ("RandomActions", "garbage"),
    "drive": ("Trace", "drive"),
    "env_checks": ("check_env",),
    "fakes": ("LATENCIES", "CountingEnv", "FakePolicy", "FlakyEnv", "SimulatedPolicy"),
    "policy_checks": ("check_policy",),
    "report": ("Check", "CheckFailed", "CheckReport"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LATENCIES",
    "Check",
    "CheckFailed",
    "CheckReport",
    "CountingEnv",
    "FakePolicy",
    "FlakyEnv",
    "RandomActions",
    "SimulatedPolicy",
    "Trace",
    "check_env",
    "check_policy",
    "drive",
    "garbage",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'agentgym.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"agentgym.testing.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
