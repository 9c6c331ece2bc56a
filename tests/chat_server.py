"""A chat-completions server on the loopback for the tests of endpoints, and the ways in which it goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from agentgym.types import AGENT, Action, Episode, Message, Observation, Task
from agentgym_policies.endpoint import ChatSession, Endpoint

EPISODE = Episode(task=Task(env="test"), seed=5)
TOOLS = ({"type": "function", "function": {"name": "find", "description": "Find.", "parameters": {"type": "object"}}},)
ASK = Observation(messages=(Message(role="user", content="Find it."),), tools=TOOLS)


class Server:
    """What a server was asked. `answer(body, number)` gives the number-th answer: a message, a response, or text."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Any]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[Any] = []
        self.busy = self.peak = 0
        self.arrived = asyncio.Event()
        self.url = ""
        self.endpoint: Endpoint

    def session(self) -> ChatSession:
        return self.endpoint.session(EPISODE, AGENT)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(f"{request.method} {request.path}")
        self.headers.append(request.headers)
        body = await request.json() if request.method == "POST" else {}
        self.asked.append(body)
        self.arrived.set()
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        try:
            found = self.answer(body, len(self.asked))
            found = await found(request) if callable(found) else found
        finally:
            self.busy -= 1
        return found if isinstance(found, web.StreamResponse) else web.json_response(completion(found))


def completion(message: Any) -> dict[str, Any]:
    message = {"content": message} if isinstance(message, str) else message
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": {"total_tokens": 3}}


def trouble(status: int, message: str = "so it is", **headers: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status, headers=headers)


def calling(*calls: tuple[str, str, str], content: str | None = None) -> dict[str, Any]:
    """A message with tool calls of (id, name, arguments)."""
    asked = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return {"content": content, "tool_calls": asked}


@asynccontextmanager
async def serving(answer: Callable[[dict[str, Any], int], Any]) -> AsyncIterator[Server]:
    server = Server(answer)
    app = web.Application(client_max_size=2**23)
    app.router.add_route("*", "/{path:.*}", server.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


@asynccontextmanager
async def talking(answer: Callable[..., Any], **options: Any) -> AsyncIterator[Server]:
    """A server with an open `endpoint`."""
    async with serving(answer) as server, opened(server.url, **options) as server.endpoint:
        yield server


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(url, **{"model": "m", **options})
    try:
        yield endpoint
    finally:
        assert endpoint.free_slots == endpoint.client.concurrency
        await endpoint.aclose()


async def once(endpoint: Endpoint, observation: Observation = ASK, episode: Episode = EPISODE) -> Action:
    async with endpoint.session(episode, AGENT) as session:
        return await session.act(observation)


async def half(request: web.Request) -> web.StreamResponse:
    whole = json.dumps(completion("never read to the end")).encode()
    response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
    await response.prepare(request)
    await response.write(whole[: len(whole) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()
