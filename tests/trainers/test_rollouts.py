"""Rollouts: strategies with a real engine, their labels and log-probs, annotations, what is set aside, and state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toys
from toys import BanditEnv, table

from agentgym.collate import collate
from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.policy import Policy, Scripted
from agentgym.store import load_run
from agentgym.types import Action, Task
from agentgym_policies.torch_engine import TorchEngine
from agentgym_trainers.config import Config, resolve
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.rollouts import Played, Rollouts, Sample, TaskCursor, Unit

toys.register()
FOREVER = Scripted(lambda e, a: lambda o: Action(text="blue"))


class Bandit(BanditEnv):
    """Two tasks, over and over; its hints are words it knows."""

    capabilities = frozenset({"ladder", "hints"})

    def tasks(self, split: str = "train", seed: int = 0) -> Any:
        return iter([Task(env=self.id, seed=n) for n in range(2)])

    def hint(self, task: Task, level: int) -> str:
        return "blue " * level


RENDERER = Renderer(closed_vocabulary(BanditEnv().vocabulary()))


def engine() -> TorchEngine:
    model = build.tiny(len(RENDERER.tokenizer), hidden=16, layers=1, seed=0)
    return TorchEngine(model, RENDERER, slots=16, max_length=96, threads=1)


def rollouts(policy: Policy, env: Environment | None = None, strategy: Any = None, **options: Any) -> Rollouts:
    declared = table(rollout={"tasks_per_step": 2, "group_size": 4}, env={"id": "bandit-v0"})
    config = msgspec.convert({**declared, "strategy": strategy or {"kind": "plain"}}, Config)
    return Rollouts(config, env or Bandit(), policy, **options)


async def play(who: Rollouts, step: int = 0) -> Played:
    """One update of two tasks as one unit."""
    cursor = TaskCursor(who.env, who.config.run.seed)
    tasks = cursor.take(2 * step + 2)[2 * step :]
    return await who.play(Unit(number=step, version=0, tasks=tuple(tasks), step=step))


async def test_a_forced_half_is_recorded_with_its_share() -> None:
    strategy = {"kind": "forced_mode", "begin": "red", "share": 0.5, "reference": 2}
    with pytest.raises(ConfigError, match="'forced_mode' has the initial policy play; give it as reference="):
        rollouts(FOREVER, strategy=strategy)
    who = rollouts(engine(), strategy=strategy, reference=FOREVER)
    played = await play(who)
    for group in played.groups:
        firsts = [next(span for _, span in s.trajectory.spans) for s in group]
        assert [s.trajectory.labels["mode"] for s in group] == ["forced"] * 2 + ["free"] * 2
        for span in firsts[:2]:
            assert span.ids[0] == RENDERER.encode("red")[0]
            assert span.sampled_logprobs[0] == pytest.approx(math.log(0.5))
        assert not any(span.sampled_logprobs for span in firsts[2:])
        assert {s.trajectory.metrics["reference"] for s in group} == {1.0}
    assert [s.trajectory.labels["mode"] for s in played.aside] == ["reference"] * 4
    assert [t.seed for t in {s.trajectory.task.id: s.trajectory.task for s in played.aside}.values()] == [0, 1]


async def test_hinted_members_are_trained_under_the_original_prompt() -> None:
    who = rollouts(engine(), strategy={"kind": "hinted_rejection", "count": 2, "attempts": 2})
    found = await play(who)
    assert [len(g) for g in found.groups] == [4, 4]
    blue = RENDERER.encode("blue")[0]
    hinted = [s.trajectory for s in found.everything if s.trajectory.labels["hint"] == "1"]
    assert len(found.handed) == 8
    assert hinted
    for t in hinted:
        first = next(span for _, span in t.spans)
        assert (blue in first.prompt, blue in first.unhinted) == (True, False)
        (batch,) = collate([t], [np.ones(2)], max_tokens=99)
        (plain,) = collate([t.replace(episode=t.episode.replace(guidance=None))], [np.ones(2)], max_tokens=99)
        assert len(plain.ids) == len(batch.ids) + 1
        np.testing.assert_array_equal(plain.logprobs[plain.mask == 1], batch.logprobs[batch.mask == 1])


async def test_derived_terms_are_composed_and_not_recorded() -> None:
    """What a trajectory alone tells: here that nobody sampled a token. What needs the models comes with learning."""
    declared = table() | {"reward": {"op": "weighted_sum", "of": {"hit": 1.0, "policy.truncated": -0.5}}}
    who = Rollouts(msgspec.convert(declared, Config), BanditEnv(), FOREVER)
    played = await play(who)
    assert {s.value for s in played.handed} == {2.0}
    assert {term.name for s in played.handed for term in s.trajectory.rewards} == {"hit"}
    assert {term.name for s in played.handed if s.reward for term in s.reward.extra} >= {"policy.truncated"}


async def test_state_goes_on_where_it_was_taken() -> None:
    strategy = {"kind": "hint_levels", "variant": "light"}
    nothing = Scripted(lambda e, a: lambda o: Action(text="red"))

    async def hints(who: Rollouts, step: int) -> list[str]:
        return [s.trajectory.labels["hint"] for s in (await play(who, step)).handed]

    straight = rollouts(nothing, strategy=strategy)
    found = [await hints(straight, step) for step in range(3)]
    assert [set(labels) for labels in found] == [{"0"}, {"1"}, {"2"}]
    cut = rollouts(nothing, strategy=strategy)
    saved = msgspec.json.decode(msgspec.json.encode((await play(cut)).memory))
    resumed = rollouts(nothing, strategy=strategy)
    resumed.restore(saved)
    assert [await hints(resumed, step) for step in (1, 2)] == found[1:]
    assert resumed.strategy.state() == straight.strategy.state()


async def test_a_strategy_the_environment_cannot_carry_is_refused_when_built() -> None:
    with pytest.raises(ConfigError, match="needs the capability 'hints'"):
        rollouts(FOREVER, env=BanditEnv(), strategy={"kind": "hint_levels"})


async def test_aside_is_what_was_not_handed_over() -> None:
    who = rollouts(FOREVER, strategy={"kind": "dynamic_filter", "rounds": 2})
    found = await play(who)
    assert found.groups == []
    assert len(found.aside) == 16
    assert len({s.trajectory.episode.group for s in found.aside}) == 4, "further tasks are groups of their own"
    assert all(isinstance(s, Sample) and s.value == 2.0 for s in found.aside)


# --- in a run ---------------------------------------------------------------------------------------------------

GIVEN = {"key": "none", "centre": "given", "scale": "none"}
WHOLE: dict[str, Any] = {
    "dynamic_filter": {"strategy": {"kind": "dynamic_filter"}},
    "greedy": {"strategy": {"kind": "greedy"}, "advantage": [{**GIVEN, "given": "greedy"}]},
    "contrastive": {"strategy": {"kind": "contrastive", "sample": 6, "keep": 4}},
    "forced_mode": {
        "strategy": {"kind": "forced_mode", "begin": "red", "reference": 2},
        "advantage": [{**GIVEN, "given": "reference"}],
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_goes_on_after_an_interruption_with_the_same_episodes(name: str, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int, figures: Any) -> None:
        if (phase, done) == ("rl", 2):  # behind the checkpoint of the first update
            raise KeyboardInterrupt

    declared = table(
        run={"steps": 3, "checkpoint_every": 1, "deterministic": True},
        warmup={"steps": 0},
        sft={"steps": 0},
        eval={"episodes": 0},
        rollout={"tasks_per_step": 3, "group_size": 4},
    )
    config = resolve({**declared, **WHOLE[name]})
    PolicyGradient.train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        PolicyGradient.train(config, tmp_path / "cut", progress=stop)
    PolicyGradient.train(None, tmp_path / "cut", resume=True)
    one, other = ([t.content() for t in load_run(tmp_path / part).trajectories()] for part in ("whole", "cut"))
    assert one == other
    assert len(one) > 3


def test_a_run_that_cannot_be_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'hint_levels' needs the capability 'hints'; bandit-v0 claims ladder"):
        PolicyGradient.train(resolve(table() | {"strategy": {"kind": "hint_levels"}}), tmp_path / "run")
