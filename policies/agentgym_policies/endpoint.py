"""`Endpoint`: any server that speaks OpenAI's chat completions as a policy. For evaluation only.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", model="my-model")
    async with endpoint.session(episode, agent) as session:
        action = await session.act(observation)          # text and tool calls; action.span is None
    await endpoint.aclose()

The server keeps its tokens to itself: actions carry no `TokenSpan`, so what an endpoint plays can be judged and not
trained on. Trouble of the server is retried and then becomes an `EngineFault`, never a reward; a tool call whose
arguments are no JSON object is the model's own doing, stays text and is an outcome.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
import msgspec

from agentgym import seeding
from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling.renderer import as_dict, parse, with_hint
from agentgym.policy import left
from agentgym.types import Action, Episode, Message, Observation, Sampling, ToolCall

KEYS = ("AGENTGYM_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first that is set wins."""
CHAT = "/chat/completions"
PASSING = frozenset({408, 409, 429})
"""Status codes that another try may not meet; so are all from 500 on."""
BACKOFF = 0.5
"""Seconds before the first retry, give or take half; doubled for each further one up to `LONGEST`."""
LONGEST = 30.0
QUOTED = 300
"""Characters of a server's message that an error repeats."""


class Passing(EngineFault):
    """Trouble that may pass. `after`: seconds the server asks to wait."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class Endpoint:
    """A chat-completions server behind `url`; see the module. Evaluation only: its actions carry no `TokenSpan`.

    `url` is what other clients call the base URL; without a path, /v1 is meant, and an address that ends in
    /chat/completions is taken as it stands. `model`: by default the first that the server lists. `key`: by default the
    environment's AGENTGYM_API_KEY, then OPENAI_API_KEY. At most `concurrency` calls are under way on an event loop. A
    call has `seconds` from when its turn has come, retries and their waits included: `retries` more tries after lost
    connections and statuses 408, 409, 429 and 5xx, with a jittered exponential wait or what Retry-After says.

    Stop strings end a reply; whether they stay in it is the server's choice. Sampling seeds come from the episode's
    key; whether they make replies repeatable is the server's choice too.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        key: str = "",
        concurrency: int = 64,
        seconds: float = 120.0,
        retries: int = 3,
        sampling: Sampling | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0 or not seconds > 0:
            raise ConfigError(
                "an endpoint needs concurrency >= 1, retries >= 0 and seconds > 0;"
                f" got {concurrency}, {retries} and {seconds}"
            )
        self.base, self.model = base_of(url), model
        self.concurrency, self.seconds, self.retries = concurrency, seconds, retries
        self.sampling = sampling or Sampling()
        key = key or next(filter(None, map(os.environ.get, KEYS)), "")
        self._headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
        self._lines: dict[asyncio.AbstractEventLoop, _Line] = {}

    @property
    def free_slots(self) -> int:
        """Calls that could begin at once on the running event loop."""
        line = self._lines.get(asyncio.get_running_loop())
        return self.concurrency - (line.busy if line else 0)

    def session(self, episode: Episode, agent: str) -> EndpointSession:
        """`ConfigError` for an episode whose first reply is begun for it: a server cannot be made to begin with it."""
        if episode.guidance is not None and episode.guidance.begin:
            raise ConfigError(
                f"a chat endpoint cannot begin its reply with {episode.guidance.begin!r}; play guidance.begin with an"
                " engine of our own (agentgym_policies.torch_engine)"
            )
        return EndpointSession(self, episode, agent)

    async def aclose(self) -> None:
        """Close the running event loop's connections. A later call opens new ones."""
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.http.close()

    async def complete(self, body: Mapping[str, Any], *noise: seeding.Key) -> Reply:
        """One chat completion. `noise` keys the jitter of its retries. Raises `EngineFault`."""
        async with self._slot() as line:
            if not self.model:
                async with line.naming:
                    self.model = self.model or await self._first_model(line, noise)
            asked = {"model": self.model, **body}
            return reply_of(await self._persist(line, "POST", CHAT, asked, noise))

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[_Line]:
        """A place among the calls under way, and the deadline that begins with it."""
        line = self._line()
        async with line.slots:
            line.busy += 1
            try:
                async with asyncio.timeout(self.seconds):
                    yield line
            except TimeoutError as error:
                raise EngineFault(f"{self._address()} did not answer within {self.seconds:g} s") from error
            finally:
                line.busy -= 1

    def _line(self) -> _Line:
        """The running event loop's connections; those of closed loops are forgotten."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            self._lines = {known: line for known, line in self._lines.items() if not known.is_closed()}
            self._lines[loop] = _Line(self.concurrency, self._headers)
        return self._lines[loop]

    def _address(self, path: str = "") -> str:
        return self.base._replace(path=self.base.path + path).geturl()

    async def _first_model(self, line: _Line, noise: Sequence[seeding.Key]) -> str:
        found = read(await self._persist(line, "GET", "/models", None, noise), _Models).data
        if not found:
            raise EngineFault(f"{self._address('/models')} lists no model; name one with model=")
        return found[0].id

    async def _persist(self, line: _Line, method: str, path: str, body: Any, noise: Sequence[seeding.Key]) -> bytes:
        """The body of the answer, by as many tries as it takes, as `retries` allows and as fit before the deadline."""
        clock = asyncio.get_running_loop().time
        until, attempt = clock() + self.seconds, 0
        while True:
            attempt += 1
            try:
                return await self._once(line, method, self._address(path), body)
            except Passing as trouble:
                wait = pause(trouble.after, attempt, noise)
                if attempt > self.retries:
                    raise EngineFault(f"{trouble} (tries: {attempt})") from trouble
                if clock() + wait >= until:
                    late = f"the next try is due in {wait:.1f} s, past the call's {self.seconds:g} s"
                    raise EngineFault(f"{trouble} ({late})") from trouble
            await asyncio.sleep(wait)

    async def _once(self, line: _Line, method: str, address: str, body: Any) -> bytes:
        """One try. `Passing` where another may go better, else `EngineFault`."""
        if line.http.closed:
            raise EngineFault(f"the endpoint {address} was closed while it was asked")
        try:
            async with line.http.request(method, address, json=body, allow_redirects=False) as response:
                data = await response.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise Passing(f"{address}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise EngineFault(f"{address}: {type(error).__name__}: {error}") from error
        if response.status < 300:
            return data
        what = f"{address} answered {response.status} {response.reason}: {message_of(data, response.headers)}"
        if response.status in PASSING or response.status >= 500:
            raise Passing(what, retry_after(response.headers))
        raise EngineFault(what)


class _Line:
    """What one event loop holds of an endpoint: connections, and who may use them."""

    def __init__(self, concurrency: int, headers: Mapping[str, str]) -> None:
        self.slots = asyncio.Semaphore(concurrency)
        self.naming = asyncio.Lock()
        self.busy = 0
        self.http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )


class EndpointSession:
    """One agent in one episode: the messages so far. A call that fails or is cancelled leaves them as they were."""

    def __init__(self, endpoint: Endpoint, episode: Episode, agent: str) -> None:
        self.endpoint = endpoint
        self._messages: list[dict[str, Any]] = []
        self._open: list[str] = []  # ids of the last reply's tool calls
        self._tools: Sequence[dict[str, Any]] = ()
        self._hint = "" if episode.guidance is None else episode.guidance.hint
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
        """The server's reply to the conversation so far and what is new. Raises `EngineFault`."""
        new = with_hint(observation.messages, self._hint) if self._hint else observation.messages
        messages, tools = self._heard(observation, new)
        noise = (*self._noise, self._turn)
        body = {"messages": messages, **drawn(sampling or self.endpoint.sampling)}
        body["seed"] = seeding.key("endpoint", *noise) >> 33
        if tools:
            body["tools"] = tools
        reply = await self.endpoint.complete(body, *noise)
        text, calls = understood(reply, self._turn, hermes=bool(tools))
        self._hint = ""
        self._said(messages, tools, text, calls)
        return Action(text=text, tool_calls=calls)

    async def tell(self, observation: Observation, action: Action) -> None:
        """A reply that the server did not give: it reads it as its own."""
        messages, tools = self._heard(observation, observation.messages)
        calls = [c if c.id else c.replace(id=f"call_{self._turn}_{n}") for n, c in enumerate(action.tool_calls)]
        self._said(messages, tools, action.text, calls)

    def _heard(self, observation: Observation, new: Sequence[Message]) -> tuple[list[dict[str, Any]], Any]:
        """The messages so far with the new ones behind them, and the tools."""
        if self._left:
            raise left()
        if observation.array is not None:
            raise ModelError("a chat endpoint cannot read an array observation; wrap the environment to speak text")
        return [*self._messages, *wired(new, self._open)], self._tools or observation.tools

    def _said(self, messages: list[dict[str, Any]], tools: Any, text: str, calls: Sequence[ToolCall]) -> None:
        said = as_wire(Message(role="assistant", content=text, tool_calls=tuple(calls)))
        self._messages, self._tools, self._open = [*messages, said], tools, [call.id for call in calls]
        self._turn += 1


# --- to the server ----------------------------------------------------------------------------------------------


def base_of(url: str) -> SplitResult:
    """The address under which /chat/completions lies; `ConfigError` for what is no http address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(f"an endpoint is an address like http://127.0.0.1:8000/v1; got {url!r}")
    path = parts.path.rstrip("/")
    return parts._replace(path=path.removesuffix(CHAT) if path.endswith(CHAT) else path or "/v1")


def drawn(sampling: Sampling) -> dict[str, Any]:
    """Sampling as the protocol spells it. `top_k` is no part of it and goes along only where it is set."""
    found: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.top_k:
        found["top_k"] = sampling.top_k
    if sampling.stop:
        found["stop"] = list(sampling.stop)
    return found


def wired(messages: Sequence[Message], open: Sequence[str]) -> list[dict[str, Any]]:
    """New messages as the protocol wants them behind a reply that called tools (`open`: the ids of those calls).

    Every call is answered, and before anything else is said: answers come first, one that is missing is empty. A tool
    message that answers no such call (the environment read a call in plain text) is said by the user.
    """
    answers = {id: {"role": "tool", "tool_call_id": id, "content": ""} for id in open}
    missing, others = set(open), []
    for message in messages:
        found = as_wire(message)
        if message.role != "tool":
            others.append(found)
        elif message.tool_call_id in missing:
            missing.remove(message.tool_call_id)
            answers[message.tool_call_id] = found
        else:
            others.append({"role": "user", "content": found["content"]})
    return [*answers.values(), *others]


def as_wire(message: Message) -> dict[str, Any]:
    """A message in the protocol: arguments are JSON in a string. `ModelError` for an image."""
    found = as_dict(message)
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    if message.role == "tool":
        found.pop("name", None)
    return found


# --- from the server --------------------------------------------------------------------------------------------


S = TypeVar("S", bound=msgspec.Struct)


class _Function(msgspec.Struct):
    name: str = ""
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct):
    function: _Function
    id: str | None = None


class Reply(msgspec.Struct):
    """A chat completion's message, as far as it is read."""

    content: str | list[Any] | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    message: Reply


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def read(data: bytes, kind: type[S]) -> S:
    """An answer with a good status, or `EngineFault` where it is no JSON of this shape."""
    try:
        return msgspec.convert(json.loads(data), kind)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise EngineFault(f"the endpoint's answer is not as agreed ({error}): {message_of(data, {})}") from error


def reply_of(data: bytes) -> Reply:
    """The message of a chat completion; `EngineFault` where there is none."""
    choices = read(data, _Completion).choices
    if not choices:
        raise EngineFault(f"the endpoint's answer holds no choice: {message_of(data, {})}")
    return choices[0].message


def understood(reply: Reply, turn: int, *, hermes: bool) -> tuple[str, tuple[ToolCall, ...]]:
    """Text and tool calls of a reply. `hermes`: where the server found no calls, those written in the text count.

    Calls without ids of their own get some that are new in the episode. Arguments that are no JSON object stay text.
    """
    text = _text(reply.content) or reply.refusal or ""
    calls: list[ToolCall] = []
    if hermes and not reply.tool_calls:
        text, written = parse(text)
        calls = [call.replace(id="") for call in written]
    for asked in reply.tool_calls or ():
        arguments = _arguments(asked.function.arguments)
        if arguments is None:
            text = f"{text}\n{_written(asked.function)}".lstrip("\n")
        else:
            calls.append(ToolCall(name=asked.function.name, arguments=arguments, id=asked.id or ""))
    ids = {call.id for call in calls}
    if "" in ids or len(ids) < len(calls):
        calls = [call.replace(id=f"call_{turn}_{number}") for number, call in enumerate(calls)]
    return text, tuple(calls)


def _text(content: str | list[Any] | None) -> str:
    """Of a message's content, which some servers cut into parts."""
    if not isinstance(content, list):
        return content or ""
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))


def _arguments(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not isinstance(given, str):
        return given or {}
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _written(function: _Function) -> str:
    """A call as models write it, its arguments as they came."""
    return f'<tool_call>\n{{"name": {json.dumps(function.name)}, "arguments": {function.arguments}}}\n</tool_call>'


def message_of(data: bytes, headers: Mapping[str, str]) -> str:
    """What the server says of its trouble, in one line: {"error": {"message": ...}}, its cousins, or plain text."""
    found: Any = data.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        found = json.loads(data)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    line = " ".join(str(found).split()) or headers.get("Location", "") or "(no message)"
    return line if len(line) <= QUOTED else f"{line[:QUOTED]}..."


# --- waiting ----------------------------------------------------------------------------------------------------


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now, from a header that holds seconds or a date; None where it holds neither."""
    said = headers.get("Retry-After", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def pause(after: float | None, attempt: int, noise: Sequence[seeding.Key]) -> float:
    """Seconds before the try after `attempt`: what the server asked for and a little more, or jittered backoff."""
    jitter = seeding.share("endpoint-backoff", *noise, attempt)
    if after is not None:
        return after + BACKOFF * jitter
    return min(BACKOFF * 2.0 ** (attempt - 1), LONGEST) * (0.5 + jitter)
