"""vLLM, embedded and as a server: records against teacher forcing, caches, weights that change, ends of all kinds.

Runs in an environment of its own (`make test-vllm`), on the CPU build. Both engines go through the same tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from agentgym import make, registry
from agentgym.errors import ConfigError, EngineFault
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.policy import Loaded, Policy, Publishes
from agentgym.testing import check_policy
from agentgym.types import Action, Episode, Guidance, Sampling, Task, TokenSpan, WeightsVersion, say
from agentgym_policies.sampling import processed_logprobs
from agentgym_policies.vllm_base import WORKER, Vllm, VllmSession
from agentgym_policies.vllm_engine import VllmEngine
from agentgym_policies.vllm_server import VllmServer

SHOP = make("shopping-v0", surface="compact")
RENDERER = Renderer(closed_vocabulary([*SHOP.vocabulary(), *(f"w{i}" for i in range(30))]))
TASK = Task(env="test")
SEEN = [say("w1 w2 w3 w4 w5 " * 8), say("w4 w5"), say("w6 w7 " * 5), say("w8")]
ATOL = 1e-4
SERVING = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
OPTIONS: dict[str, Any] = {"slots": 8, "max_length": 512, "seed": 3}


def tiny(seed: int = 0) -> Any:
    """Far from uniform, so that what is cached matters, and in no hurry to end a reply."""
    model = build.tiny(len(RENDERER.tokenizer), hidden=128, layers=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def moved(model: Any, seed: int) -> Any:
    """The same module with other weights, norms included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a `vllm serve` process with other weights than the client will bring."""
    folder = tmp_path_factory.mktemp("server")
    build.save(tiny(seed=9), RENDERER.tokenizer, folder / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        "--port": port, "--host": "127.0.0.1", "--max-model-len": 512, "--max-num-seqs": 8, "--block-size": 32,
        "--logprobs-mode": "processed_logprobs", "--worker-extension-cls": WORKER, "--generation-config": "vllm",
        "--dtype": "float32",
        "--kv-cache-memory-bytes": 2**30,
    }  # fmt: skip
    # `vllm serve` itself asks for a distribution named vllm, which the CPU build is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += [str(word) for flag in flags.items() for word in flag] + [
        "--enforce-eager",
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
    ]
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **SERVING})
    try:
        url = f"http://127.0.0.1:{port}"
        _answers(url, process, log)
        yield url
    finally:
        family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(family, timeout=10)
        for member in left:
            member.kill()


def _answers(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 480) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"no server: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module", params=["vllm", "vllm-server"])
def who(request: pytest.FixtureRequest) -> Iterator[Vllm]:
    """The engine of a run, as the trainer makes it; its module is its `model`."""
    kind = registry.load(request.param, "policies").__self__
    where = {"enforce_eager": True, "threads": 1}
    if request.param == "vllm-server":
        where = {"url": request.getfixturevalue("server")}
    engine = kind.serving(tiny(), RENDERER, shared=False, sampling=Sampling(max_tokens=24), **OPTIONS, **where)
    try:
        yield engine
    finally:
        engine.close()


def session(who: Vllm, member: int = 0, **guidance: Any) -> VllmSession:
    return who.session(Episode(task=TASK, member=member, guidance=Guidance(**guidance) if guidance else None), "agent")


async def play(who: Vllm, sampling: Sampling | None = None, turns: int = 4, **more: Any) -> list[Action]:
    async with session(who, **more) as s:
        return [await s.act(seen, sampling) for seen in SEEN[:turns]]


async def sampling(who: Vllm) -> None:
    """Until a reply is under way."""
    while not who.load().running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def spans(actions: list[Action]) -> list[TokenSpan]:
    return [a.span for a in actions if a.span is not None]


def scores(found: list[TokenSpan], model: Any) -> list[torch.Tensor]:
    """[N, V] raw log-probs at every sampled token of each span, by one teacher-forced pass."""
    branch: list[int] = []
    said = []
    for span in found:
        branch += span.prompt
        with torch.no_grad():
            logits = model(torch.tensor([[*branch, *span.ids]])).logits[0]
        said.append(logits.log_softmax(-1)[len(branch) - 1 : -1])
        branch += [*span.ids, *span.suffix]
    return said


def of(logprobs: torch.Tensor, ids: Any) -> torch.Tensor:
    return logprobs.gather(-1, torch.tensor(list(ids))[:, None])[:, 0]


def gap(found: list[TokenSpan], model: Any) -> float:
    """The largest difference between recorded and teacher-forced log-probs, raw and as drawn."""
    worst = 0.0
    for span, raw in zip(found, scores(found, model), strict=True):
        assert span.sampling is not None
        drawn = processed_logprobs(raw, [span.sampling] * len(raw))
        held = span.sampled_logprobs if len(span.sampled_logprobs) else span.logprobs
        worst = max(worst, float((of(raw, span.ids) - torch.tensor(list(span.logprobs))).abs().max()))
        worst = max(worst, float((of(drawn, span.ids) - torch.tensor(list(held))).abs().max()))
    return worst


@pytest.mark.parametrize(
    "how",
    [
        Sampling(max_tokens=24),
        Sampling(max_tokens=24, temperature=0.6),
        Sampling(max_tokens=24, temperature=1.3, top_k=7, top_p=0.9),
        Sampling(max_tokens=24, temperature=0.0),
    ],
    ids=["plain", "temperature", "cut", "greedy"],
)
async def test_both_log_probs_equal_teacher_forcing(who: Vllm, how: Sampling) -> None:
    found = spans(await play(who, how))
    assert sum(len(span.ids) for span in found) > 20
    assert gap(found, who.model) < ATOL


async def test_a_batch_of_different_samplings_keeps_them_apart(who: Vllm) -> None:
    kinds = [Sampling(max_tokens=16, temperature=t, top_k=k) for t in (0.0, 0.7, 1.0) for k in (0, 5)]
    found = await asyncio.gather(*(play(who, s, turns=2, member=m) for m, s in enumerate(kinds)))
    assert [spans(actions)[0].sampling for actions in found] == kinds
    assert max(gap(spans(actions), who.model) for actions in found) < ATOL


async def test_later_turns_find_earlier_ones_in_the_prefix_cache(who: Vllm) -> None:
    before = who.counts
    found = spans(await play(who, member=41))
    counts = who.counts - before
    whole = sum(len(s.prompt) + len(s.ids) + len(s.suffix) for s in found)
    assert counts["sampled"] == sum(len(s.ids) for s in found)
    assert counts["reused"] >= 3 * 32  # three turns behind a first prompt of more than one block
    assert counts["prefilled"] < whole
    contexts = [sum(len(s.prompt) + len(s.ids) + len(s.suffix) for s in found[:t]) for t in range(4)]
    assert counts["prefilled"] + counts["reused"] == sum(
        c + len(s.prompt) for c, s in zip(contexts, found, strict=True)
    )


async def test_noise_depends_on_the_key_of_the_episode(who: Vllm) -> None:
    first, again, other = [spans(await play(who, member=m, turns=2)) for m in (1, 1, 2)]
    assert [s.ids for s in first] == [s.ids for s in again]
    assert [s.ids for s in first] != [s.ids for s in other]


async def test_a_forced_beginning_is_scored_and_not_drawn(who: Vllm) -> None:
    (span,) = spans(await play(who, turns=1, begin="w3 w9", share=0.25))
    begun = RENDERER.encode("w3 w9")
    assert list(span.ids[: len(begun)]) == begun
    assert list(span.sampled_logprobs[: len(begun)]) == pytest.approx([math.log(0.25), *[0.0] * (len(begun) - 1)])
    (raw,) = scores([span], who.model)
    assert (of(raw, span.ids) - torch.tensor(list(span.logprobs))).abs().max() < ATOL
    assert span.versions[0].start == 0
    short = Sampling(max_tokens=len(begun))
    (full,) = spans(await play(who, short, turns=1, begin="w3 w9"))
    assert (list(full.ids), full.finish, len(full.logprobs)) == (begun, "length", len(begun))


async def test_a_stop_string_ends_the_reply_and_stays_in_it(who: Vllm) -> None:
    (plain,) = spans(await play(who, turns=1, member=5))
    word = RENDERER.decode([plain.ids[3]]).strip()
    (span,) = spans(await play(who, Sampling(max_tokens=24, stop=(word,)), turns=1, member=5))
    assert span.finish == "stop"
    assert span.ids == plain.ids[: list(plain.ids).index(plain.ids[3]) + 1]


async def test_an_end_mark_ends_a_reply_and_a_full_context_is_an_outcome(who: Vllm) -> None:
    async with session(who) as s:
        while (action := await s.act(say("w1"), Sampling(max_tokens=200))).span.ids:
            span = action.span
            assert (span.finish == "stop") == (span.ids[-1] in RENDERER.end_ids)
            assert len(s.conversation.ids) <= 512 + 1
    assert action.span.finish == "length"


async def test_cancelling_a_reply_aborts_it_and_tears_its_session(who: Vllm) -> None:
    async with session(who) as s:
        act = asyncio.create_task(s.act(say("w1"), Sampling(max_tokens=450)))
        await sampling(who)
        act.cancel()
        with pytest.raises(asyncio.CancelledError):
            await act
        assert who.load().running == 0
        with pytest.raises(EngineFault, match="lost a reply"):
            await s.act(say("w1"))
    assert spans(await play(who, turns=1))[0].ids


async def test_publishing_replaces_the_weights_and_drops_the_caches(who: Vllm) -> None:
    before = spans(await play(who, member=7))
    old = copy.deepcopy(who.model)
    moved(who.model, seed=1)
    await who.publish(WeightsVersion(number=who.version + 1))
    reused = who.counts["reused"]
    after = spans(await play(who, member=7, turns=1))
    assert who.counts["reused"] == reused
    assert {run.version for s in after for run in s.versions} == {who.version}
    assert gap(after, who.model) < ATOL < gap(before, who.model)
    assert gap(before, old) < ATOL


async def test_weights_that_change_in_mid_reply_are_recorded_token_by_token(who: Vllm) -> None:
    first, old = who.version, copy.deepcopy(who.model)
    long = Sampling(max_tokens=400)
    asked = [asyncio.create_task(play(who, long, turns=1, member=m)) for m in range(60, 66)]
    await sampling(who)
    await asyncio.sleep(0.15)
    moved(who.model, seed=2)
    await who.publish(WeightsVersion(number=first + 1))
    found = [spans(actions)[0] for actions in await asyncio.gather(*asked)]
    changed = [span for span in found if len(span.versions) == 2]
    assert changed, "every reply was over before the weights changed"
    for span in changed:
        assert [run.version for run in span.versions] == [first, first + 1]
        at = span.versions[1].start
        assert 0 < at < len(span.ids)
        raw = [of(scores([span], model)[0], span.ids) for model in (old, who.model)]
        held = torch.tensor(list(span.logprobs))
        assert (torch.cat([raw[0][:at], raw[1][at:]]) - held).abs().max() < ATOL
        assert (raw[1][:at] - held[:at]).abs().max() > 10 * ATOL


async def test_one_run_conforms_to_what_every_policy_must_hold(who: Vllm) -> None:
    assert all(isinstance(who, door) for door in (Policy, Publishes, Loaded))
    report = await asyncio.to_thread(check_policy, who, SHOP, episodes=2, deterministic=False)
    report.raise_for_failures()
    assert report["spans"].status == report["released"].status == "passed"


async def test_sleep_is_refused_where_there_is_no_gpu(who: Vllm) -> None:
    with pytest.raises(ConfigError, match="cannot sleep"):
        await who.sleep()
    assert spans(await play(who, turns=1))[0].ids


@pytest.mark.parametrize("kind", [VllmEngine, VllmServer])
@pytest.mark.parametrize("promise", [{"deterministic": True}, {"stale_caches": True}])
def test_what_vllm_does_not_promise_is_refused(kind: Any, promise: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine = 'torch'"):
        kind.serving(tiny(), RENDERER, shared=False, **OPTIONS, **promise)


def test_a_server_that_is_not_there_or_not_vllm_is_named(tmp_path: Path) -> None:
    build.save(tiny(), RENDERER.tokenizer, tmp_path / "model")
    with pytest.raises(EngineFault, match=r"127\.0\.0\.1:9"):
        VllmServer.from_checkpoint(tmp_path / "model", url="http://127.0.0.1:9")


def test_an_argument_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    build.save(tiny(), RENDERER.tokenizer, tmp_path / "model")
    with pytest.raises(ConfigError, match="enforce_eagre"):
        VllmEngine.from_checkpoint(tmp_path / "model", enforce_eagre=True)


@pytest.mark.parametrize("who", ["vllm"], indirect=True)
async def test_a_fresh_engine_with_new_weights_says_the_same_and_a_dead_one_is_noticed(
    who: Vllm, tmp_path: Path
) -> None:
    """An engine for evaluation, from the folder that the moved weights were saved to."""
    build.save(who.model, RENDERER.tokenizer, tmp_path / "model")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    fresh = await asyncio.to_thread(
        VllmEngine.from_checkpoint, tmp_path / "model", enforce_eager=True, threads=1, cores=(0,), **OPTIONS
    )
    family = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    try:
        pair = [spans(await play(engine, Sampling(max_tokens=24), member=9)) for engine in (who, fresh)]
        assert [s.ids for s in pair[0]] == [s.ids for s in pair[1]]
        for live, new in zip(*pair, strict=True):
            assert torch.allclose(torch.tensor(list(live.logprobs)), torch.tensor(list(new.logprobs)), atol=1e-5)
        with pytest.raises(ConfigError, match="serving"):
            await fresh.publish(WeightsVersion(number=1))
        core = fresh._llm.engine_core.resources.engine_manager.processes[0]
        waiting = asyncio.create_task(play(fresh, Sampling(max_tokens=400), turns=1))
        await sampling(fresh)
        os.kill(core.pid, signal.SIGKILL)
        with pytest.raises(EngineFault, match="EngineDead"):
            await waiting
        with pytest.raises(EngineFault):
            await play(fresh, turns=1)
    finally:
        await asyncio.to_thread(fresh.close)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not os.path.exists(fresh.folder.name)  # noqa: ASYNC240
    with pytest.raises(EngineFault, match="closed"):
        await play(fresh, turns=1)
