"""The client under endpoints: bounds per host, rates, deadlines, usage, what is left open, ASGI."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from chat_server import ASK, completion, half, hang, once, opened, serving, talking, trouble
from hypothesis import given
from hypothesis import strategies as st

from agentgym.env import task_list
from agentgym.errors import ConfigError, EngineFault
from agentgym.policy import Load, Loaded
from agentgym.rollout import Runner, episodes
from agentgym.testing.fakes import CountingEnv
from agentgym.types import Action
from agentgym_policies.endpoint import Client, Endpoint
from agentgym_policies.endpoint import client as module
from agentgym_policies.endpoint.limits import Bucket, Gate, Pace, duration

pytestmark = [pytest.mark.network, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.02)


async def soon(seen: Callable[[], bool]) -> None:
    """Until it is so, or the test's own deadline."""
    while not seen():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


# --- places at a host -------------------------------------------------------------------------------------------


async def test_a_gate_admits_in_order_and_up_to_each_callers_bound() -> None:
    gate, order = Gate(), []

    async def call(name: str, bound: int) -> None:
        await gate.enter(bound)
        order.append(name)

    await call("a", 2)
    jobs = [asyncio.create_task(call(*each)) for each in (("b", 2), ("c", 1), ("d", 5))]
    await asyncio.sleep(0)
    assert (order, gate.busy) == (["a", "b"], 2)
    gate.leave()
    await asyncio.sleep(0)
    assert order == ["a", "b"], "c is at the head, and one is still under way"
    gate.leave()
    await asyncio.gather(*jobs)
    assert (order, gate.busy) == (["a", "b", "c", "d"], 2)


@pytest.mark.parametrize("late", [False, True])
async def test_a_cancelled_wait_hands_its_place_on(late: bool) -> None:
    gate = Gate()
    await gate.enter(1)
    first, second = (asyncio.create_task(gate.enter(1)) for _ in range(2))
    await asyncio.sleep(0)
    if late:
        gate.leave()  # the first has its place, and has not run yet
    first.cancel()
    await asyncio.wait([first])
    if not late:
        gate.leave()
    await second
    assert (first.cancelled(), gate.busy, len(gate.waiting)) == (True, 1, 0)


async def test_endpoints_at_one_host_share_its_bound() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return web.json_response(completion("ok"))

    async with (
        serving(lambda body, n: slow) as server,
        opened(server.url, concurrency=3) as one,
        opened(server.url, concurrency=3, tokens="off") as other,
    ):
        jobs = [asyncio.create_task(once(e)) for e in (one, other) * 6]
        await soon(lambda: server.busy == 3)
        assert one.load().running + other.load().running == 3
        assert one.load().waiting + other.load().waiting == 9
        assert all(await asyncio.gather(*jobs))
    assert server.peak == 3


async def test_load_says_what_runs_and_what_waits() -> None:
    async with talking(lambda body, n: hang, concurrency=2) as server:
        assert isinstance(server.endpoint, Loaded)
        jobs = [asyncio.create_task(once(server.endpoint)) for _ in range(5)]
        await soon(lambda: server.busy == 2)
        found = await asyncio.to_thread(server.endpoint.load)
        assert (found, found.full) == (Load(running=2, waiting=3, slots=2), True)
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        assert server.endpoint.load() == Load(slots=2)


# --- rates ------------------------------------------------------------------------------------------------------


@given(
    per_minute=st.integers(1, 600),
    gaps=st.lists(st.floats(0, 20), min_size=1, max_size=120),
)
def test_no_minute_sees_more_than_its_requests(per_minute: int, gaps: list[float]) -> None:
    bucket, now, went = Bucket(per_minute), 0.0, []
    for gap in gaps:
        now += gap
        now += bucket.wait(now, 1.0)
        assert bucket.wait(now, 1.0) < 1e-6
        bucket.take(1.0)
        went.append(now)
    busiest = max(sum(start <= at < start + 60 - 1e-6 for at in went) for start in went)
    assert busiest <= per_minute


def test_a_steady_stream_gets_its_rate_and_a_large_amount_leaves_a_debt() -> None:
    bucket, now = Bucket(600), 0.0
    for _ in range(600):
        now += bucket.wait(now, 1.0)
        bucket.take(1.0)
    assert 58 <= now + 6 <= 66
    tokens = Bucket(600)
    assert tokens.wait(0.0, 6000) == 0
    tokens.take(6000)
    assert tokens.wait(0.0, 1) == pytest.approx((6000 - 60 + 1) / tokens.rate)
    tokens.take(-5000)
    assert tokens.wait(0.0, 1) == pytest.approx((1000 - 60 + 1) / tokens.rate)


async def test_requests_are_spread_and_keep_their_order() -> None:
    pace, order = Pace(1200, None), []
    for _ in range(120):
        await pace.admit(0, 60)

    async def call(number: int) -> None:
        await pace.admit(0, 60)
        order.append(number)

    began = time.perf_counter()
    await asyncio.gather(*(call(i) for i in range(6)))
    assert order == list(range(6))
    assert time.perf_counter() - began >= 5 * 60 / 1200


async def test_tokens_a_minute_are_estimated_and_corrected_by_what_comes_back() -> None:
    spent = completion("ok") | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    async with talking(lambda body, n: web.json_response(spent), tokens_per_minute=100_000) as server:
        await once(server.endpoint)
        bucket = server.endpoint.client.line().pace.tokens
        assert bucket is not None
        assert bucket.burst - bucket.level == pytest.approx(10, abs=1)


async def test_what_the_server_says_remains_is_obeyed() -> None:
    spent = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
    async with talking(lambda body, n: web.json_response(completion("ok"), headers=spent)) as server:
        await once(server.endpoint)
        began = time.perf_counter()
        await once(server.endpoint)
        assert 0.25 <= time.perf_counter() - began < 5


async def test_one_calls_retry_after_holds_all_and_too_long_a_pause_is_a_fault() -> None:
    def answer(body: dict[str, Any], n: int) -> Any:
        return trouble(503, "warming up", **{"Retry-After": "40"})

    async with talking(answer, seconds=5.0) as server:
        with pytest.raises(EngineFault, match="warming up"):
            await once(server.endpoint)
        with pytest.raises(EngineFault, match=r"asked for a pause of \d\d\.\d s more, past the call's 5 s"):
            await once(server.endpoint)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1.5", 1.5), ("6m0s", 360.0), ("20ms", 0.02), ("1h2m", 3720.0), ("-3", 0.0), ("soon", 0.0)],
)
def test_durations_of_headers(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["try_seconds", "requests_per_minute", "tokens_per_minute"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} > 0, or None for no such limit; got 0"):
        Endpoint("http://h", **{name: 0})


# --- deadlines and usage ----------------------------------------------------------------------------------------


async def test_a_try_that_hangs_is_tried_again() -> None:
    async with talking(lambda body, n: hang if n == 1 else "ok", try_seconds=0.2) as server:
        assert (await once(server.endpoint)).text == "ok"
    async with talking(lambda body, n: hang, try_seconds=0.1, retries=1) as server:
        with pytest.raises(EngineFault, match=r"did not answer within 0\.1 s \(tries: 2\)"):
            await once(server.endpoint)
    assert server.endpoint.usage.troubles == {"timeout": 2}


async def test_usage_adds_up() -> None:
    spent = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    answers: list[Any] = [trouble(500), completion("ok") | {"usage": spent}, completion("ok") | {"usage": spent}, half]

    def answer(body: dict[str, Any], n: int) -> Any:
        found = answers[n - 1]
        return web.json_response(found) if isinstance(found, dict) else found

    async with talking(answer, retries=1, concurrency=1) as server:
        await once(server.endpoint)
        await once(server.endpoint)
        server.endpoint.client.retries = 0
        with pytest.raises(EngineFault, match="ClientPayloadError"):
            await once(server.endpoint)
        usage = server.endpoint.usage
    assert (usage.calls, usage.tries, usage.failed) == (3, 4, 1)
    assert (usage.prompt, usage.completion, usage.cached) == (14, 6, 8)
    assert usage.troubles == {"status 500": 1, "connection": 1}
    assert 0 < usage.seconds < 10


async def test_a_body_that_aiohttp_would_rather_stream_goes_through_and_again() -> None:
    text = "x" * (3 * 2**20)
    async with serving(lambda body, n: trouble(500) if n == 1 else str(len(body["text"]))) as server:
        client = Client(server.url)
        found = await client.post("/chat/completions", json.dumps({"text": text}).encode())
        await client.aclose()
    assert json.loads(found)["choices"][0]["message"]["content"] == str(len(text))


# --- what is left open ------------------------------------------------------------------------------------------


def sockets() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


async def closed(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


FAULTS: dict[str, Any] = {
    "500": lambda n: trouble(500),
    "429": lambda n: trouble(429, **{"Retry-After": "0"}),
    "hang": lambda n: hang,
    "closed at once": lambda n: closed,
    "half a body": lambda n: half,
    "no JSON": lambda n: web.Response(text="<html>busy</html>", content_type="text/html"),
    "another content type": lambda n: web.Response(text="{}", content_type="text/plain"),
    "redirect": lambda n: web.Response(status=302, headers={"Location": "/elsewhere"}),
    "refused": lambda n: trouble(401),
}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_fails_episodes_pays_nothing_and_leaves_no_socket_or_task(fault: str) -> None:
    asked = list(episodes(task_list(CountingEnv(), "train", 0, 12)))
    async with serving(lambda body, n: FAULTS[fault](n)) as server:
        before, tasks = sockets(), asyncio.all_tasks()
        async with opened(server.url, retries=1, seconds=0.4, concurrency=8) as endpoint:
            runner = Runner(CountingEnv(), endpoint, retries=0, concurrency=12)
            found = await runner.collect(asked)
            assert [(t.status, t.failure and t.failure.kind) for t in found] == [("failed", "engine")] * 12
            assert not any(list(t.rewards) for t in found)
            assert endpoint.usage.failed == 12
            assert endpoint.load() == Load(slots=8)
        await soon(lambda: sockets() <= before and asyncio.all_tasks() <= tasks)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
async def test_calls_reuse_connections_and_faults_do_not_wear_them_out() -> None:
    async with talking(lambda body, n: trouble(500) if n % 2 else "ok", concurrency=4, retries=5) as server:
        await asyncio.gather(*(once(server.endpoint) for _ in range(8)))
        kept = sockets()
        for _ in range(4):
            await asyncio.gather(*(once(server.endpoint) for _ in range(8)))
        assert sockets() <= kept + 2, "both ends are in this process"


# --- ASGI -------------------------------------------------------------------------------------------------------


def application(answer: Callable[[dict[str, Any], int], Any]) -> Any:
    """A chat-completions server as a bare ASGI application: `answer` gives a message, (status, body), or raises."""
    asked = 0

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        assert (scope["method"], scope["path"]) == ("POST", "/v1/chat/completions")
        found = answer(json.loads(body), asked)
        status, data = found if isinstance(found, tuple) else (200, completion(found))
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": json.dumps(data).encode()})

    return app


async def test_an_application_is_asked_without_a_socket_by_the_same_client() -> None:
    def answer(body: dict[str, Any], n: int) -> Any:
        if n == 1:
            raise RuntimeError("the application broke")
        return (429, {"error": "slow"}) if n == 2 else f"{body['model']} heard {body['messages'][-1]['content']}"

    before = sockets()
    async with opened("", app=application(answer)) as endpoint:
        assert await once(endpoint) == Action(text="m heard Find it.")
        assert endpoint.usage.troubles == {"status 500": 1, "status 429": 1}
        assert sockets() == before
    async with opened("http://named", app=application(lambda body, n: (404, {"message": "no such model"}))) as endpoint:
        with pytest.raises(EngineFault, match=r"http://named/v1/chat/completions answered 404 .*: no such model"):
            await once(endpoint, ASK)


def test_without_address_and_application_there_is_no_endpoint() -> None:
    with pytest.raises(ConfigError, match=r"needs its url, .* or app="):
        Endpoint()
