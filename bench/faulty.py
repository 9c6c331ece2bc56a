"""What goes wrong in the fault battery: an environment, and a server of chat completions, that break as declared.

Importable by name (the rollouts' process imports the environment), and the one place where faults are drawn. Every
draw is keyed by a seed and a number that counts what this process did, so members of a group and retries differ.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from aiohttp import web

from agentgym import registry
from agentgym.env import SingleAgentEnv
from agentgym.seeding import share
from agentgym.types import Action, Message, Observation, RewardTerm, StepResult, Task, say

ARMS = ("red", "green", "blue", "grey")
ANSWER = "blue"


# --- the environment --------------------------------------------------------------------------------------------

GARBAGE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "None for a result": lambda: (say("pick another"), None),
    "a dict for a result": lambda: (None, {"reward": 1.0, "terminated": True}),
    "a NaN reward": lambda: (say("pick another"), paid(float("nan"))),
    "a word for a reward": lambda: (say("pick another"), paid("much")),
    "a number for a term": lambda: (say("pick another"), StepResult(rewards=(1.0,))),  # type: ignore[arg-type]
    "no observation": lambda: (None, paid(1.0)),
    "text for an observation": lambda: ("pick another", paid(1.0)),
    "a number for a message": lambda: (spoken(7), paid(1.0)),
    "a number for a last message": lambda: (spoken(7), paid(1.0, terminated=True)),
    "a word for a metric": lambda: (None, paid(1.0, terminated=True, metrics={"success": "yes"})),
    "a NaN metric": lambda: (None, paid(1.0, terminated=True, metrics={"success": float("nan")})),
}
"""What a broken environment answers; each alike in frequency."""


def paid(value: Any, **fields: Any) -> StepResult:
    return StepResult(rewards=(RewardTerm(name="hit", value=value),), **fields)


def spoken(content: Any) -> Observation:
    return Observation(messages=(Message(role="user", content=content),))


class Faulty(SingleAgentEnv):
    """Twice asked to pick a word; each time `blue` is one point. Of its steps the shares `raises` raise, `hangs` never
    answer and `garbage` answer nonsense; all take up to `latency` seconds.

    The file `ledger` gets one letter for every (b)egun episode, (r)aised, (h)ung or (g)arbled step and (e)nded episode,
    of whatever process: letters that are written survive any kill.
    """

    id = "faulty-v0"
    version = "1"
    reward: ClassVar[dict[str, Any]] = {"op": "weighted_sum", "of": {"hit": 1.0}}
    steps: ClassVar[Iterator[int]] = count()

    def __init__(
        self,
        ledger: str = "",
        seed: int = 0,
        raises: float = 0.0,
        hangs: float = 0.0,
        garbage: float = 0.0,
        latency: float = 0.005,
    ) -> None:
        self.ledger, self.seed, self.latency = ledger, seed, latency
        self.shares = {"r": raises, "h": hangs, "g": garbage}
        self.hits = self.turn = 0

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        return (Task(env=self.id, split=split, seed=seed + number) for number in count())

    async def begin(self, task: Task) -> Observation:
        self.note("b")
        return say("pick one")

    async def act(self, action: Action) -> tuple[Observation | None, StepResult]:
        number = next(self.steps)
        await asyncio.sleep(self.latency * share("latency", self.seed, number))
        struck = self.drawn(share("fault", self.seed, number))
        if struck:
            self.note(struck)
            return await self.broken(struck, number)
        return self.answered(action)

    def drawn(self, left: float) -> str:
        """The fault that a uniform number stands for, if any."""
        for letter, part in self.shares.items():
            left -= part
            if left < 0:
                return letter
        return ""

    async def broken(self, letter: str, number: int) -> tuple[Any, Any]:
        if letter == "r":
            raise KeyError("the shelf is empty")
        if letter == "h":
            await asyncio.Event().wait()
        kinds = list(GARBAGE.values())
        return kinds[int(share("garbage", self.seed, number) * len(kinds))]()

    def answered(self, action: Action) -> tuple[Observation | None, StepResult]:
        hit = float(action.text == ANSWER)
        self.hits, self.turn = self.hits + int(hit), self.turn + 1
        if self.turn < 2:
            return say("pick another"), paid(hit)
        self.note("e")
        return None, paid(hit, terminated=True, metrics={"success": float(self.hits == 2)})

    def note(self, letter: str) -> None:
        if self.ledger:
            with open(self.ledger, "ab", buffering=0) as file:
                file.write(letter.encode())

    def vocabulary(self) -> list[str]:
        return ["pick", "one", "another", *ARMS]


def register() -> None:
    """Make `faulty-v0` known in this process, and by its name in the rollouts' one."""
    if Faulty.id not in registry.catalogue():
        registry.register(Faulty.id, "faulty:Faulty", summary="a bandit that breaks as declared")


def struck(ledger: Path) -> dict[str, int]:
    """How often which letter stands in a ledger."""
    data = ledger.read_bytes().decode() if ledger.is_file() else ""
    return {letter: data.count(letter) for letter in "berhg"}


# --- the server -------------------------------------------------------------------------------------------------


async def _trouble(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "no workers"}}, status=500)


async def _late(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def _malformed(request: web.Request) -> web.StreamResponse:
    return web.Response(text='{"choices": [{"message": {"content": "blue"', content_type="application/json")


async def _half(request: web.Request) -> web.StreamResponse:
    whole = json.dumps(completion()).encode()
    response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


def completion() -> dict[str, Any]:
    message = {"role": "assistant", "content": ANSWER}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
    }


TROUBLES: dict[str, Callable[[web.Request], Any]] = {
    "500": _trouble,
    "timeout": _late,
    "malformed": _malformed,
    "half": _half,
}


class Server:
    """Answers `blue`, always right, except the declared `shares` of its answers; `struck` counts those."""

    def __init__(self, shares: dict[str, float], seed: int) -> None:
        self.shares, self.seed = shares, seed
        self.struck = dict.fromkeys(shares, 0)
        self.asked = 0
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        left = share("trouble", self.seed, self.asked)
        self.asked += 1
        for name, part in self.shares.items():
            left -= part
            if left < 0:
                self.struck[name] += 1
                found: web.StreamResponse = await TROUBLES[name](request)
                return found
        return web.json_response(completion())


@asynccontextmanager
async def serving(shares: dict[str, float], seed: int) -> AsyncIterator[Server]:
    """A server on the loopback, gone afterwards."""
    server, app = Server(shares, seed), web.Application()
    app.router.add_post("/{path:.*}", server.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()
