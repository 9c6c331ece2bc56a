"""Other frameworks' own episode loops on the same toy: 220-character observations, 110-character replies, no latency.

Each imports its framework when it runs, and says in `unlike` where its row differs. No row has tokens, log-probs,
deadlines or a disk: those are in the other tables, for our runner only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib import import_module
from itertools import islice
from math import inf
from typing import Any

import msgspec

from agentgym.bench.measure import Cost, cost
from agentgym.bench.stub import REPLY
from agentgym.policy import Scripted
from agentgym.rollout import Limits, Runner, episodes
from agentgym.testing.fakes import CountingEnv
from agentgym.types import Action, Observation

OBSERVATION = "x" * 220


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """`run(n, rounds, turns)` plays n * rounds episodes, n at once; ImportError where it is not installed."""

    run: Callable[[int, int, int], Cost]
    unlike: str
    at_once: tuple[int, ...] = (64, 256, 1024)
    rounds: int = 4


def ours(n: int, rounds: int, turns: int) -> Cost:
    """Our runner on text alone: no tokens, no deadlines, nothing written, trajectories dropped as they end."""

    async def reply(observation: Observation) -> Action:
        await asyncio.sleep(0)
        return Action(text=REPLY)

    env = CountingEnv(turns)
    limits = Limits(turn_seconds=inf, episode_seconds=inf)
    runner = Runner(env, Scripted(lambda episode, agent: reply), concurrency=n, limits=limits)
    asked = list(episodes(islice(env.tasks(), n * rounds)))

    async def work() -> None:
        async with aclosing(runner.run(asked)) as stream:
            async for _ in stream:
                pass

    return cost(work)


def gem(n: int, rounds: int, turns: int) -> Cost:
    """gem-llm's AsyncVectorEnv: a thread per environment, one step of all of them at a time."""
    base: Any = import_module("gem.core").Env
    vector = import_module("gem.vector.async_vector_env")

    class Toy(base):  # type: ignore[misc]
        def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
            self.turn = 0
            return OBSERVATION, {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.turn += 1
            return action + action, 1.0, self.turn == turns, False, {}

    envs = vector.AsyncVectorEnv(["toy"] * n, [Toy] * n)

    async def work() -> None:
        envs.reset()
        for _ in range(rounds * turns):
            envs.step([REPLY] * n)

    found = cost(work)
    envs.thread_pool_executer.shutdown()
    return found


def skyrl(n: int, rounds: int, turns: int) -> Cost:
    """skyrl-gym as SkyRL's generator drives it: a coroutine per episode, each step in an executor of 32 threads."""
    base: Any = import_module("skyrl_gym.envs.base_text_env").BaseTextEnv

    class Toy(base):  # type: ignore[misc]
        def step(self, action: str) -> dict[str, Any]:
            self.turns += 1
            said = [{"role": "user", "content": action + action}]
            return {"observations": said, "reward": 1.0, "done": self.turns == turns, "metadata": {}}

    async def play(pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(rounds):
            env, done = Toy(), False
            said, _ = await loop.run_in_executor(pool, env.init, [{"role": "user", "content": OBSERVATION}])
            history = list(said)
            while not done:
                await asyncio.sleep(0)
                history.append({"role": "assistant", "content": REPLY})
                answer = await loop.run_in_executor(pool, env.step, REPLY)
                history, done = history + answer["observations"], answer["done"]
            await loop.run_in_executor(pool, env.close)

    async def work() -> None:
        with ThreadPoolExecutor(32) as pool:
            await asyncio.gather(*(play(pool) for _ in range(n)))

    return cost(work)


PEERS = {
    "agentgym": Peer(run=ours, unlike="records observations, actions and reward terms of every turn, with timings"),
    "gem-llm": Peer(run=gem, unlike="lockstep: all environments wait for the slowest; keeps nothing"),
    "skyrl-gym": Peer(run=skyrl, unlike="keeps the messages only; no rollout loop of its own: this is SkyRL's"),
}
