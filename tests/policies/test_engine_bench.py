"""The engine's benchmark: its schedule is the same for everybody, its figures have the promised shape."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from agentgym import registry
from agentgym.errors import ConfigError, EngineFault, UnknownName
from agentgym.modeling import build
from agentgym.modeling.renderer import Conversation, Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import Sampling
from agentgym_policies import bench


def test_every_contestant_samples_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "engine.md"
    monkeypatch.setitem(bench.SIZES, "small", {"hidden": 32, "layers": 1})
    monkeypatch.setitem(bench.SIZES, "large", {"hidden": 32, "layers": 2})
    figures = bench.engine("small,large", sessions=3, turns=2, rounds=2, out=str(out))
    torch.set_num_threads(threads)
    rows = figures["tokens per second"]
    names = ["engine", "engine, no reuse", "generate", "generate + cache"]
    assert [(row["model"], row["contestant"]) for row in rows] == list(product(("small", "large"), names))
    assert rows[0]["parameters"] < rows[-1]["parameters"]
    assert rows[0]["ratio"] == 1.0
    assert all(row["ratio"] > 0 for row in rows)
    assert "| generate + cache |" in out.read_text(encoding="utf-8")
    assert registry.load("engine", "benches") == bench.engine


def test_the_contestants_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, `generate` with and without a cache and the engine say the same in every turn."""
    tokenizer = closed_vocabulary(f"w{i}" for i in range(bench.WORDS))
    model = build.tiny(len(tokenizer), hidden=32, layers=2, init=0.3)
    plan, said = bench.Schedule(4, 3, "drawn", 0), []
    sample = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: sample(**{**options, "do_sample": False, "top_k": None}))
    monkeypatch.setattr(bench, "Sampling", partial(Sampling, temperature=0.0))
    for play in bench.CONTESTANTS.values():
        renderer = bench.Endless(tokenizer)
        conversations: list[Conversation] = []
        monkeypatch.setattr(renderer, "conversation", lambda r=renderer, kept=conversations: _kept(r, kept))
        play(model, renderer, plan)
        said.append([c.ids for c in conversations])
    ours, again, whole, cached = said
    assert ours == again == whole
    assert [ids[: len(kept)] for ids, kept in zip(ours, cached, strict=True)] == cached  # its last end mark is pending
    assert min(map(len, ours)) > plan.replies.sum(1).min()


def _kept(renderer: Renderer, kept: list[Conversation]) -> Conversation:
    kept.append(Conversation(renderer))
    return kept[-1]


def test_the_schedule_is_fixed_by_its_seed() -> None:
    one, same, other = (bench.Schedule(4, 3, "drawn", seed) for seed in (0, 0, 1))
    assert one.prompts == same.prompts
    assert (one.replies == same.replies).all()
    assert (one.replies != other.replies).any()
    assert one.tokens == int(one.replies.sum())
    equal = bench.Schedule(4, 3, "equal", 0)
    assert (equal.replies == equal.replies[0]).all()


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(UnknownName, match="did you mean 'drawn'"):
        bench.engine(lengths="drwan")
    with pytest.raises(UnknownName, match="did you mean '25M'"):
        bench.engine("25MB")
    with pytest.raises(ConfigError, match="at least 1"):
        bench.engine(sessions=0)


def test_what_ends_on_the_other_side_is_said(tmp_path: Path) -> None:
    tokenizer = closed_vocabulary(f"w{i}" for i in range(bench.WORDS))
    model, plan = build.tiny(len(tokenizer), hidden=32, layers=1), bench.Schedule(2, 2, "drawn", 0)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nread line\necho no vllm here >&2\n")
    broken.chmod(0o755)
    there = bench._vllm(str(broken), model, bench.Endless(tokenizer), plan, 1, reuse=True)
    with pytest.raises(EngineFault, match="ended: no vllm here"), there:
        pass


def test_without_reuse_every_turn_computes_its_whole_context() -> None:
    tokenizer = closed_vocabulary(f"w{i}" for i in range(bench.WORDS))
    model, plan = build.tiny(len(tokenizer), hidden=32, layers=1), bench.Schedule(2, 3, "drawn", 0)
    reused = {}
    for reuse in (True, False):
        engine = bench.TorchEngine(model, bench.Endless(tokenizer), slots=2, max_length=plan.length)
        bench.play_sessions(engine, plan, reuse=reuse)
        reused[reuse] = engine.counts["reused"]
    assert reused[True] > 0 == reused[False]
