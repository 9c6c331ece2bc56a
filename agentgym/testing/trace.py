"""`python -m agentgym.testing.trace ID`: play a few episodes of an environment and print them as JSON lines.

The last line is {"digest": ...}. Two processes, whatever their PYTHONHASHSEED, must print the same.
`--pickled` reads a pickled environment from standard input instead of making one by id.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import subprocess
import sys
from typing import Any

from agentgym.env import Environment
from agentgym.registry import _registered, make
from agentgym.seeding import digest
from agentgym.testing.drive import Trace, difference, plain
from agentgym.testing.report import CheckFailed, Skipped
from agentgym.testing.subject import Settings, Subject
from agentgym.types import Record

FOREIGN = 66
"""Exit status: the environment's class lives in a script, notebook or test that other processes cannot import."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m agentgym.testing.trace", description=__doc__)
    parser.add_argument("id", help="the environment's id")
    parser.add_argument("--config", default="{}", help="its configuration, as JSON")
    parser.add_argument("--pickled", action="store_true", help="read the environment from standard input")
    for name, default in (("episodes", 4), ("seed", 0), ("steps", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(arguments)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    env = _unpickled() if asked.pickled else make(asked.id, **json.loads(asked.config))
    for line in asyncio.run(_lines(env, asked.episodes, asked.seed, asked.steps)):
        print(line)


def _unpickled() -> Environment:
    """The environment on standard input; ends the process with `FOREIGN` where its code cannot be imported here."""
    try:
        found: Environment = pickle.load(sys.stdin.buffer)
    except (ImportError, AttributeError) as error:
        print(error, file=sys.stderr)
        sys.exit(FOREIGN)
    return found


async def _lines(env: Environment, episodes: int, seed: int, steps: int) -> list[str]:
    subject = Subject(env, Settings(episodes=episodes, seed=seed, steps=steps, patience=30.0))
    return printed(await subject.baseline())


def printed(traces: list[Trace]) -> list[str]:
    """A JSON line for each trace, and one with the digest of them all."""
    lines = [json.dumps(readable(trace)) for trace in traces]
    return [*lines, json.dumps({"digest": digest(*lines).hex()})]


def readable(record: Record) -> Any:
    """A record as JSON can hold it: bytes as hexadecimal."""
    return json.loads(json.dumps(plain(record), default=lambda value: value.hex()))


def run_elsewhere(subject: Subject, hash_seed: int) -> list[str]:
    """The lines another process prints under this PYTHONHASHSEED; `Skipped` where the environment cannot travel."""
    arguments, data = _passport(subject.env)
    command = [sys.executable, "-m", "agentgym.testing.trace", *arguments]
    command += [f"--episodes={subject.episodes}", f"--seed={subject.seed}", f"--steps={subject.steps}"]
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    surroundings = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, input=data, capture_output=True, env=surroundings, timeout=subject.seconds)
    except subprocess.TimeoutExpired as error:
        raise CheckFailed(f"{subject.episodes} episodes in another process take over {subject.seconds:g} s") from error
    last = "".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])[:300]
    if done.returncode == FOREIGN:
        raise Skipped(f"another process cannot import the environment's class: {last}")
    if done.returncode:
        raise CheckFailed(f"another process ended with {done.returncode}: {last}")
    return done.stdout.decode().splitlines()


def _passport(env: Environment) -> tuple[list[str], bytes]:
    """How another process gets the same environment: by id where it can be made there, else pickled."""
    config = vars(env).get("made_with")
    if config is not None and env.id not in _registered["envs"]:
        try:
            return [env.id, f"--config={json.dumps(config)}"], b""
        except TypeError:
            pass
    try:
        data = pickle.dumps(env)
    except Exception as error:
        raise Skipped(f"the environment is neither installed under an id nor can it be pickled: {error}") from error
    return [env.id or type(env).__name__, "--pickled"], data


def compare_lines(one: list[str], other: list[str], what: str) -> None:
    """`CheckFailed` with the first difference between what two processes printed."""
    if one[-1:] == other[-1:]:
        return
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        found = difference(json.loads(a), json.loads(b))
        if found:
            raise CheckFailed(f"{what}, episode {number}: {found}")
    raise CheckFailed(f"{what}: {len(one) - 1} episodes and {len(other) - 1}")


if __name__ == "__main__":
    main()
