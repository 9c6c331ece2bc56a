"""Names to things, across rooms: the one place that resolves an id to code.

Each room, and each outsider's package, declares an entry point that leads to a catalogue: a list of `Spec`. Reading
a catalogue imports no environment, no torch, nothing heavy; only `load` imports what a name stands for.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from agentgym.env import Environment
from agentgym.errors import ConfigError, DuplicateName, MissingExtra, unknown

KINDS = ("envs", "policies", "trainers", "objectives", "sandboxes", "commands", "presets", "benches")
SINGULAR = {"envs": "environment", "policies": "policy", "sandboxes": "sandbox", "benches": "benchmark"}
GYM = "gym:"
_ENV_ID = re.compile(r"(?:[\w.-]+/)?[A-Za-z][\w-]*-v\d+")


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a catalogue: what a name stands for, known without importing it.

    `target` is "module:attribute" or, for a preset, the path of a TOML file. `extra` is the install extra it needs,
    `requires` the modules that extra brings (checked before the import, to name the extra and not the module).
    """

    id: str
    target: str | Callable[..., Any]
    summary: str = ""
    extra: str = ""
    requires: tuple[str, ...] = ()
    defaults: dict[str, Any] = {}

    def load(self) -> Any:
        """Import what the name stands for; `MissingExtra` where an optional dependency is absent."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if self.extra and (missing in self.requires or not self.requires):
                raise MissingExtra(self.id, self.extra) from error
            raise
        for name in attribute.split("."):
            found = getattr(found, name)
        return found


_registered: dict[str, dict[str, Spec]] = {kind: {} for kind in KINDS}


def register(id: str, target: str | Callable[..., Any], *, kind: str = "envs", **fields: Any) -> Spec:
    """Add a name. An environment's id is versioned (`name-v0`, `yours/name-v1`); a taken id is an error.

    >>> register("maze-v0", MazeEnv, summary="a maze")     # a class, or any callable that returns an Environment
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if kind == "envs" and not _ENV_ID.fullmatch(id):
        raise ConfigError(f"an environment's id is versioned, like 'name-v0' or 'yours/name-v1'; got {id!r}")
    if id in catalogue(kind):
        raise DuplicateName(f"{kind} {id!r} is registered already ({catalogue(kind)[id].target}); choose another id")
    spec = Spec(id=id, target=target, **fields)
    _registered[kind][id] = spec
    return spec


def unregister(id: str, *, kind: str = "envs") -> None:
    """Take back what `register` added in this process."""
    if _registered[kind].pop(id, None) is None:
        raise unknown(kind, id, _registered[kind])


def registered() -> Iterator[tuple[str, Spec]]:
    """Kind and line of every name that `register` added in this process; another one does not have them."""
    return ((kind, spec) for kind, specs in _registered.items() for spec in specs.values())


def catalogue(kind: str = "envs") -> Mapping[str, Spec]:
    """Every known name of a kind, those of entry points and those registered here, sorted."""
    return dict(sorted({**_discovered(kind), **_registered[kind]}.items()))


@functools.cache
def _discovered(kind: str) -> dict[str, Spec]:
    """What the entry points declare. A broken plugin is reported by name and skipped; a duplicate id is an error."""
    found: dict[str, Spec] = {}
    for point in entry_points(group=f"agentgym.{kind}"):
        try:
            specs = _specs(point.load())
        except Exception as error:
            warnings.warn(f"plugin {point.value!r} is left out: {type(error).__name__}: {error}", stacklevel=2)
            continue
        for spec in specs:
            if spec.id in found:
                raise DuplicateName(f"two packages declare {kind} {spec.id!r}: {found[spec.id].target}, {spec.target}")
            found[spec.id] = spec
    return found


def _specs(declared: Any) -> list[Spec]:
    """What an entry point leads to: specs, or a function that returns them."""
    specs = list(declared() if callable(declared) else declared)
    for spec in specs:
        if not isinstance(spec, Spec):
            raise TypeError(f"a catalogue lists Specs, not {spec!r:.80}")
    return specs


def lookup(id: str, kind: str = "envs") -> Spec:
    """The spec of a name, or an `UnknownName` that names the nearest one. "gym:ID" is any gymnasium environment."""
    if kind == "envs" and id.startswith(GYM):
        return Spec(id=id, target="agentgym.adapters:GymEnv", extra="gym", defaults={"gym_id": id.removeprefix(GYM)})
    specs = catalogue(kind)
    if id not in specs:
        raise unknown(SINGULAR.get(kind, kind.rstrip("s")), id, specs)
    return specs[id]


def load(id: str, kind: str = "envs") -> Any:
    """What a name stands for."""
    return lookup(id, kind).load()


def check_keywords(what: str, target: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Refuse a keyword that `target` does not take, naming the nearest that it does."""
    import inspect

    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for keyword in keywords:
        if keyword not in parameters:
            raise unknown(what, keyword, parameters)


def make(id: str, **config: Any) -> Environment:
    """An environment by id: `agentgym.make("shopping-v0", surface="compact")`.

    The keyword arguments are the environment's config; a misspelt one is an error that names the nearest.
    What is returned may also be a class or function of the accepted shapes (see `agentgym.adapters`), wrapped.
    """
    from agentgym.adapters import adapt

    spec = lookup(id)
    built = adapt(id, spec.load(), {**spec.defaults, **config})
    built.__dict__["made_with"] = dict(config)
    return built
