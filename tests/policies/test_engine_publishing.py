"""The engine beside a learner: weights of its own, publishing in mid-reply, stale caches, how busy it is, its cores."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agentgym.errors import ConfigError
from agentgym.modeling import build, lora
from agentgym.modeling.layers import checkpoint_layers
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.policy import Load, Loaded
from agentgym.types import Episode, Sampling, Task, TokenSpan, VersionRun, WeightsVersion, say
from agentgym_policies.torch_engine import MAX_LENGTH, TorchEngine

TOKENIZER = closed_vocabulary(f"w{i}" for i in range(40))
ATOL = 1e-4
NEW = WeightsVersion(number=1)


class Endless(Renderer):
    """Replies end by their length alone."""

    end_ids = frozenset()


def tiny(seed: int) -> Any:
    return build.tiny(len(TOKENIZER), hidden=32, layers=2, init=0.3, seed=seed)


def serving(model: Any, **options: Any) -> TorchEngine:
    chosen = {"shared": False, "slots": 2, "max_length": 1024, "sampling": Sampling(max_tokens=300), **options}
    return TorchEngine.serving(model, Endless(TOKENIZER), **chosen)


def move(model: Any, seed: int) -> None:
    """What a learner does: the weights change in place."""
    model.load_state_dict(tiny(seed).state_dict())


async def play(who: TorchEngine, seed: int, turns: int = 1) -> list[TokenSpan]:
    async with who.session(Episode(task=Task(env="test"), seed=seed), "agent") as session:
        return [(await session.act(say("w1 w2 w3"))).span for _ in range(turns)]  # type: ignore[misc]


async def sampled(who: TorchEngine, tokens: int) -> None:
    while who.counts["sampled"] < tokens:  # noqa: ASYNC110 - the engine works in another thread
        await asyncio.sleep(0.001)


def gaps(model: Any, spans: Sequence[TokenSpan]) -> NDArray[np.float64]:
    """What is recorded of the last span, less one teacher-forced pass over the whole session: [tokens]."""
    ids = [i for s in spans for i in (*s.prompt, *s.ids, *s.suffix)][: -len(spans[-1].suffix) or None]
    x = torch.tensor([ids])
    with torch.no_grad():
        forced = model(x).logits[0].log_softmax(-1)[:-1].gather(-1, x[0, 1:, None])[:, 0].numpy()
    found: NDArray[np.float64] = np.abs(forced[-len(spans[-1].ids) :] - spans[-1].logprobs.numpy())
    return found


@pytest.mark.parametrize("shared", [True, False])
async def test_a_reply_interrupted_by_new_weights_goes_on_under_them_exactly(shared: bool) -> None:
    model = tiny(0)
    who = serving(model, shared=shared)
    reply = asyncio.create_task(play(who, 1))
    await sampled(who, 3)
    if not shared:
        move(model, 9)  # a learner on its way
        await sampled(who, 20)
    move(model, 1)  # with shared weights nobody may do this while replies are under way, which the figures will say
    await who.publish(NEW)
    (span,) = await reply
    switch = span.versions[1].start
    assert span.versions == (VersionRun(start=0, version=0), VersionRun(start=switch, version=1))
    assert 3 <= switch < 300
    assert not span.stale
    before, after = gaps(tiny(0), [span])[:switch], gaps(tiny(1), [span])[switch:]
    assert after.max() < ATOL
    if not shared:
        assert before.max() < ATOL
    assert gaps(tiny(1), [span])[:switch].max() > 0.1


async def test_what_it_samples_does_not_depend_on_a_learner_that_moves() -> None:
    model = tiny(0)
    who = serving(model)
    expected = await play(serving(tiny(0), shared=True), 5, turns=2)
    move(model, 3)
    assert [s.ids for s in await play(who, 5, turns=2)] == [s.ids for s in expected]
    await who.publish(NEW)
    assert [s.ids for s in await play(who, 5, turns=2)] != [s.ids for s in expected]
    assert gaps(tiny(3), await play(who, 6)).max() < ATOL


async def test_a_copy_of_a_model_with_checkpointed_layers_runs_layers_of_its_own() -> None:
    model = tiny(0)
    checkpoint_layers(model)
    who = serving(model)
    move(model, 1)
    assert gaps(tiny(0), await play(who, 1)).max() < ATOL
    assert not any(p.requires_grad for p in who.model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("frozen", [False, True])
async def test_of_a_model_with_adapters_they_alone_are_copied(frozen: bool) -> None:
    pytest.importorskip("peft", reason="needs the extra [lora]")
    model = tiny(0)
    lora.add(model, lora.Lora(rank=2))
    adapters = [p for p in model.parameters() if p.requires_grad]
    who = serving(model.requires_grad_(False) if frozen else model)  # as in a process that only plays
    own = dict(who.model.named_parameters())
    assert all((own[name] is p) == all(p is not x for x in adapters) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in adapters:
            p.add_(torch.ones_like(p), alpha=0.1)
    assert gaps(tiny(0), await play(who, 1)).max() < ATOL
    await who.publish(NEW)
    spans = await play(who, 1)
    assert gaps(model, spans).max() < ATOL
    assert gaps(tiny(0), spans).max() > 0.01


@pytest.mark.parametrize("deterministic", [False, True])
async def test_kept_caches_of_older_weights_mark_what_was_sampled_on_them(deterministic: bool) -> None:
    model = tiny(0)
    who = serving(model, stale_caches=True, deterministic=deterministic, sampling=Sampling(max_tokens=100))
    async with who.session(Episode(task=Task(env="test"), seed=1), "agent") as idle:
        first = (await idle.act(say("w1 w2"))).span
        running = asyncio.create_task(play(who, 2))
        await sampled(who, 110)
        move(model, 1)
        await who.publish(NEW)
        second = (await idle.act(say("w3"))).span
    (torn,) = await running
    assert first is not None
    assert second is not None
    assert (first.stale, second.stale, torn.stale) == (False, True, True)
    assert [run.version for run in torn.versions] == [0, 1]
    assert second.versions == (VersionRun(start=0, version=1),)
    assert gaps(tiny(1), [first, second]).max() > 0.01  # it attended to what older weights had cached
    fresh = await play(who, 3, turns=2)
    assert not any(s.stale for s in fresh)
    assert gaps(tiny(1), fresh).max() < ATOL


async def test_an_evicted_row_that_is_rebuilt_is_not_stale() -> None:
    model = tiny(0)
    who = serving(model, slots=1, stale_caches=True, sampling=Sampling(max_tokens=5))
    async with who.session(Episode(task=Task(env="test"), seed=1), "agent") as session:
        first = (await session.act(say("w1 w2"))).span
        await play(who, 2)
        move(model, 1)
        await who.publish(NEW)
        second = (await session.act(say("w3"))).span
    assert who.counts["rebuilt"] > 0
    assert second is not None
    assert not second.stale
    assert gaps(tiny(1), [first, second]).max() < ATOL  # type: ignore[list-item]


async def test_two_versions_between_two_tokens_leave_one_run() -> None:
    model = tiny(0)
    who = serving(model, sampling=Sampling(max_tokens=200))
    reply = asyncio.create_task(play(who, 1))
    await sampled(who, 3)
    await asyncio.gather(who.publish(NEW), who.publish(WeightsVersion(number=2)), who.publish(WeightsVersion(number=2)))
    (span,) = await reply
    starts = [run.start for run in span.versions]
    assert starts == sorted(set(starts))
    assert span.versions[-1].version == who.version == 2


async def test_weights_that_do_not_fit_are_an_error_of_publish_and_it_samples_on() -> None:
    model = tiny(0)
    who = serving(model)
    model.lm_head = torch.nn.Linear(32, 3)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        await who.publish(NEW)
    assert len((await play(who, 1))[0].ids) == 300


async def test_it_says_how_busy_it_is() -> None:
    who = serving(tiny(0))
    assert isinstance(who, Loaded)
    assert who.load() == Load(running=0, waiting=0, slots=2, cache=0.0)
    replies = [asyncio.create_task(play(who, n)) for n in range(6)]
    await sampled(who, 1)
    assert who.load() == Load(running=2, waiting=4, slots=2, cache=1.0)
    assert who.load().full
    await asyncio.gather(*replies)
    await who.publish(NEW)  # comes after what the sessions posted when they were left
    assert who.load() == Load(running=0, waiting=0, slots=2, cache=0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned on Linux alone")
async def test_its_thread_is_pinned_and_a_core_that_is_not_there_is_named() -> None:
    core = max(os.sched_getaffinity(0))
    who = serving(tiny(0), threads=1, cores=[core])
    (thread,) = (t for t in threading.enumerate() if t.ident in {x.ident for x in who._thread._threads})
    assert os.sched_getaffinity(thread.native_id or 0) == {core}
    assert os.sched_getaffinity(threading.main_thread().native_id or 0) >= {core}
    assert who._thread.submit(torch.get_num_threads).result() == 1
    with pytest.raises(ConfigError, match="no core 9999; it may use"):
        serving(tiny(0), cores=[9999])


def test_a_length_that_is_not_given_is_that_of_the_class() -> None:
    assert serving(tiny(0), max_length=0).max_length == MAX_LENGTH
