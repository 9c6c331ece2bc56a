"""Sinks for real: TensorBoard's event files read back, W&B's offline folder; what fails is said once, and no more."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentgym.errors import ConfigError
from agentgym_trainers import sinks
from agentgym_trainers.sinks import Sinks, numbers

LINES: list[dict[str, Any]] = [
    {"phase": "sft", "step": 1, "nll": 2.5, "timeline": {"learner": []}},
    {"phase": "rl", "step": 2, "return": 0.5, "ok": True, "note": "text"},
    {"phase": "evaluation", "evaluation": {"policy": "after", "success": 0.25, "success_interval": [0.1, 0.4]}},
]


def test_numbers_alone() -> None:
    assert [numbers(line) for line in LINES] == [
        {"sft/nll": 2.5},
        {"rl/return": 0.5},
        {"evaluation/after/success": 0.25},
    ]


def events(folder: Path) -> Iterator[Any]:
    """The events of TensorBoard's files, by its format: length, its checksum, protocol buffer, checksum."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs agentgym-suite[watch]").Event
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_tensorboard_holds_the_curves_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs agentgym-suite[watch]")
    first = Sinks(["tensorboard"], tmp_path, {}, position=0)
    for line in LINES:
        first.log(line)
    first.close()
    again = Sinks(["tensorboard"], tmp_path, {}, position=1)
    again.log({**LINES[1], "return": 0.75})
    again.close()
    held = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard") for v in e.summary.value]
    assert held == [
        (1, "sft/nll", 2.5),
        (2, "rl/return", 0.5),
        (2, "evaluation/after/success", 0.25),
        (2, "rl/return", 0.75),
    ]
    started = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == 1]
    assert started == [2], "TensorBoard drops what the first life wrote from this step on"


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life is an offline folder of its own with its figures, under the run's one id (`wandb sync` joins them)."""
    wandb = pytest.importorskip("wandb", reason="needs agentgym-suite[watch]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for position in (0, 1):
        found = Sinks(["wandb"], tmp_path, {"run": {"seed": 0}}, position=position)
        found.log(LINES[1])
        found.close()
    wandb.teardown()
    runs = [path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run")]
    known = (tmp_path / "wandb.id").read_text()
    files = [path for run in runs for path in run.glob("run-*.wandb")]
    assert {path.name for path in files} == {f"run-{known}.wandb"}
    assert len(files) == len(runs) > 0
    assert all(b"rl/return" in path.read_bytes() for path in files)


def test_a_sink_that_fails_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *told: object) -> None:
            self.calls = 0

        def log(self, step: int, found: object) -> None:
            self.calls += 1
            raise OSError("no space left")

        def close(self) -> None:
            raise AssertionError("it was given up")

    broken = Broken()
    monkeypatch.setitem(sinks.SINKS, "tensorboard", lambda *told: broken)  # type: ignore[arg-type]
    monkeypatch.setitem(sinks.PACKAGES, "tensorboard", "msgspec")
    found = Sinks(["tensorboard"], tmp_path, {}, position=0)
    with pytest.warns(RuntimeWarning, match=r"'tensorboard' failed.*no space left"):
        found.log(LINES[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.log(LINES[1])
        found.close()
    assert broken.calls == 1


def test_a_sink_that_cannot_begin_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*told: object) -> Any:
        raise PermissionError("no key")

    monkeypatch.setitem(sinks.SINKS, "wandb", refuse)  # type: ignore[arg-type]
    monkeypatch.setitem(sinks.PACKAGES, "wandb", "msgspec")
    with pytest.warns(RuntimeWarning, match="no key"):
        Sinks(["wandb"], tmp_path, {}, position=0).log(LINES[1])


def test_a_missing_package_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sinks.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigError, match=r"no_such_package is not installed; pip install 'agentgym-suite\[watch\]'"):
        Sinks(["wandb"], tmp_path, {}, position=0)
