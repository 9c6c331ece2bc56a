"""The torch engine: records against teacher forcing, eviction, determinism, cancellation, limits, publishing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from agentgym import registry
from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.policy import Policy, Publishes
from agentgym.testing import check_policy
from agentgym.testing.fakes import CountingEnv
from agentgym.types import (
    Action,
    Array,
    Episode,
    Guidance,
    Observation,
    Sampling,
    Task,
    TokenSpan,
    VersionRun,
    WeightsVersion,
    say,
)
from agentgym_policies import slots
from agentgym_policies.torch_engine import TorchEngine

WORDS = 40
TOKENIZER = closed_vocabulary(f"w{i}" for i in range(WORDS))
RENDERER = Renderer(TOKENIZER)
TASK = Task(env="test")
ATOL = 1e-4


def tiny(seed: int = 0) -> Any:
    model = build.tiny(len(TOKENIZER), hidden=32, layers=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # far from uniform, so that what is cached matters
    return model


MODEL = tiny()


def engine(model: Any = MODEL, **options: Any) -> TorchEngine:
    return TorchEngine(
        model, RENDERER, **{"slots": 4, "max_length": 256, "sampling": Sampling(max_tokens=12), **options}
    )


def words(session: int, turn: int) -> Observation:
    rng = np.random.default_rng((session, turn))
    return say(" ".join(f"w{i}" for i in rng.integers(0, WORDS, rng.integers(2, 14))))


async def play(who: TorchEngine, number: int, turns: int, pause: float = 0, **fields: Any) -> list[TokenSpan]:
    """One session; while it pauses between turns it is idle and may be evicted."""
    spans = []
    async with who.session(Episode(task=TASK, seed=number, **fields), "agent") as session:
        for turn in range(turns):
            await asyncio.sleep(pause if turn else 0)
            action = await session.act(words(number, turn))
            assert action.span is not None
            spans.append(action.span)
    return spans


async def play_all(
    who: TorchEngine, numbers: Sequence[int], turns: int, pause: float = 0
) -> dict[int, list[TokenSpan]]:
    return dict(zip(numbers, await asyncio.gather(*(play(who, n, turns, pause) for n in numbers)), strict=True))


async def sampled(who: TorchEngine, tokens: int) -> None:
    """Wait until the engine has sampled so many."""
    while who.counts["sampled"] < tokens:  # noqa: ASYNC110 - the engine works in another thread
        await asyncio.sleep(0.005)


def gap(model: Any, spans: Sequence[TokenSpan]) -> float:
    """The largest difference between recorded log-probs and one teacher-forced pass over the whole session."""
    ids = [i for s in spans for i in (*s.prompt, *s.ids, *s.suffix)]
    parts = [(np.full(len(s.prompt), np.nan), s.logprobs.numpy(), np.full(len(s.suffix), np.nan)) for s in spans]
    recorded = np.concatenate([x for part in parts for x in part])
    x = torch.tensor([ids])
    with torch.no_grad():
        full = model(x).logits[0].log_softmax(-1)
    forced = full[:-1].gather(-1, x[0, 1:, None])[:, 0].numpy()
    return float(np.nanmax(np.abs(forced - recorded[1:])))


def test_it_is_a_policy_and_is_in_the_catalogue() -> None:
    assert isinstance(engine(), Policy)
    assert isinstance(engine(), Publishes)
    assert registry.load("torch", "policies") == TorchEngine.from_checkpoint


@pytest.mark.parametrize("deterministic", [False, True])
async def test_logprobs_equal_teacher_forcing_over_turns_and_eviction(deterministic: bool) -> None:
    who = engine(slots=3, deterministic=deterministic)
    played = await play_all(who, range(8), 4, pause=0.02)
    assert max(gap(MODEL, spans) for spans in played.values()) < ATOL
    assert who.counts["evicted"] > 0
    assert (who.counts["rebuilt"] > 0) is not deterministic  # evicted caches are kept as copies there
    assert who.counts["sampled"] == sum(len(s.ids) for spans in played.values() for s in spans)
    assert {s.finish for spans in played.values() for s in spans} == {"stop", "length"}
    for spans in played.values():
        assert [len(s.suffix) for s in spans] == [0 if s.finish == "stop" else 1 for s in spans]
    await who.publish(WeightsVersion(number=0))  # what was posted before it is done
    assert who.free_slots == 3


async def test_1024_sessions_on_64_slots_sample_and_record_what_1024_slots_do() -> None:
    few = engine(slots=64, max_length=96, sampling=Sampling(max_tokens=4))
    many = engine(slots=1024, max_length=96, sampling=Sampling(max_tokens=4))
    a, b = await play_all(few, range(1024), 2), await play_all(many, range(1024), 2)
    assert few.counts["evicted"] > 500
    assert many.counts["evicted"] == 0
    same = [n for n in a if [s.ids for s in a[n]] == [s.ids for s in b[n]]]
    assert len(same) >= 1020  # a draw within float error of a boundary may fall on the other side
    for n in same:
        for one, other in zip(a[n], b[n], strict=True):
            np.testing.assert_allclose(one.logprobs.numpy(), other.logprobs.numpy(), atol=ATOL)
    await few.publish(WeightsVersion(number=0))
    assert few.free_slots == 64


async def test_deterministic_mode_is_bit_identical_in_any_order_of_arrival() -> None:
    crowd, shuffled = range(9), np.random.default_rng(3).permutation(9).tolist()
    straight, mixed, lonely = (engine(slots=4, deterministic=True, max_length=192) for _ in range(3))
    expected = await play_all(straight, crowd, 3, pause=0.02)
    assert await play_all(mixed, shuffled, 3) == expected
    assert {n: await play(lonely, n, 3) for n in crowd} == expected
    assert (straight.counts["evicted"] > 0, lonely.counts["evicted"]) == (True, 0)


async def test_noise_depends_on_seed_member_and_turn_alone() -> None:
    first = await play(engine(), 1, 3)
    assert [s.ids for s in await play(engine(), 1, 3)] == [s.ids for s in first]
    assert [s.ids for s in await play(engine(), 1, 3, member=1)] != [s.ids for s in first]
    assert [s.ids for s in await play(engine(seed=1), 1, 3)] != [s.ids for s in first]
    crowd = await play_all(engine(slots=12), range(12), 3)
    assert [s.ids for s in crowd[1]] == [s.ids for s in first]


async def test_processed_logprobs_are_kept_beside_raw_ones() -> None:
    who = engine(sampling=Sampling(temperature=0.5, top_k=3, top_p=0.9, max_tokens=12))
    spans = await play(who, 2, 3)
    assert gap(MODEL, spans) < ATOL
    for span in spans:
        assert len(span.sampled_logprobs) == len(span.ids)
        assert (span.sampled_logprobs.numpy() >= np.log(1 / 3) * 12).all()
        assert span.sampled_logprobs != span.logprobs
    assert all(not s.sampled_logprobs for s in await play(engine(), 2, 1))


async def test_greedy_takes_the_most_likely_token() -> None:
    spans = await play(engine(sampling=Sampling(temperature=0.0, max_tokens=8)), 3, 1)
    ids = [*spans[0].prompt]
    for token, processed in zip(spans[0].ids, spans[0].sampled_logprobs, strict=True):
        with torch.no_grad():
            assert token == int(MODEL(torch.tensor([ids])).logits[0, -1].argmax())
        assert processed == 0
        ids.append(token)


async def test_stop_strings_end_a_reply_and_stay_in_it() -> None:
    free = Sampling(max_tokens=30)
    async with engine().session(Episode(task=TASK, seed=5), "agent") as session:
        text = (await session.act(words(5, 0), free)).text
    stop = " ".join(text.split()[2:4])
    async with engine().session(Episode(task=TASK, seed=5), "agent") as session:
        action = await session.act(words(5, 0), Sampling(max_tokens=30, stop=("absent", stop)))
    assert action.text == " ".join(text.split()[:4])
    assert action.span is not None
    assert (action.span.finish, len(action.span.suffix)) == ("stop", 1)


async def test_cancellation_in_mid_generation_releases_the_slot() -> None:
    who = engine(slots=2, max_length=4096, sampling=Sampling(max_tokens=3500))
    no_end = Renderer(TOKENIZER)
    no_end.end_ids = frozenset()
    endless = TorchEngine(MODEL, no_end, slots=2, max_length=4096, sampling=Sampling(max_tokens=4000))
    sessions = [asyncio.create_task(play(endless, n, 1)) for n in range(5)]
    await sampled(endless, 6)
    assert endless.free_slots == 0
    for task in sessions:
        task.cancel()
    gathered = await asyncio.gather(*sessions, return_exceptions=True)
    assert all(isinstance(r, asyncio.CancelledError) for r in gathered)
    await endless.publish(WeightsVersion(number=1))  # comes after what was posted before it
    assert endless.free_slots == 2
    assert endless.counts["sampled"] < 4000
    assert (await play(who, 1, 1))[0].ids


async def test_a_torn_session_does_not_go_on() -> None:
    who = engine(sampling=Sampling(max_tokens=200))
    async with who.session(Episode(task=TASK), "agent") as session:
        reply = asyncio.create_task(session.act(words(0, 0)))
        await asyncio.sleep(0)
        reply.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reply
        with pytest.raises(EngineFault, match="open a new one"):
            await session.act(words(0, 1))


async def test_a_full_context_is_an_outcome_and_a_first_prompt_too_long_an_error() -> None:
    who = engine(max_length=40, sampling=Sampling(max_tokens=30))
    spans = await play(who, 7, 6)
    assert [s.finish for s in spans[-2:]] == ["length", "length"]
    assert not spans[-1].ids
    sampled_at = np.cumsum([len(s.prompt) + len(s.ids) + len(s.suffix) for s in spans if s.ids])
    assert sampled_at[-1] <= 40 + 1
    with pytest.raises(ModelError, match="first prompt has 65 tokens, max_length is 40"):
        async with who.session(Episode(task=TASK), "agent") as session:
            await session.act(say(" ".join(["w1"] * 60)))


async def test_publishing_bumps_the_version_and_rebuilds_from_new_weights() -> None:
    model = tiny(1)
    who = engine(model)
    async with who.session(Episode(task=TASK, seed=4), "agent") as session:
        first = (await session.act(words(4, 0))).span
        other = tiny(2)
        model.load_state_dict(other.state_dict())
        await who.publish(WeightsVersion(number=7))
        second = (await session.act(words(4, 1))).span
    assert who.version == 7
    assert (first.versions, second.versions) == ((VersionRun(start=0, version=0),), (VersionRun(start=0, version=7),))
    context = first.replace(logprobs=first.logprobs)
    with torch.no_grad():
        x = torch.tensor([[*context.prompt, *context.ids, *context.suffix, *second.prompt, *second.ids]])
        forced = other(x).logits[0].log_softmax(-1)[:-1].gather(-1, x[0, 1:, None])[:, 0]
    np.testing.assert_allclose(forced[-len(second.ids) :].numpy(), second.logprobs.numpy(), atol=ATOL)


async def test_publishing_in_mid_reply_records_both_versions() -> None:
    no_end = Renderer(TOKENIZER)
    no_end.end_ids = frozenset()
    who = TorchEngine(tiny(3), no_end, slots=2, max_length=512, sampling=Sampling(max_tokens=300))
    reply = asyncio.create_task(play(who, 1, 1))
    await sampled(who, 3)
    await who.publish(WeightsVersion(number=1))
    (span,) = await reply
    assert [run.version for run in span.versions] == [0, 1]
    assert 0 < span.versions[1].start < 300
    assert gap(who.model, [span]) < ATOL


async def test_an_engine_failure_is_a_fault_for_all_and_the_engine_lives_on() -> None:
    model = tiny(4)
    who = engine(model)
    broken = model.model.layers[0].register_forward_pre_hook(_out_of_memory)
    results = await asyncio.gather(*(play(who, n, 1) for n in range(3)), return_exceptions=True)
    broken.remove()
    assert all(isinstance(r, EngineFault) and "MemoryError: none left" in str(r) for r in results)
    assert gap(model, await play(who, 1, 3)) < ATOL
    await who.publish(WeightsVersion(number=0))
    assert who.free_slots == 4


def _out_of_memory(*_: object) -> None:
    raise MemoryError("none left")


def other(cls: Any, config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return cls(config(**{**sizes, **more})).eval()


@pytest.mark.parametrize(
    ("model", "store"),
    [
        (other(LlamaForCausalLM, LlamaConfig), "SlotStore"),
        (other(MistralForCausalLM, MistralConfig, sliding_window=8), "SlotStore"),
        (other(Gemma2ForCausalLM, Gemma2Config, sliding_window=8, head_dim=8), "RowStore"),
    ],
    ids=["llama", "sliding window", "sliding window and capped scores"],
)
async def test_other_families_record_exactly_through_a_checkpoint(model: Any, store: str, tmp_path: Path) -> None:
    path = build.save(model, TOKENIZER, tmp_path / "model")
    who = TorchEngine.from_checkpoint(path, slots=2, max_length=128, sampling=Sampling(max_tokens=10))
    assert type(who._batcher.store).__name__ == store
    played = await play_all(who, range(5), 3, pause=0.05)
    assert who.counts["evicted"] > 0
    assert max(gap(model, spans) for spans in played.values()) < ATOL


async def test_branching_keeps_what_is_shared() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"  # fmt: skip # noqa: E501
    model, renderer = tiny(5), Renderer(TOKENIZER, "branch", template=template)
    thought = TOKENIZER.convert_tokens_to_ids("</think>")
    with torch.no_grad():
        model.lm_head.weight[thought].add_(0.3)
    who = TorchEngine(model, renderer, slots=2, max_length=256, sampling=Sampling(max_tokens=12))
    spans = await play(who, 3, 4)
    branch: list[int] = []
    for span in spans:
        if span.parent is not None:
            branch = branch[: span.parent[1]]
        branch += span.prompt
        with torch.no_grad():
            x = torch.tensor([[*branch, *span.ids]])
            forced = model(x).logits[0].log_softmax(-1)[len(branch) - 1 : -1].gather(-1, x[0, len(branch) :, None])
        np.testing.assert_allclose(forced[:, 0].numpy(), span.logprobs.numpy(), atol=ATOL)
        branch += [*span.ids, *span.suffix]
    assert spans[-1].branch > 0


async def test_a_turn_without_room_leaves_no_cache_of_what_was_rewritten_in_it() -> None:
    """The template shows the last message alone: the third begins as the second does, and not as the first."""
    last = "{% for m in messages[-1:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template = last + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    who = TorchEngine(MODEL, Renderer(TOKENIZER, "branch", template=template), slots=1, max_length=64)
    async with who.session(Episode(task=TASK), "agent") as session:
        for text in ("w1 w2 " * 8, "w3 w4 " * 40, "w3 w4 " * 8):
            span = (await session.act(say(text), Sampling(max_tokens=6))).span
            assert span is not None
            assert bool(span.ids) is (len(text) < 100)
        ids = session.conversation.ids[: -len(span.suffix) or None]
    with torch.no_grad():
        forced = MODEL(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    np.testing.assert_allclose(span.logprobs.numpy(), forced[-len(span.ids) :].numpy(), atol=ATOL)


async def test_bad_settings_are_named() -> None:
    with pytest.raises(ModelError, match="max_length 9999 is beyond the 4096 positions"):
        engine(max_length=9999)
    with pytest.raises(ConfigError, match="at least 1 slot"):
        engine(slots=0)
    with pytest.raises(ConfigError, match="top_p"):
        engine(sampling=Sampling(top_p=0.0))
    async with engine().session(Episode(task=TASK), "agent") as session:
        with pytest.raises(ModelError, match="array observation"):
            await session.act(Observation(array=Array.of([1.0])))


async def test_tool_calls_are_parsed_from_the_reply() -> None:
    async with engine().session(Episode(task=TASK), "agent") as session:
        action = await session.act(words(0, 0))
    assert isinstance(action, Action)
    assert action.span is not None
    assert action.text == RENDERER.reply(list(action.span.ids))[0]


def test_event_loops_come_and_go_and_a_closed_engine_says_so() -> None:
    who = engine()
    first = asyncio.run(play(who, 1, 2))
    assert asyncio.run(play(who, 1, 2)) == first
    who.close()
    with pytest.raises(EngineFault, match="engine is closed"):
        asyncio.run(play(who, 1, 1))


@pytest.mark.parametrize("restart", [False, True])
def test_the_slow_store_reproduces_the_plain_forward_pass(restart: bool) -> None:
    assert slots._probe(MODEL, slots.RowStore(MODEL, restart=restart)) < ATOL


def test_a_store_that_departs_from_the_model_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(6)
    assert isinstance(slots.store_for(model, 2, 64), slots.SlotStore)
    monkeypatch.setattr(slots.PrefillLayout, "attend", lambda self, q, k, v, *_: v.transpose(1, 2).repeat(1, 1, 2, 1))
    assert isinstance(slots.store_for(model, 2, 64), slots.RowStore)
    monkeypatch.setattr(slots.RowStore, "_advance", lambda self, row: torch.zeros(len(TOKENIZER)))
    with pytest.raises(ModelError, match="no cache of Qwen3ForCausalLM reproduces its own forward pass"):
        slots.store_for(model, 2, 64)


def test_prompts_longer_than_a_pass_are_prefilled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PREFILL_TOKENS", 7)
    played = asyncio.run(play_all(engine(slots=3), range(4), 3))
    assert max(gap(MODEL, spans) for spans in played.values()) < ATOL


def test_it_passes_the_suite_of_policies() -> None:
    report = check_policy(
        engine(max_length=2048, deterministic=True, sampling=Sampling(max_tokens=3)), CountingEnv(), episodes=2
    )
    report.raise_for_failures()
    assert [check.name for check in report.checks if check.status != "passed"] == ["closes"]  # it has close() only


async def test_spans_say_which_tokens_are_thought_call_and_answer() -> None:
    thought = " <think> w1 </think>"
    async with engine().session(Episode(task=TASK, guidance=Guidance(begin=thought)), "agent") as session:
        span = (await session.act(words(0, 0))).span
    assert span is not None
    think, *_, last = span.segments
    assert (think.label, think.start, think.stop) == ("think", 0, 3)
    assert (last.label, last.stop) == ("answer", len(span.ids))
    assert span.segments == RENDERER.segments_of(list(span.ids))
