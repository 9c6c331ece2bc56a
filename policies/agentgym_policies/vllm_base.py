"""What vLLM in this process and vLLM as a server have in common: token ids in, ids and both log-probs out.

One background thread with an event loop of its own talks to vLLM, so sessions of any event loop may use the engine.
Prompts go out as ids, whole; vLLM's prefix cache finds what it has seen of them.

New weights are one file that vLLM's workers read between two steps. Replies under way are frozen, their caches
dropped, and they go on under the new weights; vLLM says which version sampled which token, and that is recorded.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors.torch import save_file

from agentgym.errors import AgentGymError, ConfigError, EngineFault
from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.policy import Load
from agentgym.types import Episode, Sampling, VersionRun, WeightsVersion
from agentgym_policies.sampling import check
from agentgym_policies.sessions import Call, Reply, TokenSession

WORKER = "agentgym_policies.vllm_worker.Worker"
MEMORY = Path("/dev/shm")
"""Where a weights file costs no disk."""

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Completion:
    """What vLLM answers: sampled ids, log-probs as drawn and raw, versions by the tokens they begin at.

    `prompt` are raw log-probs of prompt tokens, where they were asked for; `cached` counts prompt tokens not computed.
    """

    ids: list[int]
    drawn: list[float]
    raw: list[float]
    versions: list[tuple[int, int]]
    finish: str
    cached: int = 0
    prompt: list[float] = field(default_factory=list)


class Vllm(ABC):
    """A policy on vLLM, and its weights' way there; see the module.

    `seed` enters every reply's own seed with (episode.seed, episode.member, agent, turn). vLLM's numbers depend on who
    shares a batch: the same seed gives nearly the same log-probs and so, nearly always, the same ids; no more.
    Log-probs: `sampled_logprobs` are of the distribution drawn from and `logprobs` raw, both as computed while
    sampling. Stop strings end a reply at the token that completes them. `begin` costs a pass over the whole prompt.
    """

    version = 0

    def __init__(
        self,
        renderer: Renderer,
        *,
        model: Any = None,
        slots: int,
        max_length: int,
        sampling: Sampling | None,
        seed: int,
        folder: str = "",
    ) -> None:
        self.renderer, self.model, self.slots, self.max_length, self.seed = renderer, model, slots, max_length, seed
        self.sampling = check(sampling or Sampling())
        memory = MEMORY if os.access(MEMORY, os.W_OK) else None
        self.folder = tempfile.TemporaryDirectory(prefix="agentgym-vllm-", dir=folder or memory)
        self._counts: Counter[str] = Counter()
        self._calls: dict[int, int] = {}  # tokens of the contexts under way
        self._thread = LoopThread("agentgym-vllm")
        try:
            self._thread.wait(self._ready())
        except BaseException as error:
            self.close()
            if isinstance(error, AgentGymError) or not isinstance(error, Exception):
                raise
            raise EngineFault(f"vLLM does not serve: {type(error).__name__}: {error}") from error

    async def _ready(self) -> None:
        """Serving version 0, asked once: what this device cannot run fails here and not in an episode."""
        await self._start()
        modes = {said["mode"] for said in await self._rpc("report_both_logprobs")}
        if modes != {"processed_logprobs"}:
            raise ConfigError(f"this vLLM reports {', '.join(modes)}: start it with logprobs_mode = processed_logprobs")
        once = Call(context=[self.renderer.end_id], keep=0, sampling=Sampling(), key=0, room=1)
        await self._complete(once.context, self._parameters(once, 0))

    @abstractmethod
    async def _start(self) -> None:
        """Reach vLLM; it then serves version 0."""

    @abstractmethod
    async def _complete(self, ids: list[int], parameters: dict[str, Any]) -> Completion:
        """One request; cancelled, it is aborted."""

    @abstractmethod
    async def _take(self, path: str, version: int) -> None:
        """Freeze replies, have the workers read the weights at `path`, drop caches, go on."""

    @abstractmethod
    async def _rpc(self, method: str, *args: str) -> list[Any]:
        """What a method of `vllm_worker.Worker` answers on every worker."""

    @abstractmethod
    async def _sleep(self, asleep: bool) -> None:
        """Give memory back, or take it again."""

    @abstractmethod
    async def _stop(self) -> None:
        """Let go of vLLM."""

    @property
    def counts(self) -> Counter[str]:
        """Since the start: tokens sampled, prefilled, reused (found in the prefix cache)."""
        return self._counts.copy()

    def load(self) -> Load:
        """`cache` estimates: tokens of the contexts under way by tokens of the cache."""
        calls = list(self._calls.values())
        running = min(len(calls), self.slots)
        share = min(sum(calls) / self._capacity, 1.0) if self._capacity else 0.0
        return Load(running=running, waiting=len(calls) - running, slots=self.slots, cache=share)

    _capacity = 0
    """Tokens that the cache holds; 0 where that is not known."""

    def session(self, episode: Episode, agent: str) -> VllmSession:
        return VllmSession(self, episode, agent)

    async def publish(self, version: WeightsVersion) -> None:
        """Take over what the module holds now. Replies under way go on with it."""
        if self.model is None:
            raise ConfigError("this engine was made from a folder and has no module to take weights from; use serving")
        await self._guarded(self._publish(version.number))
        self.version = version.number

    async def _publish(self, number: int) -> None:
        path = await asyncio.to_thread(self._write)
        try:
            await self._take(str(path), number)
        finally:
            path.unlink(missing_ok=True)

    def _write(self) -> Path:
        """The module's weights as one file that the workers can read."""
        path = Path(self.folder.name) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in build.weights(self.model)}, path)
        return path

    async def sleep(self) -> None:
        """Give the device's memory back until `wake`; the weights wait in main memory. `ConfigError` where vLLM
        cannot: on a CPU, or where it was started without `enable_sleep_mode`."""
        if not all(said["sleep"] for said in await self._guarded(self._rpc("can_sleep"))):
            raise ConfigError("this vLLM cannot sleep: that takes a GPU and enable_sleep_mode = true")
        await self._guarded(self._sleep(True))

    async def wake(self) -> None:
        await self._guarded(self._sleep(False))

    def close(self) -> None:
        """Stop. Replies under way end as an `EngineFault`."""
        try:
            self._thread.close(self._stop)
        finally:
            self.folder.cleanup()

    async def _guarded(self, work: Coroutine[Any, Any, T]) -> T:
        """Work in vLLM's thread; whatever fails there is an `EngineFault`."""
        try:
            return await self._thread.run(work)
        except AgentGymError:
            raise
        except Exception as error:
            raise EngineFault(f"vLLM failed: {type(error).__name__}: {error}") from error

    async def _sample(self, call: Call) -> Reply:
        self._calls[id(call)] = len(call.context)
        try:
            return await self._guarded(self._reply(call))
        finally:
            del self._calls[id(call)]

    async def _reply(self, call: Call) -> Reply:
        begin = self._forced(call)
        found = await self._complete([*call.context, *begin], self._parameters(call, len(begin)))
        finish = _FINISH.get(found.finish)
        if finish is None:
            raise EngineFault(f"vLLM broke off its reply (finish_reason {found.finish!r})")
        if begin and (len(begin) == call.room or begin[-1] in self.renderer.end_ids):
            finish = "stop" if begin[-1] in self.renderer.end_ids else "length"
            found.ids, found.drawn, found.raw = [], [], []
        self._counts["sampled"] += len(found.ids)
        self._counts["reused"] += found.cached
        self._counts["prefilled"] += len(call.context) + len(begin) - found.cached
        greedy = call.sampling.temperature == 0
        said = [call.said, *[0.0] * (len(begin) - 1)] if begin else []
        return Reply(
            ids=[*begin, *found.ids],
            logprobs=[*found.prompt[len(found.prompt) - len(begin) :], *found.raw],
            processed=[*said, *([0.0] * len(found.ids) if greedy else found.drawn)],
            versions=[VersionRun(start=start and start + len(begin), version=v) for start, v in found.versions],
            finish=finish,
        )

    def _forced(self, call: Call) -> tuple[int, ...]:
        """The beginning, as far as there is room and no end mark in it."""
        begin = call.begin[: call.room]
        end = next((at for at, token in enumerate(begin, 1) if token in self.renderer.end_ids), len(begin))
        return begin[:end]

    def _parameters(self, call: Call, begun: int) -> dict[str, Any]:
        """vLLM's sampling parameters."""
        s = call.sampling
        stop = {"stop": list(s.stop), "include_stop_str_in_output": True} if s.stop else {}
        return {
            "max_tokens": max(call.room - begun, 1),
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "seed": call.key % 2**63,
            "stop_token_ids": sorted(self.renderer.end_ids),
            "ignore_eos": True,
            "logprobs": 2,  # as drawn, and raw: see vllm_worker.BothLogprobs
            "prompt_logprobs": 0 if begun else None,
            "detokenize": bool(s.stop),
            "skip_special_tokens": False,
            **stop,
        }


_FINISH: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}


class VllmSession(TokenSession[Vllm]):
    """A session; vLLM holds nothing for it but what its prefix cache chooses to keep."""

    async def sample(self, call: Call) -> Reply:
        return await self.engine._sample(call)

    def release(self) -> None:
        """Nothing is leased."""


class LoopThread:
    """A daemon thread with an event loop of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.closed = False
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Block until the work is done there."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work done there; a cancelled wait cancels the work."""
        if self.closed:
            work.close()
            raise _closed()
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))
        except asyncio.CancelledError:
            here = asyncio.current_task()
            if self.closed and here is not None and not here.cancelling():
                raise _closed() from None
            raise

    def close(self, last: Any) -> None:
        """Cancel what is under way, await `last()`, end the thread."""
        if self.closed:
            return
        self.closed = True
        try:
            self.wait(self._wind_up(last))
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def _wind_up(self, last: Any) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        try:
            await last()
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)


def _closed() -> EngineFault:
    return EngineFault("this engine is closed; make a new one")


def refuse(deterministic: bool, stale_caches: bool) -> None:
    """`ConfigError` for what vLLM does not promise."""
    if deterministic:
        raise ConfigError(
            "vLLM does not repeat a run bit by bit (its numbers depend on who shares a batch): set run.deterministic ="
            " false, or rollout.engine = 'torch'"
        )
    if stale_caches:
        raise ConfigError(
            "vLLM does not say which weights filled a cache, so what read stale ones could not be marked: set"
            " rollout.stale_caches = false, or rollout.engine = 'torch'"
        )
