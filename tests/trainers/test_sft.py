"""The warm start: what is copied, and demonstrations whose ids are the engine's own."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
from toys import BanditEnv, register, table

from agentgym.errors import ConfigError, UnknownName
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary, train_bpe
from agentgym.policy import Scripted
from agentgym.types import Action, Episode, Task, ToolCall, iterate
from agentgym_trainers import sft
from agentgym_trainers.config import WarmupConfig, from_table


def test_copies_are_copies() -> None:
    config = WarmupConfig(batch=5, length=(4, 9), copies=3)
    batch = sft.copy_batch(config, list(range(10, 40)), seed=1, step=2)
    assert len(batch.owners) == 5
    for a, b in zip(batch.bounds[:-1], batch.bounds[1:], strict=True):
        ids, n = batch.ids[a:b], (b - a) // 3
        assert 4 <= n <= 9
        assert len(set(ids[:n].tolist())) == n
        assert (ids.reshape(3, n) == ids[:n]).all()
        assert batch.mask[a:b].tolist() == [0.0] * n + [1.0] * (2 * n)
    again = sft.copy_batch(config, list(range(10, 40)), seed=1, step=2)
    assert (again.ids == batch.ids).all()
    other = sft.copy_batch(config, list(range(10, 40)), seed=1, step=3)
    assert other.ids.tolist() != batch.ids.tolist()


def test_demonstrations_have_the_engines_ids() -> None:
    """Prompts, replies and suffixes laid end to end are the rendering of the whole conversation."""
    register()
    env, config = BanditEnv(), from_table(table())
    renderer = Renderer(closed_vocabulary(env.vocabulary()))
    for played in asyncio.run(sft.demonstrate(config, env, 5)):
        shown = sft.with_spans(renderer, played)
        spans = [span for _, span in shown.spans]
        ids = [i for span in spans for part in (span.prompt, span.ids, span.suffix) for i in part]
        said: list[dict[str, str]] = []
        for turn in iterate(played.turns):
            said += [{"role": "user", "content": m.text} for m in turn.observation.messages]
            said += [{"role": "assistant", "content": turn.action.text}]
        assert ids == renderer.encode(renderer.text(said, prompt=False))
        assert all(len(span.ids) == 2 and span.ids[1] == renderer.end_id for span in spans)


def test_tool_calls_are_written_as_the_template_writes_them() -> None:
    renderer = Renderer(train_bpe(["search ask brand"], 300))
    call = Action(text="", tool_calls=(ToolCall(name="search", arguments={"q": "red"}),))
    text, calls = renderer.reply(renderer.ids_of(call))
    assert text == ""
    assert [(c.name, c.arguments) for c in calls] == [("search", {"q": "red"})]


def test_a_mixture_keeps_its_shares_and_is_keyed() -> None:
    names = {name: Scripted(lambda e, a: lambda o: Action()) for name in ("often", "seldom")}
    mixture = sft.Mixture(names, {"often": 3.0, "seldom": 1.0})

    def who(seed: int) -> Any:
        session: Any = mixture.session(Episode(task=Task(env="x"), seed=seed), "agent")
        return session.decide.__code__ is not None

    drawn = Counter(sum(sft.share(seed, 0, "mixture") >= edge for edge in mixture.edges[:-1]) for seed in range(2000))
    assert who(0)
    assert drawn[0] / 2000 == pytest.approx(0.75, abs=0.04)
    with pytest.raises(UnknownName, match="did you mean 'seldom'"):
        sft.Mixture(names, {"seldon": 1.0})
    with pytest.raises(ConfigError, match="above 0"):
        sft.Mixture(names, {})


def test_each_epoch_takes_every_demonstration_once() -> None:
    env, config = BanditEnv(), from_table(table())
    played = asyncio.run(sft.demonstrate(config, env, 10))
    taken = [t.episode.id for step in range(5) for t in sft.batch_of(played, 4, 0, step)]
    assert Counter(taken[:10]) == Counter(taken[10:]) == Counter(t.episode.id for t in played)
    assert taken[:10] != taken[10:]
    assert all((values == 1.0).all() for values in sft.ones(played))
    assert np.mean([t.metrics["success"] for t in played]) < 0.5
