"""Endpoints as policies, against real servers on the loopback: the protocol both ways, and every kind of trouble."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import web
from chat_server import ASK, EPISODE, TOOLS, calling, completion, half, hang, once, opened, serving, talking, trouble

import agentgym
from agentgym import registry
from agentgym.env import task_list
from agentgym.errors import ConfigError, EngineFault, MissingExtra, ModelError
from agentgym.rollout import Runner, episodes
from agentgym.testing import check_policy
from agentgym.testing.fakes import CountingEnv
from agentgym.types import AGENT, Action, Array, Message, Observation, Sampling, ToolCall, say
from agentgym_policies.endpoint import Endpoint
from agentgym_policies.endpoint import client as module
from agentgym_policies.endpoint.client import base_of, pause
from agentgym_policies.endpoint.limits import retry_after

pytestmark = [pytest.mark.network, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.02)
    for name in module.KEYS:
        monkeypatch.delenv(name, raising=False)


# --- the protocol -----------------------------------------------------------------------------------------------


async def test_a_chat_keeps_its_messages_and_says_how_to_sample() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, max_tokens=11, stop=("END",))
    async with (
        talking(lambda body, n: f"reply {n}", key="secret", tokens="off") as server,
        server.endpoint.session(EPISODE, AGENT) as session,
    ):
        first = await session.act(say("one", "two"), sampling)
        second = await session.act(say("three"))
    assert [first, second] == [Action(text="reply 1"), Action(text="reply 2")]
    assert first.span is None
    asked = server.asked[0]
    seed = asked.pop("seed")
    said = [{"role": "user", "content": text} for text in ("one", "two")]
    assert asked == {
        "model": "m", "messages": said, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 11, "stop": ["END"]
    }  # fmt: skip
    more = [{"role": "assistant", "content": "reply 1"}, {"role": "user", "content": "three"}]
    assert server.asked[1]["messages"] == said + more
    assert server.asked[1]["temperature"] == 1.0
    assert "top_k" not in server.asked[1]
    assert 0 <= seed < 2**31 != server.asked[1]["seed"] != seed
    assert server.paths == ["POST /v1/chat/completions"] * 2
    assert server.headers[0]["Authorization"] == "Bearer secret"


async def test_seeds_hang_from_the_episode() -> None:
    async with talking(lambda body, n: "ok") as server:
        for member in (0, 1, 0):
            await once(server.endpoint, episode=EPISODE.replace(member=member))
    one, other, again = (asked["seed"] for asked in server.asked)
    assert one == again != other


async def test_the_first_model_listed_is_asked_for_once() -> None:
    def answer(body: dict[str, Any], n: int) -> Any:
        return body["model"] if body else web.json_response({"object": "list", "data": [{"id": "a"}, {"id": "b"}]})

    async with serving(answer) as server, opened(server.url.removesuffix("/v1"), model="") as endpoint:
        found = await asyncio.gather(*(once(endpoint) for _ in range(5)))
    assert [action.text for action in found] == ["a"] * 5
    assert server.paths == ["GET /v1/models"] + ["POST /v1/chat/completions"] * 5


async def test_without_any_model_one_must_be_named() -> None:
    async with talking(lambda body, n: web.json_response({"data": []}), model="") as server:
        with pytest.raises(EngineFault, match="lists no model; name one"):
            await once(server.endpoint)


async def test_tool_calls_go_both_ways() -> None:
    calls = (("id1", "find", '{"what": "é"}'), ("id2", "find", ""), ("id3", "find", "{}"))
    answers = [calling(*calls, content="Looking."), "done"]
    async with (
        talking(lambda body, n: answers[n - 1]) as server,
        server.endpoint.session(EPISODE, AGENT) as session,
    ):
        action = await session.act(ASK)
        results = (
            Message(role="user", content="hurry"),
            Message(role="tool", content="nowhere", tool_call_id="id2", name="find"),
            Message(role="tool", content="here", tool_call_id="id1", name="find"),
            Message(role="tool", content="whose?"),
        )
        await session.act(Observation(messages=results))
    assert action.text == "Looking."
    assert action.tool_calls == (
        ToolCall(name="find", arguments={"what": "é"}, id="id1"),
        ToolCall(name="find", id="id2"),
        ToolCall(name="find", id="id3"),
    )
    assert server.asked[0]["tools"] == server.asked[1]["tools"] == list(TOOLS)
    said, *answered = server.asked[1]["messages"][1:]
    assert [(c["id"], json.loads(c["function"]["arguments"])) for c in said["tool_calls"]] == [
        ("id1", {"what": "é"}), ("id2", {}), ("id3", {})
    ]  # fmt: skip
    assert answered == [
        {"role": "tool", "tool_call_id": "id1", "content": "here"},
        {"role": "tool", "tool_call_id": "id2", "content": "nowhere"},
        {"role": "tool", "tool_call_id": "id3", "content": ""},
        {"role": "user", "content": "hurry"},
        {"role": "user", "content": "whose?"},
    ]


@pytest.mark.parametrize("arguments", ['{"what": ', "[1]", "null", "nonsense"])
async def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    answer = calling(("id1", "find", arguments), ("id2", "find", "{}"), content="So:")
    async with talking(lambda body, n: answer) as server:
        action = await once(server.endpoint)
    assert action.tool_calls == (ToolCall(name="find", id="id2"),)
    assert action.text == f'So:\n<tool_call>\n{{"name": "find", "arguments": {arguments}}}\n</tool_call>'


async def test_calls_without_ids_of_their_own_get_new_ones() -> None:
    answers = [calling(("same", "find", "{}"), ("same", "find", "{}")), calling(("", "find", "{}"))]
    async with (
        talking(lambda body, n: answers[n - 1]) as server,
        server.endpoint.session(EPISODE, AGENT) as session,
    ):
        found = [await session.act(ASK), await session.act(say("again"))]
    assert [[call.id for call in action.tool_calls] for action in found] == [["call_0_0", "call_0_1"], ["call_1_0"]]


@pytest.mark.parametrize("tools", [TOOLS, ()])
async def test_calls_that_the_server_left_in_the_text_count_where_there_are_tools(tools: Any) -> None:
    text = 'Now.\n<tool_call>\n{"name": "find", "arguments": {"what": 1}}\n</tool_call>'
    async with talking(lambda body, n: text) as server:
        action = await once(server.endpoint, ASK.replace(tools=tools))
    called = Action(text="Now.", tool_calls=(ToolCall(name="find", arguments={"what": 1}, id="call_0_0"),))
    assert action == (called if tools else Action(text=text))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "text", "text": "a"}, {"type": "thinking"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": "half \ud83d a pair"}, "half \ud83d a pair"),
    ],
)
async def test_odd_messages_are_outcomes(message: dict[str, Any], text: str) -> None:
    async with talking(lambda body, n: message) as server, server.session() as session:
        assert (await session.act(ASK)).text == text
        await session.act(say("on"))
    assert server.asked[1]["messages"][1]["content"] == text


async def test_what_is_no_text_is_refused() -> None:
    endpoint = Endpoint("http://127.0.0.1:1", model="m")
    with pytest.raises(ModelError, match="array"):
        await once(endpoint, Observation(array=Array.of([1.0])))


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://h/chat/completions", "https://h"),
    ],
)
def test_addresses_are_taken_in_every_common_form(url: str, base: str) -> None:
    assert base_of(url).geturl() == base


@pytest.mark.parametrize("url", ["ftp://h/v1", "http:///v1", "h:8000", "http://h:port/v1", "http://[::1/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="an endpoint is an address like"):
        Endpoint(url)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"retries": -1}, {"seconds": 0.0}])
def test_limits_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="an endpoint needs"):
        Endpoint("http://h", **wrong)


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(lambda body, n: "ok") as server:
        for name in reversed(module.KEYS):
            monkeypatch.setenv(name, f"from {name}")
            async with opened(server.url) as endpoint:
                await once(endpoint)
    found = [headers["Authorization"] for headers in server.headers]
    assert found == ["Bearer from OPENAI_API_KEY", "Bearer from AGENTGYM_API_KEY"]


# --- trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
async def test_what_may_pass_is_tried_again(status: int) -> None:
    async with talking(lambda body, n: trouble(status) if n < 3 else "ok") as server:
        assert (await once(server.endpoint)).text == "ok"
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


async def test_what_persists_is_a_fault_with_status_and_message() -> None:
    async with talking(lambda body, n: trouble(503, "no workers"), retries=2) as server:
        with pytest.raises(EngineFault, match=r"503 Service Unavailable: no workers \(tries: 3\)"):
            await once(server.endpoint)
    assert len(server.asked) == 3


async def test_retry_after_is_honoured() -> None:
    def answer(body: dict[str, Any], n: int) -> Any:
        return trouble(429, **{"Retry-After": "0.4"}) if n == 1 else "ok"

    async with talking(answer) as server:
        began = time.perf_counter()
        assert (await once(server.endpoint)).text == "ok"
        assert 0.4 <= time.perf_counter() - began < 5


async def test_retry_after_beyond_the_deadline_is_a_fault_at_once() -> None:
    limited = {"Retry-After": "60"}
    async with talking(lambda body, n: trouble(429, "slow down", **limited), seconds=30.0) as server:
        began = time.perf_counter()
        with pytest.raises(EngineFault, match=r"429 .*slow down .*60\.\d s, past the call's 30 s"):
            await once(server.endpoint)
        assert time.perf_counter() - began < 5
    assert len(server.asked) == 1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after({"Retry-After": "7"}) == 7.0
    assert retry_after({"Retry-After": "-7"}) == 0.0
    assert retry_after({"Retry-After": formatdate(time.time() + 50, usegmt=True)}) == pytest.approx(50, abs=3)
    assert retry_after({"Retry-After": formatdate(time.time() - 50, usegmt=True)}) == 0.0
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({}) is None


def test_backoff_doubles_and_its_jitter_is_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.5)
    waits = [pause(None, attempt, (1, 2, "agent")) for attempt in range(1, 12)]
    assert waits == [pause(None, attempt, (1, 2, "agent")) for attempt in range(1, 12)]
    assert all(0.5 <= wait / min(0.5 * 2**n, 30) <= 1.5 for n, wait in enumerate(waits))
    assert len({pause(None, 1, (member,)) for member in range(20)}) == 20
    assert 3.0 <= pause(3.0, 1, ()) <= 3.5


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_cannot_pass_is_a_fault_at_once(status: int) -> None:
    async with talking(lambda body, n: trouble(status, "bad key: ***"), tokens="off") as server:
        with pytest.raises(EngineFault, match=rf"chat/completions answered {status} .*: bad key: \*\*\*$"):
            await once(server.endpoint)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"error": {"message": "told"}}', "418 I'm a Teapot: told"),
        ('{"error": "told"}', ": told"),
        ('{"object": "error", "message": "told"}', ": told"),
        ('{"detail": "told"}', ": told"),
        ("told\n  in full", ": told in full"),
        ("", r"\(no message\)"),
        ("x" * 1000, ": x{300}\\.\\.\\.$"),
    ],
)
async def test_the_servers_message_is_found(body: str, words: str) -> None:
    async with talking(lambda asked, n: web.Response(status=418, text=body)) as server:
        with pytest.raises(EngineFault, match=words):
            await once(server.endpoint)


async def test_a_redirect_is_not_followed_but_named() -> None:
    moved = {"Location": "https://elsewhere/v1"}
    async with talking(lambda body, n: web.Response(status=308, headers=moved)) as server:
        with pytest.raises(EngineFault, match=r"308 .*https://elsewhere/v1"):
            await once(server.endpoint)


@pytest.mark.parametrize(
    "body",
    [
        "", "garbage", "[]", '{"choices": ', '{"choices": []}', '{"choices": [{}]}', '{"choices": [{"message": 3}]}',
        '{"error": {"message": "overloaded"}}', "\xff", '{"choices": [{"message": {"tool_calls": [{"id": "x"}]}}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_asked_for_again_and_then_a_fault(body: str) -> None:
    broken = body.encode("latin-1")
    async with talking(lambda asked, n: web.Response(body=broken) if n < 3 else "ok") as server:
        assert (await once(server.endpoint)).text == "ok"
    async with talking(lambda asked, n: web.Response(body=broken), retries=1) as server:
        with pytest.raises(EngineFault, match=r"the endpoint's answer.*\(tries: 2\)") as caught:
            await once(server.endpoint)
    assert len(server.asked) == 2
    assert server.endpoint.usage.troubles == {"unreadable": 2}
    assert ("overloaded" in str(caught.value)) == ("overloaded" in body)
    assert len(str(caught.value)) < 1000


async def test_half_a_body_is_a_lost_connection() -> None:
    async with talking(lambda body, n: half if n < 2 else "ok") as server:
        assert (await once(server.endpoint)).text == "ok"
    async with talking(lambda body, n: half, retries=1) as server:
        with pytest.raises(EngineFault, match=r"ClientPayloadError.*\(tries: 2\)"):
            await once(server.endpoint)
    assert len(server.asked) == 2


async def test_nobody_there_is_a_fault() -> None:
    async with opened("http://127.0.0.1:1/v1", retries=1) as endpoint:
        with pytest.raises(EngineFault, match=r"127\.0\.0\.1:1/v1.*Connect.*\(tries: 2\)"):
            await once(endpoint)


async def test_a_hang_ends_at_the_deadline() -> None:
    async with talking(lambda body, n: hang, seconds=0.3) as server:
        began = time.perf_counter()
        with pytest.raises(EngineFault, match=r"did not answer within 0\.3 s"):
            await once(server.endpoint)
        assert 0.3 <= time.perf_counter() - began < 5


async def test_waiting_for_ones_turn_is_not_held_against_the_call() -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.25)
        return web.json_response(completion("ok"))

    async with talking(lambda body, n: slow, seconds=1.0, concurrency=1) as server:
        found = await asyncio.gather(*(once(server.endpoint) for _ in range(6)))
    assert [action.text for action in found] == ["ok"] * 6
    assert server.peak == 1


async def test_cancellation_releases_the_slot_and_the_session_goes_on() -> None:
    async with (
        talking(lambda body, n: hang if n == 1 else "ok", concurrency=1) as server,
        server.endpoint.session(EPISODE, AGENT) as session,
    ):
        job = asyncio.create_task(session.act(ASK))
        await server.arrived.wait()
        assert server.endpoint.free_slots == 0
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert server.endpoint.free_slots == 1
        assert (await session.act(ASK)).text == "ok"
    assert server.asked[0] == server.asked[1]


async def test_closing_ends_a_call_under_way_and_a_later_one_opens_anew() -> None:
    async with talking(lambda body, n: hang if n == 1 else "ok") as server:
        job = asyncio.create_task(once(server.endpoint))
        await server.arrived.wait()
        await server.endpoint.aclose()
        with pytest.raises(EngineFault, match="closed"):
            await job
        assert (await once(server.endpoint)).text == "ok"


async def test_it_keeps_the_rules_of_policies() -> None:
    async with serving(lambda body, n: str(len(body["messages"]))) as server:
        endpoint = Endpoint(server.url, model="m")
        report = await asyncio.to_thread(check_policy, endpoint, CountingEnv(), deterministic=True)
    report.raise_for_failures()
    assert report["closes"].status == "passed"
    assert report["spans"].status == "not_claimed"


def test_each_event_loop_has_its_own_connections() -> None:
    endpoint = Endpoint("http://127.0.0.1:1", model="m", retries=0)

    async def fail() -> None:
        with pytest.raises(EngineFault, match="Connect"):
            await once(endpoint)
        await endpoint.aclose()

    for _ in range(2):
        asyncio.run(fail())


# --- in the gym -------------------------------------------------------------------------------------------------


def shop_assistant(body: dict[str, Any], number: int) -> Any:
    """Searches, recommends the first thing found, and has only words for who wants to buy several.

    Refuses what a strict server refuses.
    """
    messages = body["messages"]
    wrong = misspoken(messages)
    if wrong:
        return trouble(400, wrong)
    names = {tool["function"]["name"] for tool in body["tools"]}
    assert {"search", "recommend"} <= names
    if messages[-1]["role"] == "user" and len(messages) == 2:
        return calling((f"c{number}", "search", json.dumps({"query": messages[-1]["content"]})))
    found = json.loads(messages[-1]["content"]) if messages[-1]["role"] == "tool" else {}
    if "items" in found:
        return calling((f"c{number}", "recommend", json.dumps({"ids": [found["items"][0]["id"]]})))
    return "I cannot."


def misspoken(messages: list[dict[str, Any]]) -> str:
    """What the protocol forbids: a call without its answer right behind it, an answer without a call."""
    pending: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in pending:
                return f"no call {message['tool_call_id']}"
            pending.remove(message["tool_call_id"])
        elif pending:
            return f"calls without an answer: {pending}"
        pending |= {call["id"] for call in message.get("tool_calls", ())}
    return ""


def slowly(answer: Callable[[dict[str, Any], int], Any]) -> Callable[[dict[str, Any], int], Any]:
    """The same after a moment, so that calls overlap."""

    def later(body: dict[str, Any], number: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def respond(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.02)
            found = answer(body, number)
            return found if isinstance(found, web.StreamResponse) else web.json_response(completion(found))

        return respond

    return later


async def test_sixty_four_episodes_at_once_in_the_shop() -> None:
    env = agentgym.make("shopping-v0", surface="full")
    async with talking(slowly(shop_assistant), concurrency=16) as server:
        runner = Runner(env, server.endpoint, concurrency=64)
        found = await runner.collect(episodes(task_list(env, "test", 0, 64)))
    assert not any(t.failure for t in found)
    advised = [t for t in found if t.labels["intent"] != "bundle"]
    assert len(advised) > 40
    assert all(t.status == "terminated" and len(t.turns) == t.metrics["tool_calls"] == 2 for t in advised)
    assert not any(t.metrics["errors"] or t.metrics["hallucinated"] for t in advised)
    assert all(len(t.turns) > 3 for t in found if t not in advised)
    assert 2 <= server.peak <= 16
    assert runner.counts["retries"] == 0
    assert not any(turn.spans for t in found for turn in t.turns)


async def test_a_broken_endpoint_fails_episodes_of_kind_engine_and_pays_nothing() -> None:
    async with talking(lambda body, n: trouble(401, "no such key")) as server:
        runner = Runner(CountingEnv(), server.endpoint, retries=1)
        found = await runner.collect(episodes(task_list(CountingEnv(), "train", 0, 3)))
    assert [t.status for t in found] == ["failed"] * 3
    assert runner.counts["failed.engine"] == 3
    assert all(t.failure is not None and "401 Unauthorized: no such key" in t.failure.message for t in found)
    assert not any(list(t.rewards) for t in found)


async def command(*words: str) -> tuple[int | None, str, str]:
    code = "import sys; from agentgym.cli import main; sys.exit(main(sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", code, *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "AGENTGYM_API_KEY": "k"},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 40)
    return process.returncode, out.decode(), err.decode()


async def test_the_command_evaluates_an_endpoint() -> None:
    async with serving(shop_assistant) as server:
        code, out, err = await command(
            "eval", "shopping-v0", "--policy", server.url, "--set", "policy.model=mine", "--set", "env.surface=full",
            "--set", "sampling.temperature=0.25", "--episodes", "5", "--json",
        )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["episodes"], found["failures"]) == (5, {})
    assert found["turns"] == len(server.asked) >= 10
    assert found["policy"] == server.url
    assert {(asked["model"], asked["temperature"]) for asked in server.asked} == {("mine", 0.25)}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer k"}


async def test_the_command_says_why_an_endpoint_fails() -> None:
    async with serving(lambda body, n: trouble(401, "no [such] key")) as server:
        code, out, err = await command("eval", "shopping-v0", "--policy", server.url, "--episodes", "2", "--json")
    assert code == 1
    assert json.loads(out)["failures"] == {"engine": 2}
    assert "401 Unauthorized: no [such] key" in " ".join(err.split())
    assert "Traceback" not in err


def test_without_aiohttp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("agentgym_policies.endpoint")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtra, match=r"agentgym-suite\[http\]"):
        registry.load("endpoint", "policies")
