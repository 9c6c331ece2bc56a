"""`TorchEngine`: any causal language model in hub format as a policy, with exact token records.

    engine = TorchEngine.from_checkpoint("path/to/model", slots=64)
    async with engine.session(episode, agent) as session:
        action = await session.act(observation)          # action.span holds ids and log-probs

All torch work happens in one engine thread. Event loops hand it jobs through an inbox and get their answers in one
wake-up per step. The weights are the given module's own: a learner that shares it changes them in place while nothing
is being sampled, then calls `publish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from agentgym import seeding
from agentgym.errors import ConfigError, EngineFault, ModelError
from agentgym.modeling import build
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.renderer import Conversation, History, Prompt, Renderer, with_hint
from agentgym.policy import left
from agentgym.types import Action, Episode, Floats, Guidance, Ids, Observation, Sampling, TokenSpan, WeightsVersion
from agentgym_policies.batching import Batcher, Job
from agentgym_policies.sampling import check, plain
from agentgym_policies.slots import Row, store_for


class TorchEngine:
    """Continuous batching over `slots` leased cache rows of `max_length` tokens each; see the module.

    `seed` enters every draw together with (episode.seed, episode.member, agent, turn). `deterministic` gives each pass
    a shape that depends on one session's history alone, and keeps evicted caches as copies: the same seed gives the
    same ids and log-probs bit for bit on one machine, thread count and set of versions, in whatever order sessions
    arrive. `threads` sets torch's threads in the engine thread. The model is kept in eval mode: what is sampled under
    dropout could not be recorded exactly.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        slots: int = 64,
        max_length: int = 1024,
        sampling: Sampling | None = None,
        seed: int = 0,
        version: int = 0,
        deterministic: bool = False,
        threads: int | None = None,
    ) -> None:
        _check_sizes(model, slots, max_length)
        self.model, self.renderer, self.max_length, self.seed = model, renderer, max_length, seed
        self.sampling = check(sampling or Sampling())
        self.deterministic = deterministic
        model.eval()
        store = store_for(model, slots, max_length, deterministic=deterministic)
        self._batcher = Batcher(store, slots, renderer.end_ids, renderer.decode, exact=deterministic, version=version)
        self._inbox: deque[Callable[[], None]] = deque()
        self._done: list[Job] = []  # touched by the engine thread alone
        self._gathered: dict[asyncio.AbstractEventLoop, list[Job]] = {}  # touched by each loop for itself
        self._lock = threading.Lock()
        self._pumping = self._closed = False
        self._thread = ThreadPoolExecutor(
            1, "agentgym-engine", initializer=None if threads is None else lambda: torch.set_num_threads(threads)
        )

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

    def session(self, episode: Episode, agent: str) -> TorchSession:
        return TorchSession(self, episode, agent)

    async def publish(self, version: WeightsVersion) -> None:
        """The shared module now holds these weights: bump the version, drop every cache, after the step under way."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def swap() -> None:
            self._batcher.invalidate(version.number)
            loop.call_soon_threadsafe(_resolve, future)

        self._post(swap)
        await future

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
        try:
            await job.ticket
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        if job.error is not None:
            raise EngineFault(f"the engine failed: {type(job.error).__name__}: {job.error}") from job.error
        return job


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


class TorchSession:
    """One agent in one episode: its conversation and its cache row. Leaving it, also by cancellation, releases both.

    Of the episode's guidance it reads `hint`, `begin` and `share`. What it is told, and the hint, go into the prompt of
    the next span, so that the spans of a branch hold the whole context.
    """

    def __init__(self, engine: TorchEngine, episode: Episode, agent: str) -> None:
        self.engine = engine
        self.conversation = engine.renderer.conversation()
        self._noise = (engine.seed, "sampling", episode.seed, episode.member, agent)
        guidance = episode.guidance or Guidance()
        self._hint, self._begin = guidance.hint, (guidance.begin, _log_share(guidance))
        self._bare: Conversation | None = None  # without the hint, from the hint to the span that holds it
        self._held: tuple[int, int] | None = (
            None  # (branch, tokens of it) that spans hold and the context still begins with
        )
        self._row = Row()
        self._turn = 0
        self._torn = self._left = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._turn:
            with contextlib.suppress(EngineFault):  # a closed engine holds nothing
                self.engine._post(lambda: self.engine._batcher.release(self._row))

    async def act(self, observation: Observation, sampling: Sampling | None = None) -> Action:
        """Sample a reply to what is new.

        A context that leaves no room is an outcome: an empty reply with finish "length". Only a first prompt that
        does not fit is a `ModelError`. After a cancelled or failed call the session cannot go on (`EngineFault`).
        """
        self._check()
        chosen = self.engine.sampling if sampling is None else check(sampling)
        self._observe(observation, hint=True)
        prompt = self._prompt()
        job = self._job(prompt, chosen)
        self._turn += 1
        if job.room > 0:
            self._torn = True
            await self.engine._sample(job)
            self._torn = False
        else:
            job.finish = "length"
        return self._action(prompt, job)

    async def tell(self, observation: Observation, action: Action) -> None:
        """An action that this session did not sample: with a span its exact ids, else its text as the template has it.

        Where its span says that it was sampled behind a hint, so does what the next span's prompt holds of it.
        """
        self._check()
        span = action.span
        self._observe(observation, hint=span is not None and span.context == "hinted")
        ids = self.engine.renderer.ids_of(action) if span is None else list(span.ids)
        for talk in (self.conversation, self._bare):
            if talk is not None:
                talk.reply(ids)
        self._turn += 1

    def _check(self) -> None:
        if self._left:
            raise left()
        if self._torn:
            raise EngineFault("this session lost a reply by cancellation or an engine failure; open a new one")

    def _observe(self, observation: Observation, hint: bool) -> None:
        """Add what is new to the conversation, and the hint if its moment has come."""
        if observation.array is not None:
            raise ModelError("a language model cannot read an array observation; wrap the environment to speak text")
        messages = observation.messages
        if hint and self._hint:
            self._bare = self.conversation.fork()
            messages, self._hint = with_hint(messages, self._hint), ""
        if self._bare is not None:
            self._bare.observe(observation.messages, observation.tools)
        parent = self.conversation.observe(messages, observation.tools).parent
        if parent is not None and self._held is not None:
            self._held = (self._held[0], min(self._held[1], parent[1]))
        length, limit = len(self.conversation.ids), self.engine.max_length
        if not self._turn and length >= limit:
            raise ModelError(
                f"the first prompt has {length} tokens, max_length is {limit}: raise max_length or shorten the prompt"
            )

    def _prompt(self) -> Prompt:
        """What the spans so far do not hold of the context."""
        branch, at = self._held or (self.conversation.branch, 0)
        forked = branch != self.conversation.branch
        return Prompt(self.conversation.ids[at:], self.conversation.branch, (branch, at) if forked else None)

    def _unhinted(self) -> Ids:
        """The same without the hint, said once; empty where there is none."""
        bare, self._bare = self._bare, None
        return Ids() if bare is None else Ids(bare.ids[self._held[1] if self._held else 0 :])

    def _job(self, prompt: Prompt, sampling: Sampling) -> Job:
        context = list(self.conversation.ids)
        (begin, said), self._begin = self._begin, ("", 0.0)
        return Job(
            row=self._row,
            context=context,
            keep=len(context) if prompt.parent is None else prompt.parent[1],
            sampling=sampling,
            key=seeding.key(*self._noise, self._turn),
            room=min(sampling.max_tokens, self.engine.max_length - len(context)),
            finished=self.engine._done.append,
            begin=tuple(self.engine.renderer.encode(begin)) if begin else (),
            said=said,
        )

    def _action(self, prompt: Prompt, job: Job) -> Action:
        """The reply with its exact record."""
        text, calls = self.engine.renderer.reply(job.ids)
        unhinted = self._unhinted()
        span = TokenSpan(
            prompt=Ids(prompt.ids),
            ids=Ids(job.ids),
            suffix=Ids(self.conversation.reply(job.ids)),
            logprobs=Floats(job.logprobs),
            sampled_logprobs=Floats() if plain(job.sampling) and not job.begin else Floats(job.processed),
            versions=tuple(job.versions),
            sampling=job.sampling,
            finish=job.finish,
            branch=prompt.branch,
            parent=prompt.parent,
            context="hinted" if unhinted else "original",
            unhinted=unhinted,
        )
        self._held = (self.conversation.branch, len(self.conversation.ids))
        return Action(text=text, tool_calls=calls, span=span)


def _log_share(guidance: Guidance) -> float:
    if not 0 < guidance.share <= 1:
        raise ConfigError(
            f"guidance.share is the probability of beginning with {guidance.begin!r}; got {guidance.share}"
        )
    return math.log(guidance.share)
