"""The rollout side in a process of its own, looked at from the learner's: what `Rollouts` has, by way of a worker.

    remote = Remote(config, model, folder, counts)
    played = await remote.play(unit)             # starts the worker, and starts it again when it dies
    await remote.publish(version)                # copies the weights of now into shared memory; the worker takes them
    await remote.close()

A worker that dies takes no result with it: its units are played again, by the same seeds, under the weights of now.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from agentgym import registry
from agentgym.errors import ConfigError, EngineFault
from agentgym.modeling.threads import check_cores
from agentgym.policy import Load
from agentgym.processes import exit_reason
from agentgym.types import WeightsVersion
from agentgym_trainers import wire
from agentgym_trainers.config import Config
from agentgym_trainers.language import LanguageModel
from agentgym_trainers.rollouts import Played, Unit
from agentgym_trainers.shared import Block
from agentgym_trainers.wire import Answer, Ask, Beat, Drop, Message, Publish, Reprice, Restore, Setup, Trouble

log = logging.getLogger("agentgym")

HOME = "worker"
"""The folder inside a run's where a worker finds tokenizer and architecture; it is there while the worker is."""
RESTARTS = 3
"""Workers in a row that may die without finishing a unit, before the run stops."""
PATIENCE = 10.0
"""Seconds that a worker has for cleaning up when it is asked to end, and for being gone then."""
QUIET = 60.0
"""Seconds without a sign of life after which a worker that is alive is reported. It is not ended: deadlines of
episodes are the affair of the runner inside it."""


class Remote:
    """The rollout side of the run in `folder`; see the module, and `refuse`. `counts` has `worker_restarts` go up."""

    def __init__(self, config: Config, model: LanguageModel, folder: Path, counts: Counter[str] | None = None) -> None:
        self.config, self.model, self.folder = config, model, folder
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.block = Block.of(model.module())
        self.version: int = model.engine.version
        self._life: Life | None = None
        self._lock = asyncio.Lock()
        self._told: dict[type, Reprice | Restore] = {}
        self._barren = 0

    async def play(self, unit: Unit) -> Played:
        """The groups of a unit, by whichever worker lives long enough. Raises what play raised in the worker, and
        `EngineFault` when worker after worker died."""
        while True:
            life = await self._alive()
            with contextlib.suppress(Died):
                played: Played = await life.ask(unit)
                self._barren = 0
                self._told[Restore] = Restore(memory=played.memory)
                return played

    async def publish(self, version: WeightsVersion) -> None:
        """The worker samples with the learner's weights of now, and so does the engine here that evaluates."""
        await self.model.publish(version)
        async with self._lock:
            await asyncio.to_thread(self.block.write, self.model.module())
            self.version = version.number
            if self._life and self._life.ready:
                with contextlib.suppress(Died):
                    await self._life.ask(Publish(version=version.number))

    def reprice(self, multipliers: Mapping[str, Any]) -> None:
        """What is played from now on is rewarded under this state of the reward's multipliers."""
        self._tell(Reprice(multipliers=dict(multipliers)))

    def restore(self, memory: Mapping[str, Any]) -> None:
        """Go on with what the strategy knew after a unit."""
        self._tell(Restore(memory=dict(memory)))

    def load(self) -> Load:
        """How busy the worker's engine was when last heard of."""
        return self._life.load if self._life else Load()

    @property
    def pid(self) -> int | None:
        """Of the worker, where one lives."""
        return self._life.process.pid if self._life and self._life.ready else None

    async def close(self) -> None:
        """End the worker, and leave nothing behind."""
        if self._life:
            await self._life.close()
        self.block.close()
        shutil.rmtree(self.folder / HOME, ignore_errors=True)

    # --- lives ---

    async def _alive(self) -> Life:
        """A worker that is ready: the one that lives, or a new one with all that the last one knew."""
        async with self._lock:
            while not (self._life and self._life.ready):
                self._begin()
                with contextlib.suppress(Died):
                    await self._set_up()
            return self._life

    def _begin(self) -> None:
        if self._life:
            self._barren += 1
            if self._barren > RESTARTS:
                raise EngineFault(
                    f"the rollouts' process died {self._barren} times in a row before it finished a unit, last by "
                    f"{self._life.ended}. Repair that and go on with: agentgym train --resume {self.folder}"
                )
            self.counts["worker_restarts"] += 1
        self._life = Life(self.block.fd, self.config.rollout.cores, self._died)

    async def _set_up(self) -> None:
        assert self._life is not None
        try:
            await self._life.open()
            await self._life.ask(await self._setup())
        except Exception as error:
            if not isinstance(error, Died):
                await self._life.close()
            raise
        self._life.ready = True
        for message in self._told.values():
            self._life.tell(message)

    async def _setup(self) -> Setup:
        home = self.folder / HOME
        if not home.is_dir():
            await asyncio.to_thread(self.model.save, home)
        return Setup(
            config=self.config.table(),
            model=str(home),
            reference=str(self.folder / "reference"),
            fd=self.block.fd,
            places=self.block.places,
            version=self.version,
            path=sys.path,
            registered=list(portable(self.config)),
        )

    def _tell(self, message: Reprice | Restore) -> None:
        self._told[type(message)] = message
        if self._life and self._life.ready:
            self._life.tell(message)

    def _died(self, life: Life) -> None:
        log.warning(
            "the rollouts' process %d died: %s; what it was at (%d) is done again by a new one",
            life.process.pid,
            life.ended,
            len(life.waiting),
        )


class Died(Exception):
    """The worker died with this unanswered."""


class Life:
    """One worker process. `ended` says how it ended, and calls `died` unless it was closed."""

    def __init__(self, fd: int, cores: tuple[int, ...], died: Callable[[Life], None]) -> None:
        self._end, theirs = socket.socketpair()
        command = [sys.executable, "-m", "agentgym_trainers.worker", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), fd), start_new_session=True
            )
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)
        self.died, self.ended, self.ready = died, "", False
        self.load = Load()
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(wire.SETUP)
        self._channel: wire.Channel | None = None
        self._listening: asyncio.Task[None] | None = None
        self._closing = False

    async def open(self) -> None:
        self._channel = await wire.Channel.over(self._end, wire.FromWorker)
        self._listening = asyncio.create_task(self._listen(self._channel))

    async def ask(self, what: Setup | Unit | Publish) -> Any:
        """Its answer. Raises what it met, and `Died` where it ended first; a cancelled wait is called off there too."""
        if self.ended:
            raise Died(self.ended)
        number = next(self._numbers)
        self.waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self.tell(what if isinstance(what, Setup) else Ask(id=number, what=what))
            return await self.waiting[number]
        except asyncio.CancelledError:
            self.tell(Drop(id=number))
            raise
        finally:
            del self.waiting[number]

    def tell(self, message: Message) -> None:
        assert self._channel is not None
        self._channel.send(message)

    async def close(self) -> None:
        """End it, in order where it can."""
        self._closing = True
        if not self.ready:
            self.process.kill()
        if self._channel is None or self._listening is None:
            self._end.close()
            await asyncio.to_thread(self._reap)
            return
        self._channel.end()
        await asyncio.wait({self._listening}, timeout=PATIENCE)
        self._channel.close()
        await self._listening

    async def _listen(self, channel: wire.Channel) -> None:
        try:
            while (message := await self._next(channel)) is not None:
                self._hear(message)
        finally:
            channel.close()
            self.ready = False
            self.ended = await asyncio.to_thread(self._reap)
            if not self._closing:
                self.died(self)
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(Died(self.ended))

    async def _next(self, channel: wire.Channel) -> Answer | Beat | None:
        heard = asyncio.ensure_future(channel.receive())
        while not (await asyncio.wait({heard}, timeout=QUIET))[0]:
            log.warning("nothing was heard of the rollouts' process %d for %.0f s", self.process.pid, QUIET)
        found: Answer | Beat | None = heard.result()
        return found

    def _hear(self, message: Answer | Beat) -> None:
        if isinstance(message, Beat):
            self.load = message.load
            return
        future = self.waiting.get(message.id)
        if future is None or future.done():
            return
        if isinstance(message.what, Trouble):
            future.set_exception(message.what.error())
        else:
            future.set_result(message.what)

    def _reap(self) -> str:
        """Wait for its end, and take what it started along; says how it ended."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return exit_reason(code)


# --- refusals ---------------------------------------------------------------------------------------------------


def refuse(config: Config) -> None:
    """Raises `ConfigError` for names that another process cannot know, and for cores that are not there."""
    list(portable(config))
    check_cores(config.rollout.cores)


def portable(config: Config) -> Iterator[dict[str, Any]]:
    """How this process registered what another can import, as arguments of `registry.register`. `ConfigError` where the
    run needs one that another cannot."""
    parts = (config.env, *(part.env for part in config.mixture))
    needed = {config.rollout.engine, *(str(part.get("id")) for part in parts)}
    for kind, spec in registry.registered():
        name = _importable(spec.target)
        if name:
            yield {**msgspec.structs.asdict(spec), "kind": kind, "target": name}
        elif spec.id in needed:
            raise ConfigError(
                f"{spec.id!r} was registered in this process with {spec.target!r}, which the rollouts' process cannot "
                "import: define it at the top of a module (not of the script that runs) and register that, or declare "
                "it as an entry point of a package; or set run.processes = 1"
            )


def _importable(target: Any) -> str:
    """ "module:name" of a class or function, or "" where that does not lead to it."""
    if isinstance(target, str):
        return target
    module, name = getattr(target, "__module__", ""), getattr(target, "__qualname__", "")
    if not (module and name) or module == "__main__" or "<" in name:
        return ""
    return f"{module}:{name}" if attrgetter(name)(importlib.import_module(module)) is target else ""
