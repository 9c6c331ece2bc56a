"""`agentgym train --restarts N`: crashes are resumed while they lead somewhere; what asks for an end gets it."""

from __future__ import annotations

import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from agentgym.cli import restarts
from agentgym.cli.restarts import keep_going, progress, words
from agentgym.store import RunFolder

LIFE = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "journal").mkdir(parents=True, exist_ok=True)
(folder / "config.toml").touch()
with open(folder / "lives", "a+") as lives:
    print(json.dumps(sys.argv[2:]), file=lives, flush=True)
    lives.seek(0)
    number = len(lives.readlines())
"""
Live = Callable[[str], None]


def options(restarts: int, resume: str | None = None) -> Namespace:
    return Namespace(restarts=restarts, resume=resume, preset="small.toml", settings=["a.b=1"], json=True, debug=False)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Live:
    """Every life of the training is this script."""

    def begin(script: str) -> None:
        monkeypatch.setattr(restarts, "COMMAND", (sys.executable, "-c", LIFE + script, str(tmp_path / "run")))

    return begin


def asked(run: Path) -> list[list[str]]:
    """With which arguments each life began."""
    return [json.loads(line) for line in (run / "lives").read_text().splitlines()]


def test_a_crash_is_resumed_to_the_end(live: Live, tmp_path: Path) -> None:
    live("os.kill(os.getpid(), 9) if number < 3 else sys.exit(1)")
    assert keep_going(options(2), tmp_path / "run") == 1, "the exit code of the last life"
    folder = str(tmp_path / "run")
    first, *others = asked(tmp_path / "run")
    assert first == ["train", "small.toml", "--out", folder, "--set", "a.b=1", "--json"]
    assert others == [["train", "--resume", folder, "--json"]] * 2


def test_crashes_that_lead_nowhere_end_it(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live("os.kill(os.getpid(), 9)")
    assert keep_going(options(2), tmp_path / "run") == 128 + 9
    assert len(asked(tmp_path / "run")) == 3
    assert "died: signal SIGKILL" in capsys.readouterr().err


def test_progress_gives_new_restarts(live: Live, tmp_path: Path) -> None:
    live(
        "if number == 6: sys.exit(0)\n(folder / 'journal' / '0.frames').write_text(number * '.')\n"
        "os.kill(os.getpid(), 11)"
    )
    assert keep_going(options(1), tmp_path / "run") == 0
    assert len(asked(tmp_path / "run")) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_asks_for_an_end_ends_it(live: Live, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM comes to us and is passed on; Ctrl-C reaches the training by itself, which says how to go on."""
    before = signal.getsignal(number)
    if number == signal.SIGTERM:
        live("os.kill(os.getppid(), 15)\ntime.sleep(30)")
        assert keep_going(options(5), tmp_path / "run") == 128 + 15
    else:
        live("os.kill(os.getppid(), 2)\nsys.exit(130)")
        assert keep_going(options(5), tmp_path / "run") == 130
    assert len(asked(tmp_path / "run")) == 1
    assert signal.getsignal(number) == before


def test_a_run_that_died_before_it_began_begins_again(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert words(options(1), tmp_path, begun=False)[:4] == ["train", "small.toml", "--out", folder]
    assert words(options(1, resume=folder), tmp_path, begun=True) == ["train", "--resume", folder, "--json"]


def test_progress_is_a_checkpoint_or_something_played(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as folder:
        seen = [progress(folder.path)]
        (folder.path / "journal").mkdir()
        (folder.path / "journal" / "000000.frames").write_bytes(b"12345678")
        seen.append(progress(folder.path))
        with folder.checkpoint(4):
            (folder.path / "journal" / "000000.frames").unlink()
        seen.append(progress(folder.path))
    assert seen == [(-1, 0), (-1, 8), (4, 0)]


def test_a_real_error_is_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would meet the next life again."""
    from agentgym.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["train", "nowhere.toml", "--restarts", "3", "--out", str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err.count("nowhere.toml") == 1
    assert main(["train", "--resume", "nowhere", "--restarts", "3", "--set", "a=1"]) == 2
    assert "its own config" in capfd.readouterr().err
