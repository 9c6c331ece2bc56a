"""The rollouts' process: environment, engine and `Rollouts` of a run, at the orders of the learner's process.

    python -m agentgym_trainers.worker FD        # as `remote` starts it; FD is its end of the pair of sockets

It ends by itself when the other end is gone, within `GRACE` seconds whatever it is doing, and takes along every process
that an environment of it started.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch

from agentgym import registry
from agentgym.modeling.threads import pin
from agentgym.types import WeightsVersion
from agentgym_trainers import language, reinforce, wire
from agentgym_trainers.config import from_table
from agentgym_trainers.language import LanguageModel
from agentgym_trainers.mixtures import make_env
from agentgym_trainers.rollouts import Played, Unit
from agentgym_trainers.shared import Block
from agentgym_trainers.wire import Answer, Ask, Beat, Channel, Drop, Publish, Reprice, Restore, Setup, ToWorker, Trouble

BEAT = 0.05
"""Seconds between two signs of life."""
GRACE = 1.0
"""Seconds that play under way has for cleaning up when the learner's process is gone."""


class Worker:
    """The rollout side that a `Setup` describes, answering to the other end of the channel.

    Raises what its parts refuse, and `ConfigError` for an environment that this process does not know.
    """

    def __init__(self, channel: Channel, what: Setup) -> None:
        sys.path[:] = what.path
        register(what.registered)
        config = from_table(what.config)
        pin(config.rollout.threads or config.run.threads)
        torch.use_deterministic_algorithms(config.run.deterministic)
        here = msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, processes=1))
        env = make_env(here)
        model, renderer = language.parts(here, env, Path(what.model))
        self.block = Block(what.fd, what.places)
        self.block.attach(model.requires_grad_(False))
        self.model = LanguageModel(model, renderer, language.engine(here, model, renderer))
        initial = self.model.frozen(Path(what.reference)) if reinforce.plays_initial(here) else None
        self.rollouts = reinforce.player(here, env, self.model.engine, renderer, initial)
        self.channel = channel
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the other side is gone."""
        beating = asyncio.create_task(self._beat())
        try:
            while (message := await self.channel.receive()) is not None:
                self._obey(message)
        finally:
            await self._close(beating)

    async def publish(self, version: int) -> None:
        await asyncio.to_thread(self.block.read, self.model.model)
        await self.rollouts.publish(WeightsVersion(number=version))

    def _obey(self, message: ToWorker) -> None:
        match message:
            case Ask():
                self.tasks[message.id] = asyncio.create_task(self._answer(message))
            case Drop() if message.id in self.tasks:
                self.tasks[message.id].cancel()
            case Reprice():
                self.rollouts.reprice(message.multipliers)
            case Restore():
                self.rollouts.restore(message.memory)

    async def _answer(self, ask: Ask) -> None:
        try:
            self.channel.send(Answer(id=ask.id, what=await self._do(ask.what)))
        except Exception as error:
            self.channel.send(Answer(id=ask.id, what=Trouble.of(error)))
        finally:
            del self.tasks[ask.id]

    async def _do(self, what: Unit | Publish) -> Played | None:
        if isinstance(what, Unit):
            return await self.rollouts.play(what)
        await self.publish(what.version)
        return None

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self.channel.send(Beat(load=self.rollouts.load()))

    async def _close(self, beating: asyncio.Task[None]) -> None:
        under_way = [beating, *self.tasks.values()]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.rollouts.close()
        self.model.close()


def register(lines: Iterable[dict[str, Any]]) -> None:
    """Know the names that the learner's process registered itself; importing their modules may do so already."""
    for line in lines:
        try:
            importlib.import_module(line["target"].partition(":")[0])
        except ImportError as error:
            warnings.warn(f"{line['id']!r} is left out: {error}", stacklevel=2)
            continue
        if line["id"] not in registry.catalogue(line["kind"]):
            registry.register(**line)


def _end_with(fd: int) -> None:
    """Once the other end is gone: `GRACE`, then the end of this process and of all that it started."""
    gone = select.poll()
    gone.register(fd, 0)
    gone.poll()
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


async def _main(end: socket.socket) -> None:
    """One life: the first message says what to be."""
    channel = await Channel.over(end, Setup | ToWorker)
    what = await channel.receive()
    if what is not None:
        worker = await _made(channel, what)
        await (worker.serve() if worker else channel.receive())
    channel.close()


async def _made(channel: Channel, what: Setup) -> Worker | None:
    """The worker, ready; None where that failed, which the other side has heard of."""
    try:
        worker = Worker(channel, what)
        await worker.publish(what.version)
    except Exception as error:
        channel.send(Answer(id=wire.SETUP, what=Trouble.of(error)))
        return None
    channel.send(Answer(id=wire.SETUP, what=None))
    return worker


if __name__ == "__main__":
    end = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(end.fileno(),), daemon=True).start()
    asyncio.run(_main(end))
