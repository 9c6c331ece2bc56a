"""The client under every endpoint: POST bytes, get bytes, by as many tries as it takes.

    client = Client("http://127.0.0.1:8000/v1", concurrency=64, seconds=120)
    body = await client.post("/chat/completions", encoded)
    await client.aclose()

A call waits for its place at the host and for its moment in the minute; then its deadline begins, which holds all its
tries and the pauses between them. What may pass is tried again, with a jittered exponential pause or the one that
the server asks for: lost connections, statuses 408, 409, 429 and from 500 on, answers that cannot be read. What
remains is an `EngineFault`, never an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

import msgspec

from agentgym import seeding
from agentgym.errors import ConfigError, EngineFault
from agentgym.policy import Load
from agentgym_policies.endpoint.limits import Pace, gate_of, retry_after
from agentgym_policies.endpoint.transport import Answer, Application, Lost, Sockets, Transport

KEYS = ("AGENTGYM_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first that is set wins."""
PASSING = frozenset({408, 409, 429})
"""Status codes that another try may not meet; so are all from 500 on."""
BACKOFF = 0.5
"""Seconds before the first retry, give or take half; doubled for each further one up to `LONGEST`."""
LONGEST = 30.0
QUOTED = 300
"""Characters of a server's message that an error repeats."""
ENDS = ("/chat/completions", "/completions")
"""Ways in which an address is given in full."""

T = TypeVar("T")


class Passing(EngineFault):
    """Trouble that may pass, of a sort that `Usage.troubles` counts. `after`: seconds the server asks to wait."""

    def __init__(self, sort: str, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.sort, self.after = sort, after


class Refused(EngineFault):
    """An answer that no other try would better: a status below 500, the server's `message` and all that it `said`."""

    def __init__(self, what: str, status: int, message: str, said: str) -> None:
        super().__init__(f"{what}: {message}")
        self.status, self.message, self.said = status, message, said


class Usage(msgspec.Struct, kw_only=True):
    """What was asked so far. Tokens as the server counts them, `cached` of the `prompt` ones from its prefix cache.

    `seconds` adds up calls from their first try to their end; `failed` calls raised; `troubles` counts tries by what
    went wrong ("connection", "timeout", "unreadable", "status 503"), whether or not another one made up for it.
    """

    calls: int = 0
    tries: int = 0
    failed: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    seconds: float = 0.0
    troubles: dict[str, int] = {}

    def trouble(self, sort: str) -> None:
        self.troubles[sort] = self.troubles.get(sort, 0) + 1


class Client:
    """A server below `url`: the base address; without a path, /v1 is meant.

    `key`: by default the environment's AGENTGYM_API_KEY, then OPENAI_API_KEY. A call begins when fewer than
    `concurrency` calls are under way at its host, whichever client of the event loop makes them, and as
    `requests_per_minute` and `tokens_per_minute` allow. It then has `seconds`, its retries and their pauses included:
    `retries` more tries, each of at most `try_seconds`. With `app`, an ASGI application, there are no sockets.
    Usable from several event loops; each has connections and limits of its own. Raises `ConfigError`.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        app: Any = None,
        concurrency: int = 64,
        seconds: float = 120.0,
        try_seconds: float | None = None,
        retries: int = 3,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> None:
        if not url and app is None:
            raise ConfigError(
                "an 'endpoint' needs its url, like http://127.0.0.1:8000/v1, or app=, an ASGI application"
            )
        if concurrency < 1 or retries < 0 or not seconds > 0:
            raise ConfigError(
                "an endpoint needs concurrency >= 1, retries >= 0 and seconds > 0;"
                f" got {concurrency}, {retries} and {seconds}"
            )
        given = {"try_seconds": try_seconds, "requests_per_minute": requests_per_minute}
        for name, value in {**given, "tokens_per_minute": tokens_per_minute}.items():
            if value is not None and not value > 0:
                raise ConfigError(f"an endpoint needs {name} > 0, or None for no such limit; got {value}")
        self.base, self.app, self.usage = base_of(url or "http://app"), app, Usage()
        self._addresses: dict[str, str] = {}
        self.concurrency, self.seconds, self.try_seconds, self.retries = concurrency, seconds, try_seconds, retries
        self.rates = requests_per_minute, tokens_per_minute
        key = key or next(filter(None, map(os.environ.get, KEYS)), "")
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key.strip()}"
        self._lines: dict[asyncio.AbstractEventLoop, Line] = {}

    def post(
        self,
        path: str,
        body: bytes,
        *noise: seeding.Key,
        read: Callable[[bytes], T] = bytes,  # type: ignore[assignment]
        tokens: int = 0,
    ) -> Coroutine[Any, Any, T]:
        """What `read` makes of the answer to JSON `body`; where it raises `Passing`, the call is tried again.

        `noise` keys the jitter of the pauses, `tokens` is an estimate for the tokens a minute (`correct` it).
        """
        return self._call(_Ask("POST", self.address(path), body, noise, read, tokens))

    def get(
        self,
        path: str,
        *noise: seeding.Key,
        read: Callable[[bytes], T] = bytes,  # type: ignore[assignment]
    ) -> Coroutine[Any, Any, T]:
        """The same without a body."""
        return self._call(_Ask("GET", self.address(path), None, noise, read, 0))

    def correct(self, estimate: int, spent: int) -> None:
        """A call that was thought to take `estimate` tokens took `spent`."""
        self.line().pace.correct(estimate, spent)

    def load(self) -> Load:
        """Calls under way, and calls that wait for their place or their minute."""
        lines = list(self._lines.values())
        running = sum(line.running for line in lines)
        return Load(running=running, waiting=sum(line.calls for line in lines) - running, slots=self.concurrency)

    async def aclose(self) -> None:
        """Close the running event loop's connections. A later call opens new ones."""
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.transport.aclose()

    def line(self) -> Line:
        """What the running event loop holds; that of closed loops is forgotten."""
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            self._lines = {known: line for known, line in self._lines.items() if not known.is_closed()}
            self._lines[loop] = Line(self)
        return self._lines[loop]

    def address(self, path: str = "") -> str:
        """Where `path` lies; a query of the base address stays behind it."""
        if path not in self._addresses:
            self._addresses[path] = self.base._replace(path=self.base.path + path).geturl()
        return self._addresses[path]

    async def _call(self, ask: _Ask[T]) -> T:
        """In its turn at the host and in the minute."""
        line = self.line()
        line.calls += 1
        try:
            await line.gate.enter(self.concurrency)
            line.running += 1
            try:
                await line.pace.admit(ask.tokens, self.seconds)
                return await self._timed(line, ask)
            finally:
                line.running -= 1
                line.gate.leave()
        finally:
            line.calls -= 1

    async def _timed(self, line: Line, ask: _Ask[T]) -> T:
        """Within its deadline, and counted."""
        began = time.monotonic()
        self.usage.calls += 1
        try:
            async with asyncio.timeout(self.seconds):
                return await self._persist(line, ask, began + self.seconds)
        except TimeoutError as error:
            self.usage.failed += 1
            self.usage.trouble("timeout")
            raise EngineFault(f"{ask.address} did not answer within {self.seconds:g} s") from error
        except EngineFault:
            self.usage.failed += 1
            raise
        finally:
            self.usage.seconds += time.monotonic() - began

    async def _persist(self, line: Line, ask: _Ask[T], until: float) -> T:
        """By as many tries as it takes, as `retries` allows and as fit before the deadline."""
        attempt = 0
        while True:
            attempt += 1
            self.usage.tries += 1
            try:
                return ask.read(await self._once(line, ask))
            except Passing as trouble:
                self.usage.trouble(trouble.sort)
                wait = pause(trouble.after, attempt, ask.noise)
                if attempt > self.retries:
                    raise EngineFault(f"{trouble} (tries: {attempt})") from trouble
                if time.monotonic() + wait >= until:
                    late = f"the next try is due in {wait:.1f} s, past the call's {self.seconds:g} s"
                    raise EngineFault(f"{trouble} ({late})") from trouble
            await asyncio.sleep(wait)
            await line.pace.admit(ask.tokens, self.seconds)

    async def _once(self, line: Line, ask: _Ask[Any]) -> bytes:
        """One try: the body of a good answer, else `Passing` or `Refused`."""
        try:
            async with asyncio.timeout(self.try_seconds) if self.try_seconds else _NO_LIMIT:
                answer = await line.transport.send(ask.method, ask.address, ask.body)
        except Lost as error:
            raise Passing("connection", str(error)) from error
        except TimeoutError as error:
            raise Passing("timeout", f"{ask.address} did not answer within {self.try_seconds:g} s") from error
        line.pace.heed(answer.headers)
        if answer.status < 300:
            return answer.body
        after = retry_after(answer.headers)
        if after is not None:
            line.pace.hold(after)
        raise trouble_of(answer, ask.address, after)


_NO_LIMIT = nullcontext()


class _Ask(NamedTuple, Generic[T]):
    method: str
    address: str
    body: bytes | None
    noise: Sequence[seeding.Key]
    read: Callable[[bytes], T]
    tokens: int


class Line:
    """What one event loop holds of a client: connections, the way to its host, and who is on it."""

    def __init__(self, client: Client) -> None:
        self.gate = gate_of(f"{client.base.scheme}://{client.base.netloc}")
        self.pace = Pace(*client.rates)
        self.naming = asyncio.Lock()
        self.calls = self.running = 0
        headers = client.headers
        self.transport: Transport = Sockets(headers) if client.app is None else Application(client.app, headers)


def base_of(url: str) -> SplitResult:
    """The address below which a server's paths lie; `ConfigError` for what is no http address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(f"an endpoint is an address like http://127.0.0.1:8000/v1; got {url!r}")
    path = parts.path.rstrip("/")
    for end in ENDS:
        if path.endswith(end):
            return parts._replace(path=path.removesuffix(end))
    return parts._replace(path=path or "/v1")


def trouble_of(answer: Answer, address: str, after: float | None) -> Passing | Refused:
    """What a bad status means for the call."""
    what = f"{address} answered {answer.status} {answer.reason}"
    message = message_of(answer.body, answer.headers)
    if answer.status in PASSING or answer.status >= 500:
        return Passing(f"status {answer.status}", f"{what}: {message}", after)
    return Refused(what, answer.status, message, answer.body.decode(errors="replace"))


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


def pause(after: float | None, attempt: int, noise: Sequence[seeding.Key]) -> float:
    """Seconds before the try after `attempt`: what the server asked for and a little more, or jittered backoff."""
    jitter = seeding.share("endpoint-backoff", *noise, attempt)
    if after is not None:
        return after + BACKOFF * jitter
    return min(BACKOFF * 2.0 ** (attempt - 1), LONGEST) * (0.5 + jitter)
