"""An environment from somebody else's folder: two files, nothing of ours edited, every command works."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "higher-lower"
version = "0.1"

[project.entry-points."agentgym.envs"]
catalogue = "higher_lower:ENVIRONMENTS"

[project.entry-points."agentgym.commands"]
catalogue = "higher_lower:COMMANDS"
"""

MODULE = '''\
"""Guess a number between 1 and 15 from the answers "higher" and "lower"."""

from itertools import count

from agentgym.env import SingleAgentEnv
from agentgym.policy import Scripted
from agentgym.registry import Spec
from agentgym.seeding import key, rng
from agentgym.types import Action, StepResult, Task, say, terms

ENVIRONMENTS = [Spec(id="outsider/higher-v0", target="higher_lower:HigherLower", summary="guess a number")]
COMMANDS = [Spec(id="higher", target="higher_lower:command", summary="say higher")]


def command(parser):
    parser.add_argument("times", type=int)
    parser.set_defaults(run=lambda options: print("higher " * options.times))


class HigherLower(SingleAgentEnv):
    id = "outsider/higher-v0"
    capabilities = frozenset({"replay", "ladder"})

    def __init__(self, turns: int = 4):
        self.turns = turns

    def tasks(self, split="train", seed=0):
        for index in count():
            yield Task(env=self.id, split=split, seed=key(split, seed, index) >> 1)

    async def begin(self, task):
        self.secret, self.left = secret(task), self.turns
        return say("I think of a number from 1 to 15.")

    async def act(self, action):
        if self.left <= 0:
            raise RuntimeError("the episode is over")
        self.left -= 1
        guess = int(action.text) if action.text.isascii() and action.text.isdecimal() and len(action.text) < 5 else 0
        if guess == self.secret or not self.left:
            won, self.left = float(guess == self.secret), 0
            return None, StepResult(terminated=True, rewards=terms({"won": won}), metrics={"success": won})
        return say("higher" if guess < self.secret else "lower"), StepResult()

    def ladder(self):
        return {"random": Scripted(guesser), "halving": Scripted(halver), "oracle": Scripted(oracle)}


def secret(task):
    return 1 + task.seed % 15


def guesser(episode, agent):
    draw = rng(episode.seed, episode.member, "guess")
    return lambda seen: Action(text=str(draw.randint(1, 15)))


def halver(episode, agent):
    low, high, guess = 1, 15, None

    def act(seen):
        nonlocal low, high, guess
        if guess and seen.messages[-1].text == "higher":
            low = guess + 1
        elif guess:
            high = guess - 1
        guess = (low + high) // 2
        return Action(text=str(guess))

    return act


def oracle(episode, agent):
    return lambda seen: Action(text=str(secret(episode.task)))
'''


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a machine on which the outsider's package is installed."""
    source = tmp_path_factory.mktemp("higher-lower")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "higher_lower.py").write_text(MODULE)
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=100)
    return {**os.environ, "PYTHONPATH": str(target)}


def agentgym(outside: dict[str, str], *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agentgym.cli", *words]
    return subprocess.run(command, env=outside, input=stdin, capture_output=True, text=True, timeout=60)


def test_two_files_of_at_most_120_lines() -> None:
    assert len(PROJECT.splitlines()) + len(MODULE.splitlines()) <= 120


def test_it_is_listed(outside: dict[str, str]) -> None:
    listed = json.loads(agentgym(outside, "list", "--json").stdout)
    assert "outsider/higher-v0" in [line["id"] for line in listed["envs"]]


def test_make_sees_it(outside: dict[str, str]) -> None:
    code = "import agentgym; print(agentgym.make('outsider/higher-v0', turns=2).turns)"
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2", done.stderr


def test_it_passes_the_check(outside: dict[str, str]) -> None:
    done = agentgym(outside, "check", "outsider/higher-v0", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize(("policy", "low", "high"), [("random", 0.0, 0.6), ("halving", 1.0, 1.0), ("oracle", 1.0, 1.0)])
def test_it_is_judged(outside: dict[str, str], policy: str, low: float, high: float) -> None:
    done = agentgym(outside, "eval", "outsider/higher-v0", "--policy", policy, "--episodes", "40", "--json")
    assert done.returncode == 0, done.stderr
    assert low <= json.loads(done.stdout)["success"] <= high


def test_it_is_played_through_a_pipe(outside: dict[str, str]) -> None:
    lines = "8\n8\n8\n8\n"
    done = agentgym(outside, "play", "outsider/higher-v0", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "I think of a number" in done.stdout
    assert "terminated: return" in done.stdout


def test_its_misspelt_setting_names_the_nearest(outside: dict[str, str]) -> None:
    done = agentgym(outside, "eval", "outsider/higher-v0", "--policy", "random", "--set", "env.turn=3")
    assert done.returncode == 2
    assert "did you mean 'turns'?" in done.stderr


def test_its_command_joins_ours(outside: dict[str, str]) -> None:
    assert agentgym(outside, "higher", "2").stdout == "higher higher \n"
    assert "higher" in agentgym(outside, "--help").stdout
