"""agentgym: a gym for training language-model agents.

    env = agentgym.make("shopping-v0")
    agentgym.register("maze-v0", MazeEnv)
    run = agentgym.load_run("runs/first")

The names below are imported when first used, so that `import agentgym` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from agentgym.env import Environment, SingleAgentEnv
    from agentgym.policy import Policy, Scripted, Session
    from agentgym.registry import catalogue, make, register
    from agentgym.rollout import Runner
    from agentgym.store import load_run
    from agentgym.types import Action, Message, Observation, RewardTerm, StepResult, Task, ToolCall, Trajectory

_HOMES = {
    "env": ("Environment", "SingleAgentEnv"),
    "policy": ("Policy", "Scripted", "Session"),
    "registry": ("catalogue", "make", "register"),
    "rollout": ("Runner",),
    "store": ("load_run",),
    "types": ("Action", "Message", "Observation", "RewardTerm", "StepResult", "Task", "ToolCall", "Trajectory"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Action", "Environment", "Message", "Observation", "Policy", "RewardTerm", "Runner", "Scripted", "Session",
    "SingleAgentEnv", "StepResult", "Task", "ToolCall", "Trajectory", "__version__", "catalogue", "load_run", "make",
    "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'agentgym' has no attribute {name!r}")
    return getattr(importlib.import_module(f"agentgym.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
