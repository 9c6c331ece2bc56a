"""Ends of a vLLM client that need no vLLM: what answers here is a server that dies between two requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentgym.errors import EngineFault
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import Episode, Task, say
from agentgym_policies.vllm_base import LoopThread
from agentgym_policies.vllm_server import VllmServer

pytestmark = pytest.mark.network
SAID = {
    "token_ids": [1],
    "logprobs": {"content": [{"logprob": -1.0, "top_logprobs": [{"logprob": -1.0}, {"logprob": -1.0}]}]},
    "weight_versions": [{"start": 0, "version": "0"}],
    "finish_reason": "length",
}
ANSWERS: dict[str, Any] = {
    "/update_weight_version": {},
    "/resume": {},
    "/collective_rpc": {"results": [{"mode": "processed_logprobs"}]},
    "/inference/v1/generate": {"choices": [SAID], "usage": None},
}


class Failing(BaseHTTPRequestHandler):
    """Serves, and fails as soon as it is to be paused for new weights."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        found = ANSWERS.get(self.path)
        body = json.dumps(found).encode() if found is not None else b"the worker died"
        self.send_response(500 if found is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return None


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def running() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_an_engine_that_cannot_take_its_first_weights_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    renderer = Renderer(closed_vocabulary(["w"]))
    with pytest.raises(EngineFault, match="/pause answered 500: the worker died"):
        VllmServer.serving(build.tiny(40, hidden=16, layers=1), renderer, shared=True, url=url, folder=str(tmp_path))
    assert "agentgym-vllm" not in running()
    assert not list(tmp_path.iterdir())


async def test_a_reply_that_the_server_broke_off_is_no_reply(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    who = VllmServer(url, Renderer(closed_vocabulary(["w"])))
    monkeypatch.setitem(SAID, "finish_reason", "abort")
    try:
        with pytest.raises(EngineFault, match=r"broke off its reply \(finish_reason 'abort'\)"):
            async with who.session(Episode(task=Task(env="test")), "agent") as session:
                await session.act(say("w"))
    finally:
        who.close()


def test_a_thread_ends_whatever_its_last_work_raises() -> None:
    async def last() -> None:
        raise OSError("gone already")

    thread = LoopThread("agentgym-last")
    with pytest.raises(OSError, match="gone already"):
        thread.close(last)
    assert "agentgym-last" not in running()
