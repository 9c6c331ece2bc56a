"""How bytes travel: aiohttp over sockets, or httpx straight into an ASGI application."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import aiohttp
from yarl import URL

from agentgym.errors import EngineFault

LARGE = 2**20
"""Bytes of a body from which on aiohttp wants a stream."""


class Answer(NamedTuple):
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class Lost(EngineFault):
    """The connection could not be made, or broke before the answer was whole."""


class Transport(Protocol):
    """One event loop's way to a server."""

    async def send(self, method: str, address: str, body: bytes | None) -> Answer:
        """One exchange; redirects are answers. Raises `Lost`, and `EngineFault` for what another try would meet too."""
        ...

    async def aclose(self) -> None: ...


class Sockets:
    """Kept-alive connections, as many as there are calls at once: who bounds calls bounds sockets."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._addresses: dict[str, URL] = {}
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def send(self, method: str, address: str, body: bytes | None) -> Answer:
        if self._http.closed:
            raise EngineFault(f"the endpoint {address} was closed while it was asked")
        url = self._addresses.get(address) or self._addresses.setdefault(address, URL(address))
        data = io.BytesIO(body) if body is not None and len(body) > LARGE else body
        try:
            async with self._http.request(method, url, data=data, allow_redirects=False) as response:
                return Answer(response.status, response.reason or "", response.headers, await response.read())
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise Lost(f"{address}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise EngineFault(f"{address}: {type(error).__name__}: {error}") from error

    async def aclose(self) -> None:
        await self._http.close()


class Application:
    """An ASGI application in this process, without a socket; what it raises is a 500."""

    def __init__(self, app: Any, headers: Mapping[str, str]) -> None:
        import httpx

        inner = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=inner, headers=dict(headers), timeout=None)

    async def send(self, method: str, address: str, body: bytes | None) -> Answer:
        if self._http.is_closed:
            raise EngineFault(f"the endpoint {address} was closed while it was asked")
        found = await self._http.request(method, address, content=body)
        return Answer(found.status_code, found.reason_phrase, found.headers, found.content)

    async def aclose(self) -> None:
        await self._http.aclose()
