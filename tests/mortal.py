"""A bandit whose process dies: for tests of what lives longer."""

from __future__ import annotations

import os
import signal
from typing import Any

from toys import BanditEnv, table

from agentgym import registry
from agentgym.types import Action, Observation, StepResult
from agentgym_trainers.config import Config, from_table

EXACT: dict[str, Any] = {
    "warmup": {"steps": 0},
    "sft": {"steps": 0},
    "eval": {"episodes": 0},
    "env": {"id": "mortal-v0"},
    "run": {"deterministic": True, "steps": 5, "checkpoint_every": 2, "threads": 1, "processes": 2},
}


class Mortal(BanditEnv):
    """Turn number `turns` of all processes together kills the one that takes it; they are counted in the file `ledger`
    (none: it is immortal)."""

    id = "mortal-v0"

    def __init__(self, ledger: str = "", turns: int = 0) -> None:
        super().__init__()
        self.ledger, self.turns = ledger, turns

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        if self.ledger and self._number() == self.turns:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().act(action)

    def _number(self) -> int:
        with open(self.ledger, "ab") as file:
            file.write(b".")
            return file.tell()


def config(**sections: Any) -> Config:
    """`EXACT` with these sections laid over it."""
    if Mortal.id not in registry.catalogue():
        registry.register(Mortal.id, Mortal, summary="a bandit whose process dies")
    return from_table(table(**{n: {**EXACT.get(n, {}), **sections.get(n, {})} for n in {**EXACT, **sections}}))


def children(parent: int) -> list[int]:
    """The processes that this one started and that still run."""
    stats = (_stat(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid, state, owner in stats if owner == parent and state != "Z"]


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody has buried does not."""
    return _stat(pid)[1] != "Z"


def _stat(pid: int) -> tuple[int, str, int]:
    """Its state and its parent; of one that has ended meanwhile, nobody's."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, owner, *_ = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return pid, "Z", 0
    return pid, state, int(owner)
