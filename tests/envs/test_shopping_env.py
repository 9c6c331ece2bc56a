"""The environment as a whole: ladder, capabilities, options, the runner, foreign catalogues, speed."""

from __future__ import annotations

import asyncio
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from shopping_files import FOREIGN, foreign

from agentgym import Runner, make
from agentgym.errors import ConfigError, UnknownName
from agentgym.rewards import composer
from agentgym.rollout import episodes
from agentgym.types import AGENT, Action, Episode, Task
from agentgym_envs.shopping.bench import shopping
from agentgym_envs.shopping.env import ShoppingEnv

RUNGS = ("random", "never_ask", "ask_one", "ask_all", "oracle")


async def success(env: ShoppingEnv, count: int) -> dict[str, float]:
    """Mean success of each rung on the same tasks, through the runner."""
    tasks = list(islice(env.tasks("test", 0), count))
    found = {}
    for name, policy in env.ladder().items():
        done = await Runner(env, policy, concurrency=32).collect(episodes(tasks))
        assert {t.status for t in done} == {"terminated"}
        found[name] = fmean(t.metrics["success"] for t in done)
    return found


@pytest.mark.parametrize("surface", ["compact", "full"])
async def test_the_ladder_is_in_order(surface: str) -> None:
    found = await success(ShoppingEnv(surface=surface), 120)
    assert tuple(found) == RUNGS
    assert found["oracle"] == 1.0
    assert found["oracle"] >= found["ask_all"] > found["ask_one"] + 0.15
    assert found["ask_one"] > found["never_ask"] + 0.1
    assert found["never_ask"] > found["random"]


@pytest.mark.parametrize("kind", FOREIGN)
async def test_the_ladder_is_in_order_on_a_foreign_catalogue(kind: str, tmp_path: Path) -> None:
    env = make("shopping-v0", surface="compact", **foreign(kind, tmp_path))
    assert isinstance(env, ShoppingEnv)
    found = await success(env, 60)
    assert found["oracle"] >= found["ask_all"] > found["never_ask"] > found["random"]
    assert found["ask_all"] >= found["ask_one"] > found["never_ask"]


async def test_a_shop_can_be_narrowed_to_the_slots_that_matter() -> None:
    env = ShoppingEnv(surface="compact", slots=("brand", "rating"))
    assert set(env.catalogue.columns) == {"category", "brand", "rating"}
    assert len(env.vocabulary()) < 140
    found = await success(env, 30)
    assert found["oracle"] == 1.0
    assert found["ask_all"] > found["never_ask"]


async def test_the_teacher_mostly_does_not_ask_and_varies_within_a_group() -> None:
    env = ShoppingEnv(surface="compact", intents=("single",), max_turns=6)
    tasks = list(islice(env.tasks("train", 0), 60))
    done = await Runner(env, env.teacher()).collect(episodes(tasks, group_size=4))
    asking = [t.metrics["asks"] > 0 for t in done]
    assert 0.2 < fmean(asking) < 0.4
    assert all(t.metrics["valid"] == 1.0 for t in done)
    groups = [asking[i : i + 4] for i in range(0, len(asking), 4)]
    assert any(len(set(g)) == 2 for g in groups)


async def test_labels_metrics_and_reward_reach_the_trajectory() -> None:
    env = ShoppingEnv(surface="compact")
    task = next(iter(env.tasks("train", 0)))
    (done,) = await Runner(env, env.ladder()["oracle"]).collect(episodes([task]))
    assert done.labels == task.labels == {"intent": task.payload["intent"]}
    reward = composer(env.reward).compose(list(done.rewards)).value
    assert reward == pytest.approx(1.0 - done.metrics["regret"])
    assert {"success", "asks", "asks_revealing", "asks_duplicate", "hallucinated", "tool_calls", "turns"} <= set(
        done.metrics
    )


async def test_a_fork_goes_its_own_way() -> None:
    env = ShoppingEnv(surface="compact", intents=("single",), vague=0.0)
    task = next(iter(env.tasks("train", 0)))
    await env.reset(task)
    slot = task.payload["needs"][0]["hidden"][0][0]
    twin = env.fork()
    asked = await twin.step({AGENT: Action(text=f"ask {slot}")})
    assert asked.metrics["asks_revealing"] == 1.0
    assert (env.desk.mind.revealing, env.desk.counts.turns) == (0, 0)
    again = await env.step({AGENT: Action(text=f"ask {slot}")})
    assert again == asked
    assert env.desk.catalogue is twin.desk.catalogue


async def test_instances_share_the_catalogue_and_nothing_of_the_episode() -> None:
    env = ShoppingEnv(surface="compact")
    other, third = env.spawn(), ShoppingEnv(surface="compact")
    assert env.catalogue is other.catalogue is third.catalogue
    assert env.world is third.world
    assert ShoppingEnv(size=500).catalogue is not env.catalogue
    task = next(iter(env.tasks("train", 0)))
    await asyncio.gather(env.reset(task), other.reset(task))
    await env.step({AGENT: Action(text="search")})
    assert other.desk.counts.turns == 0


async def test_an_episode_must_have_begun_and_not_have_ended() -> None:
    env = ShoppingEnv(surface="compact")
    with pytest.raises(ConfigError, match="reset"):
        await env.step({AGENT: Action(text="search")})
    task = next(iter(env.tasks("train", 0)))
    await env.reset(task)
    while (await env.step({AGENT: Action(text="nonsense")})).observations:
        pass
    with pytest.raises(ConfigError, match="has ended"):
        await env.step({AGENT: Action(text="search")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surfce": "compact"}, "did you mean 'surface'"),
        ({"surface": "tiny"}, "tiny"),
        ({"slots": ("brand", "prise")}, "did you mean 'price'"),
        ({"vague": 2.0}, r"vague = 2\.0 is outside"),
        ({"hidden": (3, 2)}, "fewest <= most"),
        ({"hidden": (0, 2)}, "fewest <= most"),
        ({"intents": ("singel",)}, "singel"),
        ({"intents": ()}, "intents is empty"),
        ({"size": "many"}, "size"),
        ({"intents": ("bundle",), "max_turns": 3}, "bundle needs prices"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=message):
        ShoppingEnv(**options)


async def test_foreign_tasks_and_unknown_splits_are_refused() -> None:
    env = ShoppingEnv()
    with pytest.raises(UnknownName, match="did you mean 'train'"):
        next(iter(env.tasks("trian")))
    task = next(iter(ShoppingEnv(size=500).tasks("train", 0)))
    with pytest.raises(ConfigError, match="same catalogue"):
        await env.reset(task)
    with pytest.raises(ConfigError, match="not a task of shopping-v0"):
        await env.reset(Task(env="shopping-v0", payload={"intent": "steal"}))


async def test_a_changed_file_makes_another_world(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = "name,maker,price\n" + "".join(f"saw {i},m{i % 4},{i + 1}\n" for i in range(80))
    path.write_text(text)
    first = ShoppingEnv(catalogue=str(path))
    path.write_text(text + "saw 80,m0,81\n")
    __import__("os").utime(path, ns=(1, 1))
    assert len(ShoppingEnv(catalogue=str(path)).catalogue) == len(first.catalogue) + 1


async def test_scripts_need_no_look_at_the_hidden_wishes() -> None:
    """Every rung but the oracle acts alike on a task and its twin until the user has told something."""
    env = ShoppingEnv(surface="compact", intents=("single", "multi"))
    for task in islice(env.tasks("test", 9), 20):
        for name in ("random", "never_ask", "ask_one", "ask_all", "teacher"):
            actions = []
            for one in (task, env.hidden_twin(task)):
                seen = await env.reset(one)
                async with env.demonstrations()[name].session(Episode(task=one), AGENT) as session:
                    actions.append((await session.act(seen[AGENT])).text)
            assert actions[0] == actions[1]


def test_the_bench_reports_what_it_promises() -> None:
    figures = shopping(products=2000, episodes=10, searches=50)
    rows = {row["what"]: row for row in figures["cpu_ms"]}
    assert {"reset", "step", "search, 4 words", "search, 3 filters"} <= set(rows)
    assert rows["reset"]["p50"] < 5.0
    assert all(row["p50"] <= row["p99"] for row in rows.values())
    assert figures["memory_mib"] > 0
