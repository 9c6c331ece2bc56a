"""Chat completions: the server renders the conversation, calls tools by name, and may say which tokens it drew."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from agentgym import seeding
from agentgym.errors import ConfigError, ModelError
from agentgym.modeling.renderer import with_hint
from agentgym.policy import left
from agentgym.types import Action, Episode, Guidance, Message, Observation, Sampling, TokenSpan, ToolCall
from agentgym_policies.endpoint.client import Client, Refused
from agentgym_policies.endpoint.remote import Record, Remote, full
from agentgym_policies.endpoint.spans import Branches
from agentgym_policies.endpoint.wire import Chat, as_wire, drawn, understood, wired

CHAT = "/chat/completions"


class Endpoint(Remote):
    """A chat-completions server behind `url`, or in `app`; `tokens` as in `Remote`, other options as in `Client`.

    Stop strings end a reply; whether they stay in it is the server's choice where it gives no tokens. Sampling seeds
    come from the episode's key; whether they make replies repeatable is the server's choice too.
    """

    def __init__(
        self,
        url: str = "",
        *,
        model: str = "",
        sampling: Sampling | None = None,
        tokens: Record = "auto",
        key: str = "",
        app: Any = None,
        concurrency: int = 64,
        seconds: float = 120.0,
        try_seconds: float | None = None,
        retries: int = 3,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        client = Client(
            url,
            key=key,
            app=app,
            concurrency=concurrency,
            seconds=seconds,
            try_seconds=try_seconds,
            retries=retries,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        super().__init__(client, model, tokens)
        self.sampling = sampling or Sampling()

    def session(self, episode: Episode, agent: str) -> ChatSession:
        """`ConfigError` for guidance that a server cannot follow or record."""
        guidance = episode.guidance or Guidance()
        if guidance.begin:
            raise ConfigError(
                f"a chat endpoint cannot begin its reply with {guidance.begin!r}; play guidance.begin with an"
                " engine of our own (agentgym_policies.torch_engine)"
            )
        if self.tokens == "require" and guidance.hint and guidance.context == "original":
            raise ConfigError(
                "a chat endpoint does not say what its prompt was without the hint; set strategy.context = 'sampled',"
                " or play it with completions or an engine of our own, which render themselves"
            )
        return ChatSession(self, episode, agent)


class ChatSession:
    """One agent in one episode: the messages so far. A call that fails or is cancelled leaves them as they were."""

    def __init__(self, endpoint: Endpoint, episode: Episode, agent: str) -> None:
        self.endpoint = endpoint
        self.branches = Branches()
        self._messages: list[dict[str, Any]] = []
        self._open: list[str] = []  # ids of the last reply's tool calls
        self._tools: Sequence[dict[str, Any]] = ()
        guidance = episode.guidance or Guidance()
        self._hint = guidance.hint
        self._exact = not guidance.hint or guidance.context == "sampled"
        self._noise = (episode.seed, episode.member, agent)
        self._turn = 0
        self._left = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        self._messages = []

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        """The server's reply to the conversation so far and what is new. Raises `EngineFault`.

        A full context is an outcome: an empty reply with finish "length". Only a first prompt that does not fit is a
        `ModelError`.
        """
        chosen = sampling or self.endpoint.sampling
        heard = self._heard(observation, hint=True)
        noise = (*self._noise, self._turn)
        body = {"messages": heard.messages, **drawn(chosen), "seed": seeding.key("endpoint", *noise) >> 33}
        if heard.tools:
            body["tools"] = heard.tools
        try:
            chat, tokens = await self.endpoint.complete(CHAT, Chat, body, chosen, *noise)
        except Refused as error:
            return self._full(heard, chosen, error)
        choice = chat.choices[0]
        text, calls = understood(choice.message, self._turn, hermes=bool(heard.tools))
        span = None
        if tokens is not None and self._exact:
            span = self.branches.span(tokens, chosen, choice.finish_reason, hinted=heard.hinted)
        self._said(heard, text, calls)
        return Action(text=text, tool_calls=calls, span=span)

    async def tell(self, observation: Observation, action: Action) -> None:
        """A reply that the server did not give: it reads it as its own."""
        heard = self._heard(observation, hint=action.span is not None and action.span.context == "hinted")
        calls = [c if c.id else c.replace(id=f"call_{self._turn}_{n}") for n, c in enumerate(action.tool_calls)]
        self._said(heard, action.text, calls)

    def _heard(self, observation: Observation, hint: bool) -> _Heard:
        """The conversation so far with what is new behind it, and the hint if its moment has come."""
        if self._left:
            raise left()
        if observation.array is not None:
            raise ModelError("a chat endpoint cannot read an array observation; wrap the environment to speak text")
        hinted = hint and bool(self._hint)
        new = with_hint(observation.messages, self._hint) if hinted else observation.messages
        return _Heard([*self._messages, *wired(new, self._open)], self._tools or observation.tools, hinted)

    def _said(self, heard: _Heard, text: str, calls: Sequence[ToolCall]) -> None:
        said = as_wire(Message(role="assistant", content=text, tool_calls=tuple(calls)))
        self._messages, self._tools, self._open = [*heard.messages, said], heard.tools, [call.id for call in calls]
        self._hint = "" if heard.hinted else self._hint
        self._turn += 1

    def _full(self, heard: _Heard, sampling: Sampling, error: Refused) -> Action:
        """Nothing, where the server refused because nothing fits any more; else the refusal itself."""
        if not full(error):
            raise error
        if not self._turn:
            raise ModelError(f"the first prompt does not fit: {error.message}") from error
        self._said(heard, "", ())
        recorded = self.endpoint.trainable and self._exact
        return Action(
            span=TokenSpan(sampling=sampling, finish="length", branch=self.branches.branch) if recorded else None
        )


class _Heard(NamedTuple):
    messages: list[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    hinted: bool
