"""The README is true: its Python runs as written, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentgym.cli.arguments import parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_runs_in_one_go() -> None:
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0\.\d\d in \(0\.\d+, 0\.\d+\)\n", done.stdout)


def test_the_first_example_is_short() -> None:
    written = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(written) <= 25


def lines() -> list[str]:
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("agentgym ")]


@pytest.mark.parametrize("line", lines())
def test_commands_parse(line: str) -> None:
    """Also those of plugins; the parser refuses a command that there is not."""
    words = shlex.split(line, comments=True)[1:]
    parser(words).parse_args(words)


def test_makefile_has_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_every_extra_and_pin_is_kept_apart() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", pin) for pin in pins)
    assert "torch==2.13.0" in pins
