"""Who may call when: places at a host, requests and tokens per minute. Each belongs to one event loop."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from weakref import WeakKeyDictionary

from agentgym.errors import EngineFault

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Gate:
    """Calls under way at one host, whoever makes them. First come, first served: nobody overtakes a waiting call."""

    __slots__ = ("busy", "waiting")

    def __init__(self) -> None:
        self.busy = 0
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, bound: int) -> None:
        """Wait until fewer than `bound` calls are under way, and be one of them until `leave`."""
        if not self.waiting and self.busy < bound:
            self.busy += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((bound, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._admit()
            else:
                self.leave()
            raise

    def leave(self) -> None:
        self.busy -= 1
        self._admit()

    def _admit(self) -> None:
        while self.waiting and (self.waiting[0][1].done() or self.busy < self.waiting[0][0]):
            _, place = self.waiting.popleft()
            if not place.done():
                self.busy += 1
                place.set_result(None)


_GATES: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Gate]] = WeakKeyDictionary()


def gate_of(host: str) -> Gate:
    """The running event loop's gate of a host (scheme, name and port): one for all clients."""
    return _GATES.setdefault(asyncio.get_running_loop(), {}).setdefault(host, Gate())


class Bucket:
    """An allowance that flows in evenly. No 60 seconds see more than `per_minute` of what is taken one by one.

    A tenth of it may go at once, the rest flows. An amount above that tenth waits for a full bucket and leaves a debt.
    """

    __slots__ = ("at", "burst", "level", "rate")

    def __init__(self, per_minute: float) -> None:
        self.burst = max(1.0, per_minute // 10)
        self.rate = (per_minute - self.burst + 1) / 60
        self.level, self.at = self.burst, float("-inf")

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be taken; 0 is now. `now` never goes back."""
        if now > self.at:
            self.level = min(self.burst, self.level + (now - self.at) * self.rate)
            self.at = now
        return max(0.0, min(amount, self.burst) - self.level) / self.rate

    def take(self, amount: float) -> None:
        """Less than nothing gives back."""
        self.level = min(self.burst, self.level - amount)


class Pace:
    """Requests and tokens per minute (None: as many as one likes) and what the server asked all to wait, in order."""

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self.requests = None if requests is None else Bucket(requests)
        self.tokens = None if tokens is None else Bucket(tokens)
        self.held = 0.0
        self._order = asyncio.Lock()

    async def admit(self, tokens: float, patience: float) -> None:
        """Wait for the moment of a request of about so many tokens.

        Raises `EngineFault` at once where the server asked for a longer pause than `patience` seconds.
        """
        if self.requests is self.tokens is None and not self.held:
            return
        async with self._order:
            wait = self._wait(tokens, patience)
            while wait > 0:
                await asyncio.sleep(wait)
                wait = self._wait(tokens, patience)
            for bucket, amount in ((self.requests, 1.0), (self.tokens, tokens)):
                if bucket is not None:
                    bucket.take(amount)

    def _wait(self, tokens: float, patience: float) -> float:
        now = time.monotonic()
        held = self.held - now
        if held > patience:
            raise EngineFault(f"the server asked for a pause of {held:.1f} s more, past the call's {patience:g} s")
        own = [b.wait(now, amount) for b, amount in ((self.requests, 1.0), (self.tokens, tokens)) if b is not None]
        return max(held, *own, 0.0)

    def correct(self, estimate: float, spent: float) -> None:
        """The call took other than the estimated tokens."""
        if self.tokens is not None:
            self.tokens.take(spent - estimate)

    def heed(self, headers: Mapping[str, str]) -> None:
        """Where the server says that nothing remains, wait until it says that something will."""
        for what in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{what}") == "0":
                self.hold(duration(headers.get(f"x-ratelimit-reset-{what}", "")))

    def hold(self, seconds: float) -> None:
        """No request begins for so long."""
        self.held = max(self.held, time.monotonic() + seconds)


def duration(text: str) -> float:
    """Seconds of what rate-limit headers hold: "1.5" or "6m0s" or "20ms"; 0 for what is neither."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))


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
