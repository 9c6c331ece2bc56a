"""Making an environment from an id and settings, and `agentgym check`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from agentgym import presets, registry
from agentgym.cli.output import err, out
from agentgym.env import Environment, task_list
from agentgym.errors import ConfigError
from agentgym.types import Task


def settings_of(options: Namespace, *known: str) -> presets.Table:
    """The `--set` of a command line, by section."""
    return presets.sections(presets.parse_settings(options.settings), known)


def make(id: str, config: Mapping[str, Any]) -> Environment:
    """`registry.make`, where a preset may also have said the id."""
    return registry.make(id, **{key: value for key, value in config.items() if key != "id"})


def nth_task(env: Environment, split: str, seed: int, number: int) -> Task:
    """Task `number` of a split, from 0."""
    tasks = task_list(env, split, seed, number + 1)
    if number < 0 or len(tasks) <= number:
        raise ConfigError(f"{env.id} has {len(tasks)} tasks in {split!r}; there is no number {number}")
    return tasks[number]


def run_check(options: Namespace) -> int:
    """Every rule, one line each; exit code 1 when one is broken."""
    env = make(options.id, settings_of(options, "env")["env"])
    from agentgym.testing import check_env

    err().print(f"checking {options.id} ...", style="dim")
    report = check_env(env)
    if options.json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        out().print(report)
    return report.exit_code
