"""`TorchEngine`: any causal language model in hub format as a policy, with exact token records.

    engine = TorchEngine.from_checkpoint("path/to/model", slots=64)
    async with engine.session(episode, agent) as session:
        action = await session.act(observation)          # action.span holds ids and log-probs

All torch work happens in one engine thread. Event loops hand it jobs through an inbox and get their answers in one
wake-up per step. The weights are the given module's own, which a learner may move while nothing is being sampled; or,
with a `source`, a copy of it, and the learner may move the source at any time but during `publish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling import build, lora
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.renderer import History, Renderer
from agentgym.modeling.threads import pin
from agentgym.policy import Load
from agentgym.types import Episode, Sampling, WeightsVersion
from agentgym_policies.batching import Batcher, Job
from agentgym_policies.sampling import check
from agentgym_policies.sessions import Call, Reply, TokenSession
from agentgym_policies.slots import Row, store_for

MAX_LENGTH = 1024
"""Tokens of a session, unless the engine is told otherwise."""


class TorchEngine:
    """Continuous batching over `slots` leased cache rows of `max_length` tokens each; see the module.

    `seed` enters every draw together with (episode.seed, episode.member, agent, turn). `deterministic` gives each pass
    a shape that depends on one session's history alone, and keeps evicted caches as copies: the same seed gives the
    same ids and log-probs bit for bit on one machine, thread count and set of versions, in whatever order sessions
    arrive. `threads` sets torch's threads in the engine thread, `cores` where they run. The model is kept in eval mode:
    what is sampled under dropout could not be recorded exactly. `publish` copies the weights of `source`, a module of
    the same shape. `stale_caches` keeps caches of older weights: replies sampled on them are marked `stale`.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        slots: int = 64,
        max_length: int = MAX_LENGTH,
        sampling: Sampling | None = None,
        seed: int = 0,
        version: int = 0,
        deterministic: bool = False,
        threads: int | None = None,
        cores: Sequence[int] = (),
        source: Any = None,
        stale_caches: bool = False,
    ) -> None:
        _check_sizes(model, slots, max_length)
        self.model, self.renderer, self.max_length, self.seed = model, renderer, max_length, seed
        self.sampling = check(sampling or Sampling())
        self.deterministic, self.stale_caches, self._source = deterministic, stale_caches, source
        model.eval()
        store = store_for(model, slots, max_length, deterministic=deterministic)
        self._batcher = Batcher(store, slots, renderer.end_ids, renderer.decode, exact=deterministic, version=version)
        self._inbox: deque[Callable[[], None]] = deque()
        self._done: list[Job] = []  # touched by the engine thread alone
        self._gathered: dict[asyncio.AbstractEventLoop, list[Job]] = {}  # touched by each loop for itself
        self._lock = threading.Lock()
        self._asked = 0
        self._pumping = self._closed = False
        self._thread = ThreadPoolExecutor(1, "agentgym-engine")
        self._thread.submit(pin, threads, cores).result()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        history: History = "append",
        template: str | None = None,
        **options: Any,
    ) -> Self:
        """An engine for a local folder in hub format; `options` are those of the class."""
        renderer = Renderer(tokenizers.load(path), history, template=template)
        return cls(build.load(path, device=device, dtype=dtype), renderer, **options)

    @classmethod
    def serving(
        cls,
        model: Any,
        renderer: Renderer,
        *,
        shared: bool,
        slots: int = 64,
        max_length: int = 0,
        sampling: Sampling | None = None,
        seed: int = 0,
        deterministic: bool = False,
        threads: int | None = None,
        cores: Sequence[int] = (),
        stale_caches: bool = False,
    ) -> Self:
        """The engine of a training run: it samples with `model` itself where that is `shared`, else with a copy (of the
        adapters alone where it has some), into which `publish` writes the weights that `model` has by then."""
        return cls(
            model if shared else lora.twin(model).requires_grad_(False),
            renderer,
            slots=slots,
            max_length=max_length or MAX_LENGTH,
            sampling=sampling,
            seed=seed,
            deterministic=deterministic,
            threads=threads,
            cores=cores,
            source=None if shared else model,
            stale_caches=stale_caches,
        )

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @property
    def version(self) -> int:
        """Of the weights at work."""
        return self._batcher.version

    @property
    def counts(self) -> Counter[str]:
        """Since the start: tokens sampled, prefilled, reused, rebuilt; passes; evictions."""
        return self._batcher.counts.copy()

    @property
    def free_slots(self) -> int:
        return len(self._batcher.free)

    def load(self) -> Load:
        """Replies being sampled and waiting, and the share of the slots that sessions hold; from any thread."""
        running, slots = len(self._batcher.running), self._batcher.slots
        return Load(
            running=running,
            waiting=max(0, self._asked - running),
            slots=slots,
            cache=1 - self.free_slots / slots,
        )

    def session(self, episode: Episode, agent: str) -> TorchSession:
        return TorchSession(self, episode, agent)

    async def publish(self, version: WeightsVersion) -> None:
        """Take over the weights of the shared module, or of the source, between two steps of the replies under way.

        Nobody may move them until this returns. Replies go on under the new version, which their spans say from there.
        """
        done: Future[None] = Future()
        self._post(lambda: self._swap(version.number, done))
        await asyncio.wrap_future(done)

    def _swap(self, version: int, done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            if self._source is not None:
                _copy_weights(self._source, self.model)
            self._batcher.publish(version, keep_caches=self.stale_caches)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)

    def close(self) -> None:
        """End the engine thread once it is idle. An engine that is dropped closes itself."""
        with self._lock:
            self._closed = True
        self._thread.shutdown(wait=True)

    def _post(self, command: Callable[[], None]) -> None:
        """Hand a command to the engine thread, and wake it if it sleeps."""
        with self._lock:
            if self._closed:
                raise EngineFault("this engine is closed; make a new one")
            self._inbox.append(command)
            if not self._pumping:
                self._thread.submit(self._pump)
                self._pumping = True

    def _pump(self) -> None:
        """The engine thread at work, until there is none left."""
        self.model.eval()
        while True:
            with self._lock:
                commands = list(self._inbox)
                self._inbox.clear()
                self._pumping = bool(commands) or self._batcher.busy
            if not self._pumping:
                return
            try:
                for command in commands:
                    command()
                self._batcher.step()
            except Exception as error:
                self._batcher.fail(error)
            self._deliver()

    def _deliver(self) -> None:
        """Wake each event loop once for all of its replies that ended."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for job in self._done:
            by_loop.setdefault(job.ticket.get_loop(), []).append(job)
        self._done.clear()
        for loop, jobs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has closed, and nobody waits any more
                loop.call_soon_threadsafe(_settle, jobs)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over together what one pass of the event loop asked for, so that it shares its prefill and its steps."""
        jobs = self._gathered.pop(loop)
        try:
            self._post(lambda: self._submit(jobs))
        except EngineFault as error:
            for job in jobs:
                job.error = error
            _settle(jobs)

    def _submit(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._batcher.submit(job)

    async def _sample(self, job: Job) -> Job:
        """Wait for a reply; a cancelled wait cancels the reply."""
        loop = asyncio.get_running_loop()
        job.ticket = loop.create_future()
        gathered = self._gathered.setdefault(loop, [])
        if not gathered:
            loop.call_soon(self._flush, loop)
        gathered.append(job)
        self._count(1)
        try:
            await job.ticket
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        finally:
            self._count(-1)
        if job.error is not None:
            raise EngineFault(f"the engine failed: {type(job.error).__name__}: {job.error}") from job.error
        return job

    def _count(self, asked: int) -> None:
        with self._lock:
            self._asked += asked


@torch.no_grad()
def _copy_weights(source: Any, target: Any) -> None:
    """Parameters and buffers, in place; the modules have the same shape."""
    for tensors in (torch.nn.Module.parameters, torch.nn.Module.buffers):
        for mine, theirs in zip(tensors(target), tensors(source), strict=True):
            mine.copy_(theirs)


def _check_sizes(model: Any, slots: int, max_length: int) -> None:
    if slots < 1 or max_length < 2:
        raise ConfigError(f"an engine needs at least 1 slot and 2 tokens of length; got {slots} and {max_length}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ModelError(f"max_length {max_length} is beyond the {limit} positions of this model; lower max_length")


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _settle(jobs: Iterable[Job]) -> None:
    for job in jobs:
        _resolve(job.ticket)


class TorchSession(TokenSession[TorchEngine]):
    """A session with a cache row, which leaving it releases."""

    def __init__(self, engine: TorchEngine, episode: Episode, agent: str) -> None:
        super().__init__(engine, episode, agent)
        self._row = Row()

    async def sample(self, call: Call) -> Reply:
        job = await self.engine._sample(
            Job(
                row=self._row,
                context=call.context,
                keep=call.keep,
                sampling=call.sampling,
                key=call.key,
                room=call.room,
                finished=self.engine._done.append,
                begin=call.begin,
                said=call.said,
            )
        )
        return Reply(
            ids=job.ids,
            logprobs=job.logprobs,
            processed=job.processed,
            versions=job.versions,
            finish=job.finish,
            stale=job.stale,
        )

    def release(self) -> None:
        self.engine._post(lambda: self.engine._batcher.release(self._row))
