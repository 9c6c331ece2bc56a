"""`agentgym train`. A trainer is found by name in the catalogue; the core imports none.

What it must have: `resolve(table, overrides)`, a preset's table and `a.b=value` laid over it, to a checked config with
`.table()`; `plan(config)`; and `train(config, out,
resume=..., progress=...)`, which calls `progress(phase, done, total, figures)` and returns a record with `before`,
`after` and `ladder`, evaluations as `agentgym.evaluation` makes them.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from agentgym import presets, registry
from agentgym.cli import INTERRUPTED
from agentgym.cli.output import Bar, emit, err, out, table
from agentgym.cli.restarts import keep_going
from agentgym.cli.watch import Watch
from agentgym.errors import ConfigError, StoreError
from agentgym.figures import figure, percent, ranked
from agentgym.store import load_run

DEFAULT = "policy-gradient"
"""The trainer of a preset that names none."""


def run_train(options: Namespace) -> int:
    """Exit code 130 after Ctrl-C, 1 where --dry-run finds that this machine cannot do it."""
    _check(options)
    if options.restarts and not options.dry_run:
        return keep_going(options, _folder(options))
    if options.resume:
        return _resume(options)
    trainer, config = _resolved(presets.read_preset(options.preset), options.settings or [])
    if options.dry_run:
        return _dry_run(config, trainer.plan(config), options.json)
    return _train(trainer, config, _folder(options), options.json)


def _check(options: Namespace) -> None:
    if not (options.preset or options.resume):
        raise ConfigError("train needs a preset (see `agentgym list`), a TOML file, or --resume DIR")
    if options.resume and (options.preset or options.settings or options.out or options.dry_run):
        raise ConfigError("--resume takes a run's folder and nothing else: it goes on by its own config")


def _folder(options: Namespace) -> Path:
    """Of the run: as named, or a free one."""
    named = options.resume or options.out
    return Path(named) if named else free_folder(Path("runs"), Path(options.preset).stem)


def _resolved(preset: presets.Table, settings: Sequence[str]) -> tuple[Any, Any]:
    """The trainer that the settings or the preset name, and its config; how layers combine is the trainer's affair."""
    named = presets.parse_settings(settings).get("trainer", preset.pop("trainer", DEFAULT))
    trainer = registry.load(str(named), "trainers")
    return trainer, trainer.resolve(preset, [s for s in settings if s.partition("=")[0].strip() != "trainer"])


def _resume(options: Namespace) -> int:
    config = load_run(options.resume).config
    trainer = registry.load(config.get("trainer", DEFAULT), "trainers")
    return _train(trainer, None, Path(options.resume), options.json)


def free_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or the first of `parent/name-2`, `parent/name-3`, ... that is not taken."""
    taken = {path.name for path in parent.iterdir()} if parent.is_dir() else set()
    numbered = (f"{name}-{n}" for n in range(2, len(taken) + 3))
    return parent / next(free for free in (name, *numbered) if free not in taken)


def _train(trainer: Any, config: Any, folder: Path, as_json: bool) -> int:
    if os.environ.get("RANK", "0") != "0":  # of several that torchrun started, the first has the folder and speaks
        trainer.train(config, folder, resume=config is None)
        return 0
    if config is not None and folder.exists() and any(folder.iterdir()):
        raise StoreError(
            f"{folder} holds something already; continue it with --resume {folder}, or choose another --out"
        )
    err().print(f"run folder: {folder}", style="dim", markup=False)
    with Board() as board:
        try:
            summary = trainer.train(config, folder, resume=config is None, progress=board.show)
        except KeyboardInterrupt:
            board.close()
            err().print(f"interrupted; go on with: agentgym train --resume {folder}", markup=False)
            return INTERRUPTED
    emit(summary) if as_json else show(msgspec.to_builtins(summary), folder)
    return 0


class Board:
    """A bar per phase on standard error, with the figures of the last step; a line for each phase that ends.

    On a terminal, curves and the figures of asynchronous training stand below the bar (see `watch`). A phase that
    another one interrupts (an evaluation in between) goes on where it was.
    """

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.began: defaultdict[str, float] = defaultdict(time.monotonic)
        self.watches: defaultdict[str, Watch] = defaultdict(Watch)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.__exit__(None, None, None)
        self.bar = None

    def show(self, phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """What a trainer calls after each step."""
        began = self.began[phase]
        self.watches[phase].see(figures)
        if self.bar is None or self.bar.what != phase:
            self.close()
            self.bar = Bar(phase, total, done=done - 1, below=self.watches[phase])
        self.bar.advance(note(figures))
        if done == total:
            seconds = time.monotonic() - began
            self.close()
            steps = f"{done} steps, {seconds:.0f} s  " if total > 1 else ""
            err().print(f"{phase}: {steps}{note(figures)}", markup=False)


def note(figures: Mapping[str, float]) -> str:
    """The figures that matter most, in words."""
    return ", ".join(f"{name} {figure(figures[name])}" for name in ranked(figures)[:4])


def _dry_run(config: Any, plan: Any, as_json: bool) -> int:
    if as_json:
        emit({"config": config.table(), "plan": plan})
    else:
        sys.stdout.write(tomli_w.dumps(_plain(config.table())))
        memory = [(part, f"{held / 1e9:.3f} GB") for part, held in plan.memory.items()]
        seconds = [(phase, f"{taken:.0f} s") for phase, taken in plan.seconds.items()]
        out().print("", table(f"{plan.parameters:,} parameters", ("estimate", ""), [*memory, *seconds]), markup=False)
        out().print(plan.verdict, style="bold", markup=False)
    return 0 if plan.fits else 1


def _plain(value: Any) -> Any:
    """Without None, which TOML has not."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Before and after on held-out tasks, with the ladder beside it."""
    named = {"before": summary.get("before"), "after": summary.get("after"), **(summary.get("ladder") or {})}
    rows = [(name, *_judged(found)) for name, found in named.items() if found]
    if rows:
        out().print(table("on held-out tasks", ("policy", "success", "95 %", "return", "episodes"), rows), "")
    out().print(f"report: {folder / 'report.html'}", markup=False)


def _judged(found: Mapping[str, Any]) -> tuple[Any, ...]:
    between = " – ".join(percent(end) for end in found.get("success_interval") or ())
    return percent(found.get("success")), between, found.get("return_mean"), found.get("episodes")
