"""Episode loops whose policy is an HTTP endpoint: one stub on loopback for all, its CPU time in nobody's row.

Every row says the same through the same client: the whole chat so far in each request, one keep-alive connection a
slot, aiohttp. What a framework does beyond that is its row minus the bare one.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from importlib import import_module
from itertools import islice
from math import inf
from types import ModuleType
from typing import Any

from agentgym.bench.measure import Cost, cost
from agentgym.bench.peers import OBSERVATION, Peer
from agentgym.bench.stub import stub
from agentgym.errors import EnvironmentFault
from agentgym.policy import Scripted
from agentgym.rollout import Limits, Runner, episodes
from agentgym.testing.fakes import CountingEnv
from agentgym.types import Action, Observation

TOY = "agentgym_bench_toy"
"""The name under which verifiers imports its toy environment."""


class Chat:
    """One conversation with an OpenAI-compatible endpoint; `http` is an aiohttp session, its owner closes it."""

    def __init__(self, http: Any, url: str, key: str = "none") -> None:
        self.http, self.url, self.headers = http, f"{url}/chat/completions", {"Authorization": f"Bearer {key}"}
        self.said: list[dict[str, str]] = []

    async def say(self, text: str) -> str:
        """What the endpoint answers to the chat so far and this."""
        self.said.append({"role": "user", "content": text})
        asked = {"model": "stub", "messages": self.said}
        async with self.http.post(self.url, json=asked, headers=self.headers) as response:
            response.raise_for_status()
            reply: str = (await response.json())["choices"][0]["message"]["content"]
        self.said.append({"role": "assistant", "content": reply})
        return reply

    async def act(self, observation: Observation) -> Action:
        return Action(text=await self.say(observation.messages[-1].text))


def connected(work: Callable[[Any, str], Awaitable[Any]]) -> Cost:
    """Seconds of `work(http, url)`: a client that opens as many connections as it likes, and the stub's address."""
    aiohttp: Any = import_module("aiohttp")

    async def run(url: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await work(http, url)

    with stub() as url:
        return cost(lambda: run(url))


def bare(n: int, rounds: int, turns: int) -> Cost:
    """`n` coroutines that do nothing but ask."""

    async def play(http: Any, url: str) -> None:
        for _ in range(rounds):
            chat, seen = Chat(http, url), OBSERVATION
            for _ in range(turns):
                seen = 2 * await chat.say(seen)

    async def work(http: Any, url: str) -> None:
        await asyncio.gather(*(play(http, url) for _ in range(n)))

    return connected(work)


def ours(n: int, rounds: int, turns: int) -> Cost:
    """Our runner on text alone, its policy a `Chat` per session: no deadlines, nothing written."""
    env = CountingEnv(turns)
    asked = list(episodes(islice(env.tasks(), n * rounds)))

    async def work(http: Any, url: str) -> None:
        policy = Scripted(lambda episode, agent: Chat(http, url).act)
        runner = Runner(env, policy, concurrency=n, limits=Limits(turn_seconds=inf, episode_seconds=inf))
        async with aclosing(runner.run(asked)) as stream:
            async for trajectory in stream:
                complete(len(trajectory.turns), turns, trajectory.failure)

    return connected(work)


def verifiers(n: int, rounds: int, turns: int) -> Cost:
    """verifiers' own `run_slot` with an in-process harness, as its contract allows; its traces are dropped."""
    vf: Any = import_module("verifiers.v1")
    config: Any = import_module("verifiers.v1.configs.cli.eval").EvalConfig
    load: Any = import_module("verifiers.v1.utils.loaders").load_environment

    async def work(http: Any, url: str) -> None:
        sys.modules[TOY] = toy(vf, http, n, turns)
        agent = {"runtime": {"type": "subprocess"}}
        asked = {"env": {"taskset": {"id": TOY}, "agent": agent}, "client": {"base_url": url, "api_key_var": "NONE"}}
        settings = config(**asked, model="stub", push=False, rich=None)
        env = load(settings.env)
        context = vf.ModelContext(settings.model, settings.client, settings.sampling)

        async def play(slot: Any) -> None:
            episode = await env.run_slot(slot, context, None, None)
            complete(sum(trace.num_turns for trace in episode.traces), turns, episode.errors)

        async with env.serving():
            for _ in range(rounds):
                await asyncio.gather(*(play(slot) for task in env.taskset for slot in env.slots(task)))

    return connected(work)


def toy(vf: Any, http: Any, count: int, turns: int) -> ModuleType:
    """What verifiers loads as an environment: a module that exports a taskset and the harness which plays it."""

    class Counting(vf.Task):  # type: ignore[misc]
        @vf.reward  # type: ignore[untyped-decorator]
        async def finish(self) -> float:
            return 1.0

    class Toys(vf.Taskset[Counting]):  # type: ignore[misc]
        def load(self) -> list[Any]:
            return [Counting(vf.TaskData(name=str(i), prompt=OBSERVATION), self.config.task) for i in range(count)]

    class Loop(vf.Harness):  # type: ignore[misc]
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, *rest: Any) -> Any:
            chat, seen = Chat(http, endpoint, secret), OBSERVATION
            for _ in range(turns):
                seen = 2 * await chat.say(seen)
            return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    module = ModuleType(TOY)
    vars(module).update(__all__=["Toys", "Loop"], Toys=Toys, Loop=Loop)
    return module


def complete(found: int, turns: int, failure: object) -> None:
    """A row counts whole episodes only: anything less would be cheap for the wrong reason."""
    if found != turns or failure:
        raise EnvironmentFault(f"an episode of the benchmark ended after {found} of {turns} turns: {failure}")


FEW: dict[str, Any] = {"at_once": (64, 256), "rounds": 2}
ENDPOINT_PEERS = {
    "bare aiohttp": Peer(run=bare, unlike="records nothing", **FEW),
    "agentgym": Peer(
        run=ours,
        unlike="records observations, actions and reward terms of every turn, with timings; one HTTP hop",
        **FEW,
    ),
    "verifiers": Peer(
        run=verifiers,
        unlike="two HTTP hops: its server, in this process, checks the request and asks again through httpx, most of "
        "the cost; builds a typed trace of the messages; one reward an episode; a folder made and removed per episode",
        **FEW,
    ),
}
