"""Where a run's figures go besides its metrics.jsonl: TensorBoard, Weights & Biases.

    require(config.run.sinks)                      # before anything is begun: ConfigError where a package is missing
    sinks = Sinks(config.run.sinks, folder, config.table(), position=state.position)
    sinks.log({"phase": "rl", "step": 12, "return": 0.4})
    sinks.close()

They hear of a line after the run's own file has it. A sink that fails is reported once, and no run stops for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from agentgym.errors import ConfigError
from agentgym.seeding import digest

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that each sink needs; all of them come with the extra `watch`."""


class Sink(Protocol):
    """Takes numbers by name, step by step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        """Hand on what still waits."""
        ...


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUN/tensorboard`. A resumed run takes its curves up after
    `position`: what the last life wrote beyond it is not shown."""

    def __init__(self, folder: Path, config: Mapping[str, Any], position: int) -> None:
        from tensorboardX import SummaryWriter

        purge = position + 1 if position else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, filename_suffix=f".{position}")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run of the project `agentgym`, under one id in all lives of the run. What the service has of a step it keeps.

    WANDB_PROJECT, WANDB_MODE (offline, disabled) and the rest of its environment variables work as ever.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], position: int) -> None:
        import wandb

        told = wandb.setup().settings
        self.run = wandb.init(
            project=told.project or "agentgym",
            id=_known(folder / "wandb.id"),
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
            resume="allow" if told.mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


def _known(path: Path) -> str:
    """The id that the first life of the run wrote here."""
    if not path.is_file():
        path.write_text(digest(str(path.resolve()), path.parent.stat().st_mtime).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


SINKS: Mapping[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def require(names: Iterable[str]) -> None:
    """Raises `ConfigError` where the package of a sink is missing."""
    for name in names:
        found = find_spec(PACKAGES[name])
        if found is None or found.origin is None:  # a folder of that name is no package
            raise ConfigError(
                f"run.sinks has {name!r}, and {PACKAGES[name]} is not installed; pip install 'agentgym-suite[watch]', "
                "or leave it out: metrics.jsonl and report.html have all figures"
            )


class Sinks:
    """The sinks of a run in `folder` that stands at `position`, each for as long as it works."""

    def __init__(self, names: Iterable[str], folder: Path, config: Mapping[str, Any], *, position: int) -> None:
        self.open: dict[str, Sink] = {}
        self.step = position
        require(names := tuple(names))
        for name in names:
            self._guarded(name, self._begin, name, folder, config, position)

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; one without a step belongs to the last that had one."""
        self.step = int(line.get("step", self.step))
        found = numbers(line)
        for name, sink in list(self.open.items()):
            self._guarded(name, sink.log, self.step, found)

    def close(self) -> None:
        """Hand on what still waits."""
        for name, sink in list(self.open.items()):
            self._guarded(name, sink.close)
        self.open.clear()

    def _begin(self, name: str, folder: Path, config: Mapping[str, Any], position: int) -> None:
        self.open[name] = SINKS[name](folder, config, position)

    def _guarded(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.open.pop(name, None)
            warnings.warn(
                f"the sink {name!r} failed and gets nothing more of this run ({type(error).__name__}: {error}); "
                "metrics.jsonl has all figures",
                RuntimeWarning,
                stacklevel=3,
            )


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line: phase/name, of an evaluation evaluation/policy/name."""
    evaluation = line.get("evaluation")
    prefix, held = (f"evaluation/{evaluation['policy']}", evaluation) if evaluation else (str(line["phase"]), line)
    return {
        f"{prefix}/{name}": float(value)
        for name, value in held.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
