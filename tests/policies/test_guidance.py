"""Guidance in the engines: told actions, hints, and replies that are begun for the model."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web

from agentgym.collate import collate
from agentgym.errors import ConfigError, EngineFault
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer, with_hint
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.rollout import Runner
from agentgym.testing.fakes import CountingEnv
from agentgym.types import (
    Action,
    Episode,
    Guidance,
    Message,
    Observation,
    Sampling,
    Task,
    TokenSpan,
    ToolCall,
    Trajectory,
    Turn,
    Turns,
    say,
)
from agentgym_policies.endpoint import Endpoint
from agentgym_policies.torch_engine import TorchEngine, TorchSession

WORDS = 30
TOKENIZER = closed_vocabulary([f"w{i}" for i in range(WORDS)] + ["hint", "deep"])
RENDERER = Renderer(TOKENIZER)
TASK = Task(env="test")
SEEN = [say("w1 w2 w3"), say("w4 w5"), say("w6"), say("w7 w8 w9 w10")]
BRANCHING = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"  # fmt: skip # noqa: E501


def tiny(thinks: bool = False) -> Any:
    model = build.tiny(len(TOKENIZER), hidden=32, layers=2, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
        if thinks:
            model.lm_head.weight[TOKENIZER.convert_tokens_to_ids("</think>")].add_(0.3)
    return model


MODEL = tiny()


def engine(renderer: Renderer = RENDERER, model: Any = MODEL, **options: Any) -> TorchEngine:
    return TorchEngine(
        model, renderer, **{"slots": 4, "max_length": 256, "sampling": Sampling(max_tokens=8), **options}
    )


def session(who: TorchEngine, seed: int = 1, **guidance: Any) -> TorchSession:
    return who.session(Episode(task=TASK, seed=seed, guidance=Guidance(**guidance) if guidance else None), "agent")


async def play(who: TorchEngine, turns: int = 4, start: tuple[Action, ...] = (), **more: Any) -> list[Action]:
    """The session is told of `start` and acts on the rest; only what it said itself comes back."""
    async with session(who, **more) as s:
        for seen, action in zip(SEEN, start, strict=False):
            await s.tell(seen, action)
        return [await s.act(seen) for seen in SEEN[len(start) : turns]]


def spans(actions: list[Action]) -> list[TokenSpan]:
    return [a.span for a in actions if a.span is not None]


def whole(found: list[TokenSpan]) -> list[int]:
    return [i for s in found for i in (*s.prompt, *s.ids, *s.suffix)]


def forced_gap(found: list[TokenSpan], model: Any = MODEL) -> float:
    """The largest difference between recorded raw log-probs and one teacher-forced pass, branch by branch."""
    branch: list[int] = []
    worst = 0.0
    for s in found:
        branch = (branch if s.parent is None else branch[: s.parent[1]]) + list(s.prompt)
        with torch.no_grad():
            x = torch.tensor([[*branch, *s.ids]])
            scores = model(x).logits[0].log_softmax(-1)[len(branch) - 1 : -1]
        exact = scores.gather(-1, x[0, len(branch) :, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(exact - s.logprobs.numpy()).max(initial=0.0)))
        branch += [*s.ids, *s.suffix]
    return worst


# --- told actions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
async def test_told_its_own_replies_it_goes_on_as_if_it_had_said_them(deterministic: bool) -> None:
    who = engine(deterministic=deterministic)
    plain = await play(who)
    for told in range(1, 4):
        behind = await play(who, start=tuple(plain[:told]))
        assert [s.ids for s in spans(behind)] == [s.ids for s in spans(plain)[told:]]
        assert whole(spans(behind)) == whole(spans(plain))
        assert forced_gap(spans(behind)) < 1e-4
        held = sum(len(s.prompt) + len(s.ids) + len(s.suffix) for s in spans(plain)[:told])
        assert len(spans(behind)[0].prompt) == held + len(spans(plain)[told].prompt)


async def test_a_told_action_without_a_span_is_rendered() -> None:
    (found,) = spans(await play(engine(), turns=2, start=(Action(text="w20 w21"),)))
    expected = RENDERER.start(SEEN[0].messages) + RENDERER.encode("w20 w21") + [RENDERER.end_id]
    assert list(found.prompt) == expected + RENDERER.extend(SEEN[1].messages)
    assert forced_gap([found]) < 1e-4


async def test_tells_between_replies_are_context_of_the_next_span() -> None:
    who = engine()
    async with session(who) as s:
        first = await s.act(SEEN[0])
        await s.tell(SEEN[1], Action(text="w20"))
        await s.tell(SEEN[2], Action(text="w21"))
        last = await s.act(SEEN[3])
    found = spans([first, last])
    assert RENDERER.encode("w20")[0] in found[1].prompt
    assert RENDERER.encode("w21")[0] in found[1].prompt
    assert forced_gap(found) < 1e-4


async def test_a_template_that_rewrites_forks_behind_told_actions_too() -> None:
    renderer, model = Renderer(TOKENIZER, "branch", template=BRANCHING), tiny(thinks=True)
    who = engine(renderer, model)
    async with session(who) as s:
        first = await s.act(SEEN[0])
        await s.tell(SEEN[1], Action(text="w20 </think> w21"))
        await s.tell(SEEN[2], Action(text="w22 </think> w23"))
        last = await s.act(SEEN[3])
        after = await s.act(SEEN[0])
    found = spans([first, last, after])
    assert found[1].parent is not None
    assert forced_gap(found, model) < 1e-4
    turns = tuple(Turn(step=i, observation=say("x"), action=Action(span=s)) for i, s in enumerate(found))
    record = Trajectory(env="t", episode=Episode(task=TASK), turns=Turns(items=turns), status="terminated")
    (batch,) = collate([record], [np.ones(3)], max_tokens=999)
    assert int(batch.mask.sum()) == sum(len(s.ids) for s in found)


async def test_a_session_that_was_left_is_not_told() -> None:
    s = session(engine())
    await s.__aexit__(None, None, None)
    with pytest.raises(EngineFault, match="left"):
        await s.tell(SEEN[0], Action(text="w1"))


async def test_the_runner_and_the_engine_agree_about_a_start() -> None:
    env = CountingEnv(turns=3)
    who = engine(max_length=2048)
    episode = Episode(task=next(env.tasks()), seed=3, guidance=Guidance(start=(Action(text="w1 w2"),)))
    (found,) = await Runner(env, who).collect([episode])
    assert [turn for turn, _ in found.spans] == [1, 2]
    first = next(s for _, s in found.spans)
    words, prompt = RENDERER.encode("w1 w2"), list(first.prompt)
    at = prompt.index(words[0])
    assert prompt[at : at + 2] == words


# --- hints ------------------------------------------------------------------------------------------------------


def test_a_hint_stands_where_templates_take_it() -> None:
    asked = (Message(role="system", content="s"), Message(role="user", content="u"))
    assert with_hint(asked, "h") == (asked[0], Message(role="user", content="u\n\nh"))
    answered = (Message(role="tool", content="t"),)
    assert with_hint(answered, "h") == (*answered, Message(role="user", content="h"))


async def test_a_hint_is_in_the_first_prompt_and_only_there() -> None:
    plain, hinted = spans(await play(engine())), spans(await play(engine(), hint="hint deep"))
    hint = RENDERER.encode("hint")[0]
    assert [hint in s.prompt for s in hinted] == [True, False, False, False]
    assert [s.context for s in hinted] == ["hinted", *["original"] * 3]
    assert hinted[0].unhinted == plain[0].prompt
    assert not any(s.unhinted for s in hinted[1:])
    assert forced_gap(hinted) < 1e-4


async def test_a_hint_behind_told_actions_is_taken_out_alone() -> None:
    start = (Action(text="w20"), Action(text="w21"))
    plain = spans(await play(engine(), start=start))
    hinted = spans(await play(engine(), start=start, hint="hint"))
    assert hinted[0].unhinted == plain[0].prompt
    assert len(hinted[0].prompt) == len(plain[0].prompt) + 1


async def test_told_what_it_said_behind_a_hint_it_reads_the_hint_there() -> None:
    said = await play(engine(), hint="hint")
    behind = await play(engine(), start=tuple(said[:2]), hint="hint")
    assert whole(spans(behind)) == whole(spans(said))
    bare = [list(spans(said)[0].unhinted), *[[*s.prompt] for s in spans(said)[1:]]]
    told = [i for prompt, s in zip(bare, spans(said)[:2], strict=False) for i in (*prompt, *s.ids, *s.suffix)]
    assert list(spans(behind)[0].unhinted) == told + bare[2]


async def test_a_branching_template_keeps_hints_apart() -> None:
    renderer, model = Renderer(TOKENIZER, "branch", template=BRANCHING), tiny(thinks=True)
    found = spans(await play(engine(renderer, model), hint="hint"))
    assert found[-1].branch > 0
    assert forced_gap(found, model) < 1e-4
    turns = tuple(Turn(step=i, observation=say("x"), action=Action(span=s)) for i, s in enumerate(found))
    episode = Episode(task=TASK, guidance=Guidance(hint="hint", context="original"))
    record = Trajectory(env="t", episode=episode, turns=Turns(items=turns), status="terminated")
    hint = renderer.encode("hint")[0]
    sampled = record.replace(episode=Episode(task=TASK))
    kept, removed = (collate([t], [np.ones(4)], max_tokens=999)[0] for t in (sampled, record))
    assert hint in kept.ids
    assert hint not in removed.ids
    assert len(kept.ids) - len(removed.ids) == len(kept.bounds) - 1  # one word in each branch


# --- a reply that is begun --------------------------------------------------------------------------------------


async def test_a_begun_reply_is_recorded_as_what_was_decided() -> None:
    begin = "w3 w4"
    found = spans(await play(engine(), begin=begin, share=0.5))
    first = found[0]
    assert list(first.ids[:2]) == RENDERER.encode(begin)
    assert first.sampled_logprobs[0] == pytest.approx(math.log(0.5))
    assert first.sampled_logprobs[1] == 0.0
    np.testing.assert_array_equal(first.sampled_logprobs.numpy()[2:], first.logprobs.numpy()[2:])
    assert forced_gap(found) < 1e-4
    assert not any(s.sampled_logprobs for s in found[1:])
    assert first.versions[0].start == 0


async def test_a_begun_reply_in_a_crowd_leaves_the_others_alone() -> None:

    who = engine()
    alone = spans(await play(engine(), turns=2, seed=5))
    crowd = await asyncio.gather(play(who, turns=2, begin="w3", share=0.5), play(who, turns=2, seed=5))
    assert [s.ids for s in spans(crowd[1])] == [s.ids for s in alone]


async def test_a_beginning_that_ends_the_reply_and_a_share_that_is_none() -> None:
    (first,) = spans(await play(engine(), turns=1, begin="w3<|im_end|>", share=1.0))
    assert (list(first.ids), first.finish) == ([*RENDERER.encode("w3"), RENDERER.end_id], "stop")
    with pytest.raises(ConfigError, match=r"guidance.share is the probability .* got 0.0"):
        session(engine(), begin="w3", share=0.0)


# --- endpoints --------------------------------------------------------------------------------------------------


@pytest.mark.network
async def test_an_endpoint_reads_told_replies_as_its_own_and_the_hint_once() -> None:
    asked: list[Any] = []

    async def serve(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response({"choices": [{"message": {"content": "yes"}}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    who = Endpoint(f"http://127.0.0.1:{port}", model="m")
    episode = Episode(task=TASK, guidance=Guidance(hint="look"))
    async with who.session(episode, "agent") as s:
        await s.tell(say("one"), Action(tool_calls=(ToolCall(name="find"),)))
        await s.act(Observation(messages=(Message(role="tool", content="two", tool_call_id="call_0_0"),)))
        await s.act(say("three"))
    await who.aclose()
    await runner.cleanup()
    assert [m["role"] for m in asked[1]["messages"]] == ["user", "assistant", "tool", "user", "assistant", "user"]
    assert [m["content"] for m in asked[1]["messages"] if m["role"] == "user"] == ["one", "look", "three"]
    assert asked[0]["messages"] == asked[1]["messages"][:4]
    with pytest.raises(ConfigError, match="cannot begin its reply with '</think>'"):
        who.session(Episode(task=TASK, guidance=Guidance(begin="</think>")), "agent")
