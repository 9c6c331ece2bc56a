"""What may be typed: the parser, and nothing that does work. Commands are imported when they run.

An outsider's package adds a subcommand with an entry point in the group `agentgym.commands`, leading to a list of
`Spec`; the spec's target gets the subcommand's parser, adds its arguments, and sets the default `run` to a function
from the parsed options to an exit code.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from agentgym import __version__
from agentgym.errors import ConfigError, unknown

Add = Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, and the way out."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole parser. Plugins are only looked for when `words` name no command of ours: scanning costs 0.1 s."""
    root = Parser(prog="agentgym", description="Train and judge language-model agents in multi-turn environments.")
    root.add_argument("--version", action="version", version=f"agentgym {__version__}")
    commands = root.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, (summary, target, add) in COMMANDS.items():
        sub = _command(commands, name, summary)
        sub.set_defaults(run=_later(target))
        add(sub)
    if not words or words[0] not in COMMANDS:
        _add_plugins(commands)
    if words and not words[0].startswith("-") and words[0] not in commands.choices:
        raise unknown("command", words[0], commands.choices)
    return root


def _command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return sub


def _add_plugins(commands: Any) -> None:
    from agentgym import registry

    for name, spec in registry.catalogue("commands").items():
        spec.load()(_command(commands, name, spec.summary))


def _later(target: str) -> Callable[[argparse.Namespace], Any]:
    """The function at "module:name" under this package, imported when called."""
    module, _, name = target.partition(":")
    return lambda options: getattr(importlib.import_module(f"agentgym.cli.{module}"), name)(options)


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _settings(sub: argparse.ArgumentParser, sections: str) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="settings",
        help=f"change a setting ({sections}); the value is TOML, or else a string. May be repeated",
    )


def _which_tasks(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--split", default="test", help="whose tasks: train, test, ... (default: %(default)s)")
    sub.add_argument("--seed", type=int, default=0, metavar="K", help="of tasks and of sampling (default: %(default)s)")


def _list(sub: argparse.ArgumentParser) -> None:
    _json(sub)


def _check(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("id", help="an environment, as in `agentgym list`, or gym:ID for one of Gymnasium's")
    _settings(sub, "env.*")
    _json(sub)


def _play(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("id", help="an environment")
    _which_tasks(sub)
    sub.add_argument("--task", type=int, default=0, metavar="N", help="the N-th task of the split, from 0")
    sub.add_argument("--html", metavar="FILE", help="write the episode as a page")
    _settings(sub, "env.*")


def _eval(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("id", help="an environment")
    sub.add_argument(
        "--policy",
        required=True,
        metavar="NAME|URL|CHECKPOINT",
        help="a reference policy of the environment (random, ..., oracle), a policy of `agentgym list`, a folder with "
        "a checkpoint or a run, or the URL of an endpoint",
    )
    sub.add_argument("--episodes", type=int, default=100, metavar="N", help="how many tasks (default: %(default)s)")
    sub.add_argument("--attempts", type=int, default=1, metavar="K", help="episodes a task, for Avg@K and Pass^K")
    sub.add_argument("--concurrency", type=int, default=64, metavar="N", help="episodes at once (default: %(default)s)")
    _which_tasks(sub)
    _settings(sub, "env.*, policy.*, sampling.*")
    _json(sub)


def _train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("preset", nargs="?", metavar="PRESET|FILE.toml", help="as in `agentgym list`, or a TOML file")
    sub.add_argument("--out", metavar="DIR", help="the run's folder (default: the first free runs/NAME, NAME-2, ...)")
    sub.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    sub.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="resume after a crash (a signal, no memory left), at most N times in a row without progress",
    )
    sub.add_argument("--dry-run", action="store_true", help="print the resolved config, memory, time and a verdict")
    _settings(sub, "any key of the config, env.* among them")
    _json(sub)


def _replay(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("trajectory", metavar="RUN[:N|:EPISODE]", help="a run's folder; which episode, by index or id")
    sub.add_argument("--html", metavar="FILE", help="write the recorded episode as a page")
    _json(sub)


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_folder", metavar="DIR", help="a run's folder")
    sub.add_argument("--out", metavar="FILE", help="where the page goes (default: DIR/report.html)")


def _bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", nargs="?", help="a benchmark; without it, those that there are")
    _settings(sub, "what the benchmark takes")
    _json(sub)


def _completion(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script to print")


COMMANDS: dict[str, tuple[str, str, Add]] = {
    "list": ("environments, presets, policies, trainers, benchmarks", "catalogue:run_list", _list),
    "check": ("hold an environment to the rules every environment keeps", "environments:run_check", _check),
    "play": ("play an episode yourself", "play:run_play", _play),
    "eval": ("judge a policy on the tasks of a split", "evaluation:run_eval", _eval),
    "train": ("train, from a preset or a file", "training:run_train", _train),
    "replay": ("execute a recorded episode again and compare", "runs:run_replay", _replay),
    "report": ("write a run's page: curves, before and after, examples", "runs:run_report", _report),
    "bench": ("measure", "catalogue:run_bench", _bench),
    "completion": ("print a completion script for your shell", "catalogue:run_completion", _completion),
}
