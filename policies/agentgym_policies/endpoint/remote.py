"""A model behind a client: its name, what it was asked, whether it tells its tokens, when its context is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from agentgym import seeding
from agentgym.errors import EngineFault, RecordError, unknown
from agentgym.policy import Load
from agentgym.types import Sampling
from agentgym_policies.endpoint.client import Client, Refused, Usage
from agentgym_policies.endpoint.wire import A, Chat, Models, Spent, Text, Tokens, completions, encoded, reader

Record = Literal["auto", "require", "off"]
FULL = ("context_length_exceeded", "maximum context length", "maximum model length", "exceeds the available context")
"""What servers say when a prompt leaves no room: OpenAI's code, vLLM's two sentences, llama.cpp's."""
_RAW = {"include_stop_str_in_output": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
TELL: dict[Any, dict[str, Any]] = {
    Chat: {"return_token_ids": True, "logprobs": True, **_RAW},
    Text: {"return_token_ids": True, "logprobs": 0, **_RAW},
}
"""What a request adds to be told the tokens, drawn from the raw model whatever the server's defaults are (vLLM)."""
_READ: dict[Any, Callable[[bytes], Any]] = {Chat: completions(Chat), Text: completions(Text)}
_READ_MODELS = reader(Models)


class Remote:
    """What chat and completions share. `model` is by default the first that the server lists.

    `tokens`: whether actions carry the server's token ids and log-probs.

        "auto"      where the server gives them (vLLM does) and tokens are drawn from the raw model: temperature 1,
                    top-p 1, no top-k. A server that gives none is asked no more: evaluation only
        "require"   an answer without them is a `RecordError` that names the missing field
        "off"       not asked for
    """

    def __init__(self, client: Client, model: str, tokens: Record) -> None:
        if tokens not in get_args(Record):
            raise unknown("way to record tokens", tokens, get_args(Record))
        self.client, self.model, self.tokens = client, model, tokens
        self.refusal = "tokens='off': nothing is recorded" if tokens == "off" else ""
        self._told = False

    @property
    def trainable(self) -> bool | None:
        """Whether actions carry exact tokens: None until an answer has shown it; `refusal` says why not."""
        return False if self.refusal else self._told or None

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

    async def complete(
        self, path: str, kind: type[A], body: dict[str, Any], sampling: Sampling, *noise: seeding.Key
    ) -> tuple[A, Tokens | None]:
        """One completion, with its tokens where they are to be recorded and come. `noise` keys the jitter of retries.

        Raises `RecordError` where tokens are required and do not come, `EngineFault` for trouble.
        """
        if not self._asks(sampling):
            return await self._ask(path, kind, body, noise), None
        try:
            found = await self._ask(path, kind, body | TELL[kind], noise)
        except Refused as error:
            if self.tokens == "require" or self._told or full(error) or error.status not in (400, 422):
                raise
            found = await self._ask(path, kind, body, noise)
            self.refusal = f"the server refuses to be asked for tokens: {error.message}"
            return found, None
        return found, self._checked(found.tokens())

    def _asks(self, sampling: Sampling) -> bool:
        """Whether to ask for tokens."""
        if self.tokens == "require" and not sampling.plain:
            raise RecordError(
                f"tokens='require' needs temperature 1, top_p 1 and top_k 0, got {sampling}: a server does not say"
                " under which probabilities it drew otherwise; sample so, or tokens='off' to evaluate only"
            )
        return not self.refusal and sampling.plain

    def _checked(self, found: Tokens | str) -> Tokens | None:
        """The tokens; where a field is missing, none ever after, or a `RecordError`."""
        if isinstance(found, Tokens):
            self._told = True
            return found
        why = (
            f"the answer of {self.client.address()} holds no {found}: what it drew cannot be trained on; a vLLM server"
            " gives it (return_token_ids), or evaluate only, with tokens='off'"
        )
        if self.tokens == "require":
            raise RecordError(why)
        self.refusal = why
        return None

    async def _ask(self, path: str, kind: type[A], body: dict[str, Any], noise: tuple[seeding.Key, ...]) -> A:
        """The answer to `body`, accounted for."""
        data = encoded({"model": self.model or await self._named(noise), **body})
        estimate = len(data) // 4 + int(body["max_tokens"])
        found: A = await self.client.post(path, data, *noise, read=_READ[kind], tokens=estimate)
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
                found = (await self.client.get("/models", *noise, read=_READ_MODELS)).data
                if not found:
                    raise EngineFault(f"{self.client.address('/models')} lists no model; name one with model=")
                self.model = found[0].id
        return self.model


def full(error: Refused) -> bool:
    """Whether the server refused because the prompt leaves no room: an outcome, not a fault."""
    return error.status in (400, 413) and any(mark in error.said for mark in FULL)
