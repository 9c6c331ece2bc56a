"""Endpoints that return token ids: exact records of chat and completions, and every way in which they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from agentgym import seeding
from agentgym.collate import collate
from agentgym.errors import ConfigError, EngineFault, ModelError, RecordError, UnknownName
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.testing import check_policy
from agentgym.testing.fakes import CountingEnv
from agentgym.types import (
    AGENT,
    Action,
    Episode,
    Guidance,
    Observation,
    Sampling,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    say,
)
from agentgym_policies.endpoint import Endpoint
from agentgym_policies.endpoint.completions import Completions
from agentgym_policies.endpoint.spans import common

WORDS = [f"w{i}" for i in range(30)]
TOKENIZER = closed_vocabulary([*WORDS, "hint", *(str(n) for n in range(10))])
APPENDING = Renderer(TOKENIZER)
FORGETTING = Renderer(
    TOKENIZER,
    template="{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.split('</think>')[-1] if m.role =="
    " 'assistant' and not loop.last else m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>"
    "assistant {% endif %}",
)
"""Its template drops the thinking of earlier turns."""
EPISODE = Episode(task=Task(env="test"), seed=5)
SEEN = [say("w1 w2 w3"), say("w4"), say("w5 w6"), say("w7")]
Change = Callable[[dict[str, Any]], Any]


class Sampler:
    """A server of the protocol that renders, draws and reports tokens as vLLM does, without a model.

    `drawn` holds what it read and drew in each call; `change` may spoil an answer, or be a (status, body) in its place.
    """

    def __init__(self, renderer: Renderer = APPENDING, length: int = 10_000, change: Change = lambda answer: answer):
        self.renderer, self.length, self.change = renderer, length, change
        self.asked: list[dict[str, Any]] = []
        self.drawn: list[tuple[list[int], list[int], list[float]]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.asked.append(body)
        found = self.change(self.answer(body))
        status, data = found if isinstance(found, tuple) else (200, found)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(data).encode()})

    def answer(self, body: dict[str, Any]) -> Any:
        chat = "messages" in body
        prompt = self.renderer.encode(self.renderer.text(body["messages"], prompt=True)) if chat else body["prompt"]
        if len(prompt) >= self.length:
            limit = f"This model's maximum context length is {self.length} tokens. However, your prompt contains more."
            return 400, {"error": {"message": limit, "type": "BadRequestError", "code": 400}}
        rng = seeding.rng(body["seed"], str(prompt))
        words = ["<think>", rng.choice(WORDS), "</think>", *rng.choices(WORDS, k=rng.randint(1, 5))]
        ids = [*self.renderer.encode(" ".join(words)), self.renderer.end_id][: body["max_tokens"]]
        logprobs = [-rng.random() for _ in ids]
        self.drawn.append((prompt, ids, logprobs))
        ended = ids[-1] == self.renderer.end_id
        choice: dict[str, Any] = {"finish_reason": "stop" if ended else "length", "token_ids": ids}
        text = self.renderer.decode(ids[:-1] if ended else ids)
        if chat:
            choice |= {"message": {"role": "assistant", "content": text}}
            choice |= {"logprobs": {"content": [{"token": "?", "logprob": x} for x in logprobs]}}
            return {"choices": [choice], "prompt_token_ids": prompt}
        return {
            "choices": [choice | {"text": text, "logprobs": {"token_logprobs": logprobs}, "prompt_token_ids": prompt}]
        }


async def play(who: Endpoint | Completions, seen: list[Observation] = SEEN, episode: Episode = EPISODE) -> list[Action]:
    try:
        async with who.session(episode, AGENT) as session:
            return [await session.act(each) for each in seen]
    finally:
        await who.aclose()


def chat(app: Sampler, **options: Any) -> Endpoint:
    return Endpoint(app=app, **{"model": "m", "sampling": Sampling(max_tokens=16), "retries": 0, **options})


def completions(app: Sampler, renderer: Renderer = APPENDING, **options: Any) -> Completions:
    return Completions(
        "http://app",
        renderer,
        **{"app": app, "model": "m", "sampling": Sampling(max_tokens=16), "retries": 0, **options},
    )


def spans(actions: list[Action]) -> list[TokenSpan]:
    return [action.span for action in actions if action.span is not None]


def sequences(actions: list[Action]) -> list[list[int]]:
    """Token sequences as a learner reads them, in the order of their branches."""
    turns = tuple(Turn(step=i, agent=AGENT, observation=SEEN[i], action=a) for i, a in enumerate(actions))
    trajectory = Trajectory(env="test", episode=EPISODE, turns=Turns(items=turns), status="terminated")
    (batch,) = collate([trajectory], [np.ones(len(turns))], max_tokens=10_000)
    found = [slice(a, b) for a, b in zip(batch.bounds, batch.bounds[1:], strict=False)]
    return [batch.ids[s].tolist() for s in sorted(found, key=lambda s: batch.turns[s].max())]


# --- chat -------------------------------------------------------------------------------------------------------


async def test_a_chat_records_exactly_what_the_server_read_and_drew() -> None:
    app = Sampler()
    who = chat(app)
    assert who.trainable is None
    actions = await play(who)
    assert who.trainable is True
    found = spans(actions)
    assert [(list(s.ids), s.finish) for s in found] == [(ids, "stop") for _, ids, _ in app.drawn]
    for span, (_, _, logprobs) in zip(found, app.drawn, strict=True):
        np.testing.assert_allclose(span.logprobs.numpy(), logprobs, rtol=1e-6)
    last, drawn, _ = app.drawn[-1]
    assert sequences(actions) == [last + drawn], "one branch: the whole conversation, as the server read it"
    assert [(s.branch, s.parent) for s in found] == [(0, None)] * 4
    assert all(len(s.prompt) < 12 for s in found[1:]), "only what is new"


async def test_where_the_servers_template_rewrites_history_a_branch_forks() -> None:
    app = Sampler(FORGETTING)
    actions = await play(chat(app))
    assert [s.branch for s in spans(actions)] == [0, 1, 2, 3]
    assert sequences(actions) == [prompt + ids for prompt, ids, _ in app.drawn]
    for span, (prompt, _, _) in zip(spans(actions)[1:], app.drawn[1:], strict=True):
        assert span.parent is not None
        assert list(span.prompt) == prompt[span.parent[1] :] != prompt


async def test_a_reply_cut_by_its_length_goes_on_with_the_end_mark_of_the_template() -> None:
    app = Sampler()
    actions = await play(chat(app, sampling=Sampling(max_tokens=3)))
    assert [s.finish for s in spans(actions)] == ["length"] * 4
    assert sequences(actions) == [app.drawn[-1][0] + app.drawn[-1][1]]


@pytest.mark.parametrize(
    ("one", "other", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 3], 1)]
)
def test_the_longest_common_prefix(one: list[int], other: list[int], length: int) -> None:
    assert common(one, other) == length


async def test_it_asks_for_raw_log_probs_whatever_the_server_defaults_to() -> None:
    app = Sampler()
    await play(chat(app), SEEN[:1])
    (asked,) = app.asked
    assert (asked["logprobs"], asked["return_token_ids"]) == (True, True)
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 1.0, -1, 0.0)
    assert asked["repetition_penalty"] == 1.0


def without(*path: str) -> Change:
    """Answers that lack a field."""

    def drop(answer: dict[str, Any]) -> Any:
        at: Any = answer
        for name in path[:-1]:
            at = at[name][0] if name == "choices" else at[name]
        del at[path[-1]]
        return answer

    return drop


LACKING = [("prompt_token_ids",), ("choices", "token_ids"), ("choices", "logprobs")]


@pytest.mark.parametrize("path", LACKING)
async def test_a_server_without_token_ids_is_for_evaluation_only(path: tuple[str, ...]) -> None:
    app = Sampler(change=without(*path))
    who = chat(app)
    assert not spans(await play(who))
    assert who.trainable is False
    assert path[-1] in who.refusal
    assert ["return_token_ids" in asked for asked in app.asked] == [True, False, False, False]
    strict = chat(Sampler(change=without(*path)), tokens="require")
    with pytest.raises(RecordError, match=rf"holds no .*{path[-1]}.* a vLLM server gives it .*tokens='off'"):
        await play(strict)


async def test_a_server_that_refuses_to_be_asked_is_asked_plainly() -> None:
    def picky(answer: dict[str, Any]) -> Any:
        if "return_token_ids" in app.asked[-1]:
            return 400, {"error": {"message": "Unrecognized request argument supplied: return_token_ids"}}
        return answer

    app = Sampler(change=picky)
    who = chat(app)
    actions = await play(who)
    assert all(action.text for action in actions)
    assert (who.trainable, len(app.asked)) == (False, 5)
    assert "Unrecognized request argument" in who.refusal
    with pytest.raises(EngineFault, match="Unrecognized request argument"):
        await play(chat(app, tokens="require"))


async def test_tokens_drawn_from_another_distribution_are_not_taken_for_raw_ones() -> None:
    warm = Sampling(temperature=0.5, max_tokens=8)
    app = Sampler()
    who = chat(app, sampling=warm)
    assert not spans(await play(who))
    assert (who.trainable, "return_token_ids" in app.asked[0]) == (None, False)
    for strict in (chat(app, sampling=warm, tokens="require"), completions(app, sampling=warm)):
        with pytest.raises(RecordError, match=r"needs temperature 1, .*temperature=0\.5"):
            await play(strict)


def test_another_way_to_record_is_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'require'"):
        chat(Sampler(), tokens="required")


@pytest.mark.parametrize(("context", "recorded"), [("sampled", ["hinted", "original"]), ("original", [])])
async def test_behind_a_hint_only_what_is_trained_as_sampled_is_recorded(context: Any, recorded: list[str]) -> None:
    hinted = EPISODE.replace(guidance=Guidance(hint="hint", context=context))
    assert [s.context for s in spans(await play(chat(Sampler()), SEEN[:2], hinted))] == recorded
    if not recorded:
        with pytest.raises(ConfigError, match=r"without the hint; set strategy\.context = 'sampled'"):
            chat(Sampler(), tokens="require").session(hinted, AGENT)


# --- completions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["require", "auto"])
async def test_completions_render_here_and_record_the_servers_ids(tokens: Any) -> None:
    app = Sampler()
    actions = await play(completions(app, tokens=tokens))
    assert sequences(actions) == [app.drawn[-1][0] + app.drawn[-1][1]]
    assert [list(s.ids) for s in spans(actions)] == [ids for _, ids, _ in app.drawn]
    assert app.drawn[0][0] == APPENDING.start(SEEN[0].messages)
    assert app.asked[0]["stop_token_ids"] == sorted(APPENDING.end_ids)
    assert len({asked["seed"] for asked in app.asked}) == 4


async def test_completions_without_ids_are_text_for_evaluation_or_refused() -> None:
    broken = without("choices", "token_ids")
    with pytest.raises(RecordError, match=r"holds no choices\[0\]\.token_ids"):
        await play(completions(Sampler(change=broken)))
    for tokens in ("off", "auto"):
        app = Sampler(change=broken)
        actions = await play(completions(app, tokens=tokens))
        assert not spans(actions)
        assert [a.text for a in actions] == [APPENDING.decode(ids[:-1]) for _, ids, _ in app.drawn]
        assert app.drawn[1][0] == app.drawn[0][0] + app.drawn[0][1] + APPENDING.extend(SEEN[1].messages)


async def test_a_server_that_read_other_ids_is_a_fault() -> None:
    def padded(answer: dict[str, Any]) -> Any:
        answer["choices"][0]["prompt_token_ids"].insert(0, 1)
        return answer

    with pytest.raises(EngineFault, match="read other token ids than it was sent"):
        await play(completions(Sampler(change=padded)))


def test_a_beginning_is_refused_where_its_log_probs_would_be_missing() -> None:
    with pytest.raises(ConfigError, match="do not say how probable 'w3' was"):
        completions(Sampler()).session(EPISODE.replace(guidance=Guidance(begin="w3")), AGENT)


# --- both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [chat, completions])
async def test_a_full_context_is_an_empty_reply_and_a_first_one_an_error(make: Any) -> None:
    actions = await play(make(Sampler(length=30)))
    *said, last = spans(actions)
    assert said[0].finish == "stop"
    assert (actions[-1].text, len(last.ids), last.finish) == ("", 0, "length")
    with pytest.raises(ModelError, match="the first prompt does not fit: This model's maximum context length is 3"):
        await play(make(Sampler(length=3)))
    bare = await play(make(Sampler(length=30), tokens="off"))
    assert bare[-1] == Action()


@pytest.mark.parametrize("make", [chat, completions])
async def test_another_refusal_is_a_fault(make: Any) -> None:
    with pytest.raises(EngineFault, match=r"answered 400 .*: no such thing"):
        await play(make(Sampler(change=lambda answer: (400, {"error": "no such thing"}))))


@pytest.mark.parametrize("make", [chat, completions])
async def test_a_reply_that_the_server_broke_off_is_tried_again(make: Any) -> None:
    def broken(answer: dict[str, Any]) -> Any:
        if len(app.asked) == 1:
            answer["choices"][0]["finish_reason"] = "abort"
        return answer

    app = Sampler(change=broken)
    who = make(app, retries=1)
    assert len(spans(await play(who))) == 4
    assert who.usage.troubles == {"aborted": 1}


@pytest.mark.parametrize("make", [chat, completions])
def test_they_keep_the_rules_of_policies(make: Any) -> None:
    report = check_policy(make(Sampler(), model="m"), CountingEnv(), deterministic=True)
    report.raise_for_failures()
    assert report["spans"].status == "passed"
