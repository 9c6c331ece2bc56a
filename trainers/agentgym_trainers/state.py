"""The run's folder as training sees it: figures go in, checkpoints go in and out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentgym.errors import StoreError
from agentgym.store import Checkpoint, Offsets, RunFolder, load_run, write_atomic
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.journal import Journal, Standing
from agentgym_trainers.language import LanguageModel
from agentgym_trainers.sinks import Sinks

PHASES = ("warmup", "sft", "rl")
MODEL = "model"
OPTIMISER = "optimiser.safetensors"
SUMMARY = "summary.json"
RNG = "rng"


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands: `step` steps of `phase` are done; `learner` is the small state of that moment; `play` is
    how far that has come; `seconds` and `counts` go on from there."""

    phase: str
    step: int
    learner: dict[str, Any] = {}
    play: Standing = Standing()
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}


class Stateful(Protocol):
    """A phase's learner, or more than that: what a checkpoint holds besides the weights of the model."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None: ...


class State:
    """Owns the run folder. `begin` and `resume` are its two ways in; leave it by `with`."""

    def __init__(self, folder: RunFolder, config: Config, checkpoint: Checkpoint | None) -> None:
        self.folder, self.config, self.checkpoint = folder, config, checkpoint
        self.stage = None if checkpoint is None else msgspec.convert(checkpoint.extra, Stage)
        self.journal = Journal(folder.path, self.position)
        self.sinks = Sinks(config.run.sinks, folder.path, config.table(), position=self.position)

    @classmethod
    def begin(cls, config: Config, out: Path) -> State:
        return cls(RunFolder.create(out, config.table()), config, None)

    @classmethod
    def resume(cls, path: Path) -> State:
        """Cut the run back to its last checkpoint (or to nothing, before the first) and go on from there."""
        folder = RunFolder.open(path)
        try:
            latest = folder.latest
            folder.truncate_to(latest or Checkpoint(step=-1, path=str(path), offsets=Offsets()))
            return cls(folder, from_table(load_run(path).config), latest)
        except BaseException:
            folder.close()
            raise

    def __enter__(self) -> State:
        return self

    def __exit__(self, *details: object) -> None:
        self.sinks.close()
        self.journal.close()
        self.folder.close()

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics: into the run's folder, then to its sinks."""
        self.folder.log(line)
        self.sinks.log(line)

    @property
    def weights(self) -> Path | None:
        """The model's folder of the checkpoint resumed from."""
        return None if self.checkpoint is None else Path(self.checkpoint.path) / MODEL

    @property
    def position(self) -> int:
        """Steps of all phases behind the checkpoint resumed from: the version of its weights."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    def steps_done(self, phase: str) -> int:
        """Steps of this phase that the checkpoint resumed from has behind it."""
        if self.stage is None or PHASES.index(phase) > PHASES.index(self.stage.phase):
            return 0
        return self.stage.step if phase == self.stage.phase else steps_of(self.config, phase)

    def restore(self, learner: Stateful, phase: str) -> None:
        """Give a learner back its state, where the checkpoint was made in the middle of its phase."""
        if self.checkpoint is None or self.stage is None or self.stage.phase != phase:
            return
        tensors = load_file(Path(self.checkpoint.path) / OPTIMISER)
        torch.set_rng_state(tensors.pop(RNG))
        learner.restore(tensors, self.stage.learner)

    def save(self, stage: Stage, tensors: Mapping[str, Tensor], model: LanguageModel) -> None:
        """Write a checkpoint, all or nothing, and drop those before the last `keep`."""
        number = position(self.config, stage.phase, stage.step)
        with self.folder.checkpoint(number, msgspec.to_builtins(stage)) as path:
            model.save(path / MODEL)
            held = {name: value.detach().contiguous() for name, value in tensors.items()}
            save_file({**held, RNG: torch.get_rng_state()}, path / OPTIMISER)
            self.journal.sync(number)
        for old in self.folder.checkpoints[: -self.config.run.keep]:
            self.folder.drop(old)
        self.journal.prune(number)

    def evaluated(self) -> dict[str, Mapping[str, Any]]:
        """The evaluations that the folder holds, by name."""
        self.folder.flush()
        lines = (line.get("evaluation") for line in load_run(self.folder.path).metrics)
        return {str(found["policy"]): found for found in lines if found}

    def finish(self, summary: msgspec.Struct) -> None:
        write_atomic(self.folder.path / SUMMARY, msgspec.json.format(msgspec.json.encode(summary)))


def steps_of(config: Config, phase: str) -> int:
    return {"warmup": config.warmup.steps, "sft": config.sft.steps, "rl": config.run.steps}[phase]


def position(config: Config, phase: str, step: int) -> int:
    """Steps of all phases up to here: the number of a checkpoint."""
    return step + sum(steps_of(config, earlier) for earlier in PHASES[: PHASES.index(phase)])


def require_free(out: Path) -> None:
    """Refuse a folder that holds something, before anything expensive happens."""
    if out.exists() and any(out.iterdir()):
        raise StoreError(f"{out} holds something already; resume it, or choose another folder")
