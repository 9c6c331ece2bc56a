"""Several processes, one run: rank 0 plays, records and commands; the others hold the same learners, and obey.

    torchrun --nproc-per-node 4 -m agentgym train PRESET

    with joined() as crew:
        if crew.follows:
            return crew.follow(folder)                       # to the end of the run
        crew.begin(config, env, model, folder, weights, texts)
        phase = crew.learner("rl", initial, counts)          # used as in one process: what moves it, all ranks do

What is played is sent to every rank; credit and figures are worked out on each, and a learner takes its share of every
optimiser step (`ranks`). So the weights are everywhere the same, or with optim.sharded in shards; rank 0 then learns on
a copy, and its model gets them whole after every update. In one process there is nobody to command.

A rank that raises ends all with its message. One that is killed closes its connections, which the others notice when
they next hear of it; one that is stuck is given up after `STUCK`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist

from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym_trainers import language, ranks
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.language import LanguageModel
from agentgym_trainers.learner import Learner
from agentgym_trainers.mixtures import make_env
from agentgym_trainers.objective.declare import IMITATION
from agentgym_trainers.reinforce import Reinforcement
from agentgym_trainers.sharding import ALONE, full_weights

STUCK = timedelta(minutes=30)
"""How long a rank waits for the others in the middle of an update."""
IDLE = timedelta(days=7)
"""How long it waits for the next command, while rank 0 plays."""
REFERENCE = "reference"
"""The folder, in the run's, of the policy from before reinforcement."""
MOVING = ("step", "update", "learn")
COMMANDED = (*MOVING, "state", "restore")
"""Methods of a learner that all ranks call together."""


class Setup(NamedTuple):
    """A run begins: what the ranks build their model of."""

    config: dict[str, Any]
    folder: Path
    weights: Path | None
    texts: list[str]


class Make(NamedTuple):
    """The learner of the next phase; with the policy from before it, where that takes part."""

    phase: str
    reference: bool


class Call(NamedTuple):
    """A method of the learner."""

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Stop(NamedTuple):
    """The run is over, or could not go on."""

    why: str = ""


@contextmanager
def joined() -> Iterator[Crew]:
    """The ranks that torchrun started, or this process alone. What ends rank 0 ends the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Crew()
        return
    device = torch.cuda.is_available()
    if device:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", timeout=STUCK)
    crew = Crew(dist.new_group(backend="gloo", timeout=IDLE))
    try:
        yield crew
        crew.stop()
    except ranks.RankError:
        raise
    except BaseException as error:
        crew.stop(f"{type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


class Crew:
    """One rank's end of it; `group` is what commands go through, None in a single process."""

    config: Config
    env: Environment
    model: LanguageModel
    """What the engine samples with, on rank 0."""
    trainable: LanguageModel
    """What the learners move: the same, or with shards on rank 0 a copy of it."""
    held: Any

    def __init__(self, group: Any = None) -> None:
        self.group = group

    @property
    def follows(self) -> bool:
        return ranks.rank() > 0

    # --- rank 0 ---

    def begin(
        self,
        config: Config,
        env: Environment,
        model: LanguageModel,
        folder: Path,
        weights: Path | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        """Tell the others of the run in `folder`, whose model has the weights of that checkpoint or is made here."""
        _refuse(config)
        self._tell(Setup(config.table(), folder.absolute(), weights, list(texts)))
        self._set_up(config, env, model)

    def learner(self, phase: str, initial: Any = None, counts: Counter[str] | None = None) -> Any:
        """The learner of "warmup" or "sft", or the `Reinforcement` of "rl"; every rank has made its own."""
        self._tell(Make(phase, initial is not None))
        self.held = made(phase, self.config, self.env, self.trainable, initial, counts)
        return self.held if self.group is None else Commanded(self)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Have all ranks call a method of the learner; what it gave here."""
        call = Call(method, arguments, options)
        self._tell(call)
        return self._do(call)

    def stop(self, why: str = "") -> None:
        """Let the others go; those that are gone already need nothing."""
        if not self.follows:
            with suppress(ranks.RankError):
                self._tell(Stop(why))

    # --- the others ---

    def follow(self, folder: Path) -> Path:
        """Obey to the end of the run, in `folder` or where rank 0 says: that folder. Raises `RankError` where another
        rank cannot go on."""
        while not isinstance(command := self._heard(), Stop):
            match command:
                case Setup():
                    folder = command.folder
                    self._follow(command)
                case Make():
                    initial = self.model.frozen(folder / REFERENCE) if command.reference else None
                    self.held = made(command.phase, self.config, self.env, self.trainable, initial)
                case Call():
                    self._do(command)
        if command.why:
            raise ranks.RankError(f"rank 0 stopped: {command.why}")
        return folder

    def _follow(self, setup: Setup) -> None:
        config = from_table(setup.config)
        torch.set_num_threads(config.run.threads or torch.get_num_threads())
        torch.use_deterministic_algorithms(config.run.deterministic)
        env = make_env(config)
        parts = language.parts(config, env, setup.weights, setup.texts)
        self._set_up(config, env, LanguageModel(*parts, engine=None))

    # --- all of them ---

    def _set_up(self, config: Config, env: Environment, model: LanguageModel) -> None:
        self.config, self.env, self.model, self.trainable = config, env, model, model
        if self.group is None:
            return
        with ranks.alive():
            for x in model.module().state_dict().values():
                dist.broadcast(x, 0)
        if config.optim.sharded and not self.follows:
            self.trainable = LanguageModel(deepcopy(model.model), model.renderer, engine=None)

    def _do(self, call: Call) -> Any:
        sharded = self.config.optim.sharded
        with ranks.together(sharded=sharded):
            found = getattr(self.held, call.method)(*call.arguments, **call.options)
        if sharded and call.method in MOVING:
            weights = full_weights(self.trainable.module())
            if weights:
                self.model.module().load_state_dict(weights)
        return found

    def _tell(self, command: Any) -> None:
        if self.group is not None:
            with ranks.alive():
                dist.broadcast_object_list([command], 0, self.group)

    def _heard(self) -> Any:
        heard: list[Any] = [None]
        with ranks.alive():
            dist.broadcast_object_list(heard, 0, self.group)
        return heard[0]


def _refuse(config: Config) -> None:
    """`ConfigError` for what cannot be sharded, before anything is paid."""
    if not config.optim.sharded:
        return
    if config.model.lora:
        raise ConfigError("optim.sharded = true is for whole weights, and model.lora trains adapters; drop one of them")
    if config.run.algorithm in ("preference", "candidates"):
        raise ConfigError(
            f"optim.sharded = true is for objectives, and run.algorithm = {config.run.algorithm!r} learns with whole "
            "weights; drop it"
        )
    if ranks.count() == 1:
        raise ConfigError(ALONE)


class Commanded:
    """A learner on rank 0 of several: what moves it, all ranks do; the rest is read here."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.held = crew, crew.held

    def __getattr__(self, name: str) -> Any:
        return partial(self.crew.call, name) if name in COMMANDED else getattr(self.held, name)


def made(
    phase: str,
    config: Config,
    env: Environment,
    model: LanguageModel,
    initial: Any = None,
    counts: Counter[str] | None = None,
) -> Learner | Reinforcement:
    """The learner of a phase, alike on every rank."""
    if phase == "rl":
        return Reinforcement(config, env, model, initial, counts)
    copies = phase == "warmup"
    c, objective = (config.warmup, IMITATION) if copies else (config.sft, config.sft.objective)
    steps = c.steps * (1 if copies else c.optim.epochs * c.optim.minibatches)
    optim = msgspec.structs.replace(c.optim, sharded=config.optim.sharded)
    return Learner(model, objective, optim, total_steps=steps, seed=config.run.seed, blank=model.blank)
