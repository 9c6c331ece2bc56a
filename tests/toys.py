"""A bandit that speaks: small enough that reinforcement shows in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from agentgym import registry
from agentgym.env import SingleAgentEnv
from agentgym.errors import EnvironmentFault
from agentgym.policy import Policy, Scripted
from agentgym.seeding import rng
from agentgym.types import Action, Episode, Observation, RewardTerm, StepResult, Task, say

ARMS = ("red", "green", "blue", "grey")


class BanditEnv(SingleAgentEnv):
    """Twice asked to pick a word; each time `blue` is one point. Any other single arm is none; a rest is invalid."""

    id = "bandit-v0"
    version = "1"
    capabilities = frozenset({"ladder"})
    reward = {"op": "weighted_sum", "of": {"hit": 1.0}}  # noqa: RUF012 - declared once, never changed

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.hits = 0
        self.turn = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, split=split, seed=seed + number) for number in count())

    async def begin(self, task: Task) -> Observation:
        if self.broken:
            raise EnvironmentFault("the lever is stuck")
        self.hits = self.turn = 0
        return say("pick one")

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        hit = float(action.text == "blue")
        self.hits += int(hit)
        self.turn += 1
        metrics = {"success": float(self.hits == 2), "valid": float(action.text in ARMS)}
        last = self.turn == 2
        result = StepResult(rewards=(RewardTerm(name="hit", value=hit),), terminated=last, metrics=metrics)
        return (None if last else say("pick another")), result

    def vocabulary(self) -> list[str]:
        return ["pick", "one", "another", *ARMS]

    def ladder(self) -> dict[str, Policy]:
        return {"random": Scripted(_at_random), "oracle": Scripted(lambda e, a: lambda o: Action(text="blue"))}


def _at_random(episode: Episode, agent: str) -> Callable[[Observation], Action]:
    g = rng(episode.seed, episode.member, "arms")
    return lambda observation: Action(text=g.choice(ARMS))


def register() -> None:
    """Make `bandit-v0` known in this process."""
    if "bandit-v0" not in registry.catalogue():
        registry.register("bandit-v0", BanditEnv, summary="pick the blue arm, twice")


def table(**sections: dict[str, object]) -> dict[str, object]:
    """A config for seconds: a model of 10,000 parameters; sections are laid over it."""
    base: dict[str, dict[str, object]] = {
        "env": {"id": "bandit-v0"},
        "run": {"steps": 12, "threads": 1, "checkpoint_every": 4},
        "model": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1},
        "warmup": {"steps": 3, "batch": 4},
        "sft": {
            "steps": 25,
            "batch": 16,
            "demonstrations": 64,
            "teacher": {"random": 1.0},
            "optim": {"lr": 1e-2, "warmup": 3},
        },
        "rollout": {"tasks_per_step": 4, "group_size": 8, "slots": 32, "max_length": 64, "retries": 0},
        "sampling": {"max_tokens": 3},
        "optim": {"lr": 1e-2},
        "eval": {"episodes": 40, "ladder": False},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
