"""What the adapters make conforms too: a class with tools, a prompt with a verifier, any gymnasium id."""

from __future__ import annotations

import pytest

from agentgym.adapters import ToolEnv, Verified
from agentgym.registry import make
from agentgym.testing import check_env


class Notes:
    """A notebook: tools are its public methods."""

    def reset(self, seed: int) -> str:
        self.notes: list[str] = []
        return f"Keep notes about case {seed}."

    def add(self, text: str, times: int = 1) -> str:
        """Write a note down."""
        self.notes += [text] * min(times, 3)
        return f"{len(self.notes)} notes, the last one {text[:30]}"

    def remove(self, number: int) -> str:
        """Tear a note out."""
        return f"torn out: {self.notes.pop(number)[:30]}"

    def get_reward(self) -> float:
        return len(self.notes) / 10


def addition(seed: int):
    return f"What is {seed} + 1?", lambda reply: {"right": float(reply.strip() == str(seed + 1)), "length": -0.01}


@pytest.mark.parametrize("env", [ToolEnv("notes-v0", Notes), Verified("sum-v0", addition)], ids=lambda env: env.id)
def test_adapted_environments_conform(env):
    report = check_env(env, episodes=4)
    report.raise_for_failures()
    assert report["garbage_actions"].status == report["memory"].status == report["replay"].status == "passed"


@pytest.mark.parametrize("id", ["gym:Pendulum-v1", "gym:Blackjack-v1"])
def test_gymnasium_conforms(id):
    pytest.importorskip("gymnasium")
    report = check_env(make(id), episodes=3, processes=False)
    report.raise_for_failures()
    assert report["legal_actions"].status == "passed"
