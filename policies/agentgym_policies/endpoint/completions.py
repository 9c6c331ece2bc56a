"""Completions of our own token ids: we render and parse, the server only samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.renderer import History, Prompt, Renderer
from agentgym.types import Action, Episode, Sampling
from agentgym_policies.endpoint.client import Client, Refused
from agentgym_policies.endpoint.remote import Record, Remote, full
from agentgym_policies.endpoint.spans import FINISH, VERSIONS
from agentgym_policies.endpoint.wire import Text, drawn
from agentgym_policies.sampling import check
from agentgym_policies.sessions import Call, Reply, TokenSession

PATH = "/completions"
UNBOUNDED = 2**31
"""Tokens: no length of ours, the server's own holds."""


class Completions(Remote):
    """A server of /v1/completions behind `url` that takes prompts as token ids; `options` are those of `Client`.

    Prompts are rendered here, once, and `tokens` says whether the server's ids and log-probs are required ("require"),
    taken where they come ("auto") or left aside ("off"); see `Remote`. Without ids, the reply's text is encoded here
    and its actions carry no span. A context of `max_length` tokens, or what the server takes, is full.
    """

    def __init__(
        self,
        url: str,
        renderer: Renderer,
        *,
        model: str = "",
        max_length: int = UNBOUNDED,
        sampling: Sampling | None = None,
        seed: int = 0,
        tokens: Record = "require",
        **options: Any,
    ) -> None:
        super().__init__(Client(url, **options), model, tokens)
        self.renderer, self.max_length, self.seed = renderer, max_length, seed
        self.sampling = check(sampling or Sampling())
        self.ends = {"stop_token_ids": sorted(renderer.end_ids)}

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        url: str = "",
        history: History = "append",
        template: str | None = None,
        **options: Any,
    ) -> Self:
        """With the tokenizer and template of the folder `path`; the weights are the server's."""
        return cls(url, Renderer(tokenizers.load(path), history, template=template), **options)

    def session(self, episode: Episode, agent: str) -> CompletionSession:
        """`ConfigError` for a reply that is begun for the model: its log-probs would be missing."""
        if episode.guidance is not None and episode.guidance.begin:
            raise ConfigError(
                f"completions do not say how probable {episode.guidance.begin!r} was; play guidance.begin with an"
                " engine of our own (agentgym_policies.torch_engine)"
            )
        return CompletionSession(self, episode, agent)

    async def sample(self, call: Call) -> tuple[Reply, bool]:
        """A reply, and whether its ids and log-probs are the server's own. Raises `Refused`, `EngineFault`."""
        body = {"prompt": call.context, **drawn(call.sampling), "max_tokens": call.room, "seed": call.key >> 33}
        found, tokens = await self.complete(PATH, Text, body | self.ends, call.sampling, call.key)
        choice = found.choices[0]
        finish = FINISH.get(choice.finish_reason, "")
        if tokens is None:
            return Reply(ids=self.renderer.encode(choice.text), finish=finish), False
        if tokens.prompt and tokens.prompt != call.context:
            raise EngineFault(f"{self.client.address(PATH)} read other token ids than it was sent")
        said, versions = tokens.logprobs, list(VERSIONS)
        return Reply(ids=tokens.ids, logprobs=said, processed=said, versions=versions, finish=finish), True


class CompletionSession(TokenSession[Completions]):
    """One agent in one episode. From the first reply without exact tokens on, its actions carry no span."""

    _exact = True

    async def sample(self, call: Call) -> Reply:
        try:
            reply, exact = await self.engine.sample(call)
        except Refused as error:
            if not full(error):
                raise
            if self._turn == 1:
                raise ModelError(f"the first prompt does not fit: {error.message}") from error
            return Reply(finish="length")
        self._exact = self._exact and exact
        return reply

    def release(self) -> None:
        """The server holds nothing for a session."""

    def _action(self, prompt: Prompt, call: Call, reply: Reply) -> Action:
        action = super()._action(prompt, call, reply)
        return action if self._exact else action.replace(span=None)
