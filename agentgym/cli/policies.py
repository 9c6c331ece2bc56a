"""From what `--policy` says to a policy: a rung of the ladder, a catalogue entry, a checkpoint, an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentgym import presets, registry
from agentgym.env import Environment
from agentgym.errors import ConfigError, DataError, unknown
from agentgym.policy import Policy
from agentgym.testing.actions import RandomActions

HUB_MARK = "config.json"
"""The file that makes a folder a checkpoint in hub format."""
RUN_MARK = "config.toml"
"""The file that makes a folder a run."""


def resolve(env: Environment, name: str, settings: Mapping[str, Any]) -> Policy:
    """The policy that `name` means for this environment; an error lists what could have been meant.

    "random" always means something: where the environment has no such rung, legal actions at random.
    """
    ladder: dict[str, Policy] = {"random": RandomActions(env), **env.ladder()}
    if name in ladder:
        return ladder[name]
    if "://" in name:
        return _load("endpoint", name, **settings)
    if Path(name).exists():
        return _load("torch", str(checkpoint_of(Path(name))), **settings)
    if name in registry.catalogue("policies"):
        return _load(name, **settings)
    raise unknown(
        f"policy for {env.id}", name, (*ladder, *registry.catalogue("policies")), "or a folder with a checkpoint"
    )


def _load(name: str, *given: str, **settings: Any) -> Policy:
    target = registry.load(name, "policies")
    registry.check_keywords(f"setting of the policy {name!r}", target, settings)
    try:
        policy: Policy = target(*given, **settings)
    except TypeError as error:
        raise ConfigError(f"the policy {name!r} cannot be made from that: {error}") from error
    return policy


def checkpoint_of(folder: Path) -> Path:
    """The hub-format folder meant: this one, or the last checkpoint of the run that this is."""
    if (folder / HUB_MARK).is_file():
        return folder
    if (folder / RUN_MARK).is_file():
        from agentgym.store import load_run

        found = load_run(folder).checkpoints
        if found:
            return hub_folder(Path(found[-1].path))
        raise DataError(f"the run {folder} has no checkpoint yet")
    raise DataError(f"{folder} is neither a checkpoint (no {HUB_MARK}) nor a run (no {RUN_MARK})")


def hub_folder(checkpoint: Path) -> Path:
    """Where a run's checkpoint keeps the model: itself, or the one folder in it that is in hub format."""
    inner = [path.parent for path in sorted(checkpoint.rglob(HUB_MARK))]
    if not inner:
        raise DataError(f"the checkpoint {checkpoint} holds no model in hub format (no {HUB_MARK})")
    return inner[0]


def trained_with(name: str) -> presets.Table:
    """The resolved config of the run that a checkpoint belongs to; {} when `name` is no part of a run.

    A policy is judged in the environment it was trained in (surface, catalogue, turn budget) unless told otherwise.
    """
    path = Path(name)
    if "://" in name or not path.exists():
        return {}
    path = path.resolve()
    for folder in (path, *list(path.parents)[:3]):
        if (folder / RUN_MARK).is_file():
            return presets.read_toml(folder / RUN_MARK)
    return {}


def rendering(trained: Mapping[str, Any]) -> presets.Table:
    """How the run rendered conversations: its model is to read the same ids again."""
    model = trained.get("model", {})
    return {name: model[name] for name in ("history", "template") if model.get(name)}
