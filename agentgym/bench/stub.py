"""A model endpoint that thinks nothing: `python -m agentgym.bench.stub` answers each POST with the same completion.

It prints its address, serves on loopback over kept-alive connections, and ends when its standard input does. A process
of its own, so that its CPU time is nobody's row; standard library only, so that it is there without any framework.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

REPLY = "y" * 110
COMPLETION = {
    "id": "stub",
    "object": "chat.completion",
    "created": 0,
    "model": "stub",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": REPLY}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 60, "completion_tokens": 30, "total_tokens": 90},
}


@contextmanager
def stub() -> Iterator[str]:
    """The base address (`http://127.0.0.1:PORT/v1`) of a stub that runs until the block is left."""
    command = [sys.executable, "-m", "agentgym.bench.stub"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: a request of known length, the completion, and again, until the client closes."""
    body = json.dumps(COMPLETION).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    try:
        while True:
            await reader.readexactly(content_length(await reader.readuntil(b"\r\n\r\n")))
            writer.write(head + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def content_length(head: bytes) -> int:
    """The length a request's head announces; 0 where it announces none."""
    fields = (line.partition(b":") for line in head.split(b"\r\n"))
    return next((int(value) for name, _, value in fields if name.lower() == b"content-length"), 0)


async def serve() -> None:
    """On a free loopback port, until standard input ends. The backlog takes a burst of connections at once."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
