"""A model behind a client: its name, what it was asked, and when its context is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentgym import seeding
from agentgym.errors import EngineFault
from agentgym.policy import Load
from agentgym_policies.endpoint.client import Client, Refused, Usage
from agentgym_policies.endpoint.wire import A, Chat, Models, Spent, Text, completions, encoded, reader

FULL = ("context_length_exceeded", "maximum context length", "maximum model length", "exceeds the available context")
"""What servers say when a prompt leaves no room: OpenAI's code, vLLM's two sentences, llama.cpp's."""

_COMPLETIONS: dict[Any, Callable[[bytes], Any]] = {Chat: completions(Chat), Text: completions(Text)}
_MODELS = reader(Models)


class Remote:
    """What chat and completions share. `model` is by default the first that the server lists."""

    def __init__(self, client: Client, model: str) -> None:
        self.client, self.model = client, model

    @property
    def usage(self) -> Usage:
        """Since the start, over all sessions."""
        return self.client.usage

    @property
    def free_slots(self) -> int:
        """Calls that could begin at once, were nobody else at the host."""
        return self.client.concurrency - self.client.load().running

    def load(self) -> Load:
        """Calls under way and waiting."""
        return self.client.load()

    async def aclose(self) -> None:
        """Close the running event loop's connections. A later call opens new ones."""
        await self.client.aclose()

    async def ask(self, path: str, kind: type[A], body: dict[str, Any], *noise: seeding.Key) -> A:
        """The answer to `body`, which holds a choice. `noise` keys the jitter of its retries. Raises `EngineFault`."""
        data = encoded({"model": self.model or await self._named(noise), **body})
        estimate = len(data) // 4 + int(body["max_tokens"])
        found: A = await self.client.post(path, data, *noise, read=_COMPLETIONS[kind], tokens=estimate)
        if found.usage is not None:
            self._account(estimate, found.usage)
        return found

    def _account(self, estimate: int, spent: Spent) -> None:
        prompt, completion = spent.prompt_tokens or 0, spent.completion_tokens or 0
        cached = spent.prompt_tokens_details
        self.usage.prompt += prompt
        self.usage.completion += completion
        self.usage.cached += (cached.cached_tokens or 0) if cached else 0
        self.client.correct(estimate, prompt + completion)

    async def _named(self, noise: tuple[seeding.Key, ...]) -> str:
        """The first model that the server lists; asked for once."""
        async with self.client.line().naming:
            if not self.model:
                found = (await self.client.get("/models", *noise, read=_MODELS)).data
                if not found:
                    raise EngineFault(f"{self.client.address('/models')} lists no model; name one with model=")
                self.model = found[0].id
        return self.model


def full(error: Refused) -> bool:
    """Whether the server refused because the prompt leaves no room: an outcome, not a fault."""
    return error.status in (400, 413) and any(mark in error.said for mark in FULL)
