"""CPU per call of HTTP clients: `agentgym bench endpoint [--json] [--set callers=256]`.

All callers talk at once to one stub on the loopback, a process of its own, whose time is in nobody's row. Each talk
sends the whole conversation so far in every call and reads the reply out of the answer. Rounds alternate between the
contestants, so that a loaded machine shifts all; what is counted is CPU time of this process, system time included.
Modules are frozen out of garbage collection first: nobody pays for scanning what another one imported.

    bare aiohttp    post, read, json.loads, and nothing else
    Endpoint        `session.act`: retries, deadline, bound per host, usage, tool calls read, sampling seeds
    httpx           post, read, json.loads, with as many connections as callers
    AsyncOpenAI     `chat.completions.create` as it is shipped (package `openai`)
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable, Coroutine
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from agentgym.bench.measure import cost, machine, markdown, spread
from agentgym.bench.stub import stub
from agentgym.errors import ConfigError
from agentgym.types import Episode, Task, say
from agentgym_policies.endpoint.chat import CHAT, Endpoint

ASKED = "x" * 220
"""What an environment says in a turn."""

Message = dict[str, str]
Send = Callable[[list[Message]], Awaitable[str]]


def endpoint(callers: int = 256, turns: int = 8, rounds: int = 5, out: str = "") -> dict[str, Any]:
    """CPU microseconds per call of each contestant, and ratios within each round. `out` also writes Markdown."""
    if min(callers, turns, rounds) < 1:
        raise ConfigError("callers, turns and rounds are at least 1")
    present = {name: play for name, (package, play) in CONTESTANTS.items() if find_spec(package)}
    spent: dict[str, list[float]] = {name: [] for name in present}
    with stub() as url:
        for play in present.values():
            asyncio.run(play(url, 2, 2))
        gc.freeze()
        for _ in range(rounds):
            for name, play in present.items():
                used = cost(lambda play=play: play(url, callers, turns)).cpu  # type: ignore[misc]
                spent[name].append(1e6 * used / (callers * turns))
        gc.unfreeze()
    figures = {
        "machine": machine(("aiohttp", "httpx", "openai", "agentgym-suite")),
        "settings": {"callers": callers, "turns": turns, "rounds": rounds, "asked bytes a turn": len(ASKED)},
        "absent": ", ".join(package for name, (package, _) in CONTESTANTS.items() if name not in present) or "none",
        "CPU per call": [_row(name, spent) for name in present],
    }
    if out:
        Path(out).write_text(markdown("CPU per call of HTTP clients", figures), encoding="utf-8")
    return figures


def _row(name: str, spent: dict[str, list[float]]) -> dict[str, Any]:
    def times(other: str) -> list[float]:
        return [a / b for a, b in zip(spent[name], spent[other], strict=True)]

    return {
        "client": name,
        "us": spread(spent[name], 0),
        "times bare aiohttp": spread(times("bare aiohttp"), 2),
        "times Endpoint": spread(times("Endpoint"), 2),
        "ratio": round(median(times("bare aiohttp")), 3),
    }


async def _talks(send: Send, callers: int, turns: int) -> None:
    """So many conversations at once, each so long."""

    async def talk() -> None:
        said: list[Message] = []
        for _ in range(turns):
            said.append({"role": "user", "content": ASKED})
            said.append({"role": "assistant", "content": await send(said)})

    await asyncio.gather(*(talk() for _ in range(callers)))


async def _bare(url: str, callers: int, turns: int) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def send(messages: list[Message]) -> str:
            async with http.post(url + CHAT, json={"model": "stub", "messages": messages}) as response:
                return str(json.loads(await response.read())["choices"][0]["message"]["content"])

        await _talks(send, callers, turns)


async def _ours(url: str, callers: int, turns: int) -> None:
    contender = Endpoint(url, model="stub", concurrency=callers, tokens="off")

    async def talk(number: int) -> None:
        async with contender.session(Episode(task=Task(env="bench"), seed=number), "agent") as session:
            for _ in range(turns):
                assert (await session.act(say(ASKED))).text

    await asyncio.gather(*(talk(i) for i in range(callers)))
    await contender.aclose()


async def _httpx(url: str, callers: int, turns: int) -> None:
    httpx = import_module("httpx")
    limits = httpx.Limits(max_connections=callers, max_keepalive_connections=callers)
    async with httpx.AsyncClient(limits=limits, timeout=None) as http:

        async def send(messages: list[Message]) -> str:
            response = await http.post(url + CHAT, json={"model": "stub", "messages": messages})
            return str(json.loads(response.content)["choices"][0]["message"]["content"])

        await _talks(send, callers, turns)


async def _openai(url: str, callers: int, turns: int) -> None:
    async with import_module("openai").AsyncOpenAI(base_url=url, api_key="none") as client:

        async def send(messages: list[Message]) -> str:
            found = await client.chat.completions.create(model="stub", messages=messages)
            return str(found.choices[0].message.content)

        await _talks(send, callers, turns)


CONTESTANTS: dict[str, tuple[str, Callable[[str, int, int], Coroutine[Any, Any, None]]]] = {
    "bare aiohttp": ("aiohttp", _bare),
    "Endpoint": ("aiohttp", _ours),
    "httpx": ("httpx", _httpx),
    "AsyncOpenAI": ("openai", _openai),
}
