"""Continuous batching: which rows hold a slot, and what runs next. Lives in the engine thread; knows no asyncio.

A `Job` is one reply to sample for one row. Every step takes all running jobs one token further: rows with new tokens
are prefilled, the others decode, each sampled token is appended to its row. Slots are leased: a row keeps its slot
between turns until a waiting row needs it, idle longest first. What was evicted is rebuilt from its ids when the row
returns (or, in deterministic mode, restored from an exact copy).
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from agentgym.types import Sampling, VersionRun
from agentgym_policies.sampling import draw
from agentgym_policies.slots import Row, Store


@dataclass(slots=True, eq=False)
class Job:
    """One reply: tokens so far, and how it ended.

    `context` is the row's whole context, of which the row knows the first `keep`; `room` is the most tokens to sample;
    `ticket` belongs to whoever waits. `finished` is called in the engine thread. The reply begins with the ids of
    `begin`, which are not drawn: the first was decided on with log-probability `said`, the others follow from it.
    `stale`: some of them were sampled on a cache that holds keys and values of older weights.
    """

    row: Row
    context: list[int]
    keep: int
    sampling: Sampling
    key: int
    room: int
    finished: Callable[[Job], None]
    begin: tuple[int, ...] = ()
    said: float = 0.0
    ticket: Any = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    processed: list[float] = field(default_factory=list)
    versions: list[VersionRun] = field(default_factory=list)
    finish: Literal["stop", "length", ""] = ""
    stale: bool = False
    error: BaseException | None = None
    cancelled: bool = False

    @property
    def forced(self) -> int | None:
        """The id that comes next, where that is not left to the noise."""
        return self.begin[len(self.ids)] if len(self.ids) < len(self.begin) else None


class Batcher:
    """See the module. `ends` are the ids that end a reply; `decode` turns ids into text, for stop strings."""

    def __init__(
        self,
        store: Store,
        slots: int,
        ends: frozenset[int],
        decode: Callable[[list[int]], str],
        *,
        exact: bool = False,
        version: int = 0,
    ) -> None:
        self.store, self.ends, self.decode, self.exact, self.version = store, ends, decode, exact, version
        self.slots, self.epoch = slots, 0
        self.free = list(range(slots))
        self.idle: OrderedDict[int, Row] = OrderedDict()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, job: Job) -> None:
        """Queue a reply; a row whose history was rewritten keeps the part that is unchanged."""
        row = job.row
        row.ids = job.context
        row.cached = min(row.cached, job.keep, len(row.ids) - 1)
        self.waiting.append(job)

    def release(self, row: Row) -> None:
        """The session is over: its slot is free, unfinished replies are cancelled."""
        for job in (*self.waiting, *self.running):
            job.cancelled |= job.row is row
        self.idle.pop(id(row), None)
        self._free(row)
        row.saved, row.cached = None, 0

    def publish(self, version: int, *, keep_caches: bool = False) -> None:
        """New weights: running replies go on with them. Caches are rebuilt when their rows run next, or kept."""
        self.version = version
        self.epoch += not keep_caches
        for job in self.running:
            self._begin(job)

    def _refresh(self, row: Row) -> None:
        """Forget what was cached under weights whose caches are not kept."""
        if row.epoch != self.epoch:
            self.counts["rebuilt"] += row.cached
            row.cached, row.saved, row.epoch = 0, None, self.epoch

    def _begin(self, job: Job) -> None:
        """From its next token on, the reply is sampled by the weights at work, on what its row has cached."""
        self._refresh(job.row)
        if not job.row.cached:
            job.row.version = self.version
        job.stale |= job.row.version != self.version
        if job.versions and job.versions[-1].start == len(job.ids):
            job.versions.pop()
        if not job.versions or job.versions[-1].version != self.version:
            job.versions.append(VersionRun(start=len(job.ids), version=self.version))

    @torch.no_grad()
    def step(self) -> None:
        """Admit what fits, take every running reply one token further, finish what ended."""
        self._drop_cancelled()
        self._admit()
        if not self.running:
            return
        jobs = {id(job.row): job for job in self.running}
        rows, logits = self.store.run([job.row for job in self.running])
        self.counts["passes"] += 1
        if rows:
            self._extend([jobs[id(row)] for row in rows], logits)
            self.running = [job for job in self.running if not job.finish]

    def fail(self, error: BaseException) -> None:
        """Every reply under way ends with this error; caches are not trusted any more."""
        for job in (*self.running, *self.waiting):
            job.error = error
            job.finished(job)
            self._rest(job.row)
        self.waiting.clear()
        self.running.clear()
        self.publish(self.version)

    def _drop_cancelled(self) -> None:
        for job in self.running:
            if job.cancelled:
                self._rest(job.row)
        self.running = [job for job in self.running if not job.cancelled]
        if any(job.cancelled for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.cancelled)

    def _admit(self) -> None:
        """Lease slots in the order of arrival; a row that still has one goes first by having no need to wait."""
        still: deque[Job] = deque()
        for job in self.waiting:
            self.idle.pop(id(job.row), None)
        while self.waiting:
            job = self.waiting.popleft()
            self._refresh(job.row)
            if job.row.slot < 0 and not self._lease(job.row):
                still.append(job)
                continue
            job.row.cached = self.store.usable(job.row)
            self._begin(job)
            self.counts["reused"] += job.row.cached
            self.counts["prefilled"] += job.row.todo
            self.running.append(job)
        self.waiting = still

    def _lease(self, row: Row) -> bool:
        if not self.free and not self._evict():
            return False
        row.slot = heapq.heappop(self.free)
        if row.saved is not None:
            self.store.restore(row)
            row.saved = None
        else:
            self.counts["rebuilt"] += row.cached
            row.cached = 0
        return True

    def _evict(self) -> bool:
        """Take the slot of the row that has been idle longest."""
        if not self.idle:
            return False
        _, row = self.idle.popitem(last=False)
        if self.exact and row.cached:
            row.saved = self.store.save(row)
        self.counts["evicted"] += 1
        self._free(row)
        return True

    def _free(self, row: Row) -> None:
        if row.slot >= 0:
            self.store.drop(row.slot)
            heapq.heappush(self.free, row.slot)
            row.slot = -1

    def _rest(self, row: Row) -> None:
        """The row waits for its next turn and may be evicted."""
        if row.slot >= 0:
            self.idle[id(row)] = row

    def _extend(self, jobs: list[Job], logits: torch.Tensor) -> None:
        at, forced = [len(j.ids) for j in jobs], [j.forced for j in jobs] if any(j.begin for j in jobs) else None
        drawn = draw(logits, [j.sampling for j in jobs], [j.key for j in jobs], at, forced)
        self.counts["sampled"] += len(jobs)
        for job, token, logprob, processed in zip(jobs, *drawn, strict=True):
            self._append(job, token, logprob, processed)

    def _append(self, job: Job, token: int, logprob: float, processed: float) -> None:
        if job.forced is not None:
            processed = 0.0 if job.ids else job.said
        job.ids.append(token)
        job.logprobs.append(logprob)
        job.processed.append(processed)
        job.row.ids.append(token)
        if token in self.ends or (job.sampling.stop and self._stopped(job)):
            job.finish = "stop"
        elif len(job.ids) >= job.room:
            job.finish = "length"
        if job.finish:
            self._rest(job.row)
            job.finished(job)

    def _stopped(self, job: Job) -> bool:
        """Whether a stop string is in the tail that the newest token could have completed."""
        longest = max(map(len, job.sampling.stop))
        tail = self.decode(job.ids[-4 * longest - 4 :])  # a character has at most four bytes, a token at least one
        return any(stop in tail for stop in job.sampling.stop)
