"""The live view of training, drawn on a recorded terminal; lines as ever where there is none."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from agentgym.cli import output
from agentgym.cli.training import Board
from agentgym.cli.watch import Watch, sparkline

FIGURES = {
    "return": 0.5,
    "success": 0.25,
    "staleness": 0.875,
    "staleness_max": 2.0,
    "units_running": 6.0,
    "units_ready": 3.0,
    "engine_running": 24.0,
    "engine_waiting": 1.0,
    "engine_cache": 0.613,
    "sampled_per_second": 12345.6,
    "learn_tokens_per_second": 987.0,
    "mfu": 0.0123,
    "seconds_waiting": 1.25,
    "seconds_learning": 3.0,
    "consumed": 128.0,
    "failed": 2.0,
    "dropped.stale": 1.0,
    "dropped.equal": 0.0,
}


def test_rows_say_what_is_known() -> None:
    watch = Watch()
    watch.see({**FIGURES, "return": 0.0})
    watch.see(FIGURES)
    assert dict(watch.rows()) == {
        "return": "▁█ 0.5",
        "success": "▁▁ 0.25",
        "staleness": "mean 0.875, max 2",
        "units": "6 running, 3 ready",
        "engine": "24 running, 1 waiting, cache 61.3 %",
        "tokens/s": "12,346 sampled, 987 learnt, MFU 1.23 %",
        "seconds": "1.25 waiting, 3 learning",
        "episodes": "128 consumed, 2 failed, 1 dropped (stale)",
    }


def test_a_supervised_phase_has_no_row() -> None:
    watch = Watch()
    watch.see({"nll": 2.0})
    watch.see({"nll": 1.5, "return": math.nan})
    assert list(watch.rows()) == []


@pytest.mark.parametrize(
    ("values", "drawn"), [([1.0], "▁"), ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"), ([2.0, 2.0], "▁▁"), (range(9), "▁▅█")]
)
def test_sparklines(values: list[float], drawn: str) -> None:
    assert sparkline(list(values), width=8 if len(values) < 9 else 3) == drawn


class Clock:
    """A second passes between any two looks at it."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def recorded(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=120, highlight=False, color_system=None)
    monkeypatch.setattr(output, "err", lambda: console)
    monkeypatch.setattr("agentgym.cli.training.err", lambda: console)
    monkeypatch.setattr("time.monotonic", Clock())
    return told


def test_a_terminal_shows_bar_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    told = recorded(monkeypatch, terminal=True)
    with Board() as board:
        for done in range(1, 4):
            board.show("rl", done, 4, {**FIGURES, "return": float(done)})
            if board.bar and board.bar.progress:
                board.bar.progress.refresh()
    said = told.getvalue()
    assert "3/4" in said
    assert "staleness  mean 0.875, max 2" in said
    assert "▁▅█ 3" in said


def test_an_evaluation_in_between_does_not_end_the_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    told = recorded(monkeypatch, terminal=True)
    with Board() as board:
        board.show("rl", 1, 2, {"return": 1.0})
        board.show("step 1", 1, 1, {"success": 0.5})
        board.show("rl", 2, 2, {"return": 2.0})
    assert board.watches["rl"].curves["return"] == [1.0, 2.0]
    lines = [line for line in told.getvalue().splitlines() if line.startswith(("rl: ", "step 1: "))]
    assert lines[0] == "step 1: success 0.5"
    assert lines[1].startswith("rl: 2 steps, ")


def test_elsewhere_a_line_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    told = recorded(monkeypatch, terminal=False)
    with Board() as board:
        for done in (1, 2):
            board.show("rl", done, 2, FIGURES)
    said = told.getvalue()
    assert said.startswith("rl: 2 steps, ")
    assert "cache" not in said
    assert said.count("\n") == 1
