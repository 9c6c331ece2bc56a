"""Every error this package raises on purpose. The tree:

AgentGymError
├── UnknownName          an id, preset, policy or key that does not exist; names the nearest one
├── DuplicateName        an id registered twice
├── MissingExtra         an optional dependency is not installed; names the extra
├── ConfigError          a value that a config may not hold
├── DataError            a user's file cannot be read as asked (catalogue, trajectory, preset)
├── RecordError          a record breaks its own rules (attribution, schema, spans)
├── StoreError           a run folder is damaged, locked or full
├── ModelError           a model or tokenizer cannot do what was asked
└── Fault                something other than the policy broke; becomes a `Failure`, is retried, is never a reward
    ├── EnvironmentFault
    ├── ToolFault
    ├── SandboxUnavailable
    ├── EngineFault
    └── DeadlineExceeded
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class AgentGymError(Exception):
    """Root of the tree: catch this to catch everything the gym raises on purpose."""


class UnknownName(AgentGymError, LookupError):
    """A name that does not exist. Built by `unknown`, so that it always names the nearest one."""


class DuplicateName(AgentGymError, ValueError):
    """The name is taken: registering the same id twice is an error, never an override."""


class MissingExtra(AgentGymError, ImportError):
    """An optional dependency is absent. The message holds the pip command that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra [{extra}]: pip install 'agentgym-suite[{extra}]'")


class ConfigError(AgentGymError, ValueError):
    """A configuration that cannot be meant; the message names the key, the value and the way out."""


class DataError(AgentGymError, ValueError):
    """A user's file that cannot be read as asked; the message names file, line and what was expected."""


class RecordError(AgentGymError, ValueError):
    """A record that breaks its own rules, such as attributions that do not add up."""


class StoreError(AgentGymError, OSError):
    """A run folder that is damaged, locked, or on a full disk."""


class ModelError(AgentGymError, RuntimeError):
    """A model or tokenizer that cannot do what was asked of it."""


class Fault(AgentGymError):
    """Something other than the policy broke. The runner turns it into a `Failure` of this `kind`."""

    kind: ClassVar[str] = "environment"


class EnvironmentFault(Fault):
    """The environment itself broke."""


class ToolFault(Fault):
    """A tool of the environment broke (not: was used wrongly, which is the policy's outcome)."""

    kind = "tool"


class SandboxUnavailable(Fault):
    """No sandbox could be had, or it died under the call."""

    kind = "sandbox"


class EngineFault(Fault):
    """The policy's engine or endpoint broke: a 500, a lost worker, not enough memory."""

    kind = "engine"


class DeadlineExceeded(Fault):
    """A turn or an episode ran past its deadline."""

    kind = "timeout"


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """An `UnknownName` that names the nearest existing name, or all of them when they are few."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        way_out = f"did you mean {near[0]!r}?"
    elif names and len(names) <= 12:
        way_out = "there are: " + ", ".join(names)
    else:
        way_out = f"{len(names)} exist, none alike"
    return UnknownName(f"no {kind} {name!r}; {way_out}" + (f" ({hint})" if hint else ""))
