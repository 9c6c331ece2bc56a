"""Functions of your own on an axis: `{kind = "custom", target = "package.module:function", options = {...}}`.

    ratio          (tokens) -> Parts
    gate           (tokens, parts) -> objective [M], to be maximised
    behaviour      (tokens, weights so far [M]) -> weights [M], without gradient
    aggregation    (values [M], to be maximised, regularisers subtracted; tokens, totals) -> scalar, linear in the
                   values, that adds up over micro-batches
    regularisers   (tokens) -> penalty [M]
    contrast       (tokens) -> advantages [M], without gradient

`options` come on top as keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from agentgym.errors import ConfigError
from agentgym_trainers.objective import declare


def call(declared: declare.Custom, *given: Any) -> Any:
    """What the function returns for this; `ConfigError` where there is no such function."""
    return resolve(declared.target)(*given, **declared.options)


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The function at "package.module:function"."""
    module, _, name = target.partition(":")
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"no function at target = {target!r} ({error}); it is 'package.module:function'") from error
    except Exception as error:  # whatever a module of somebody else's does when it is imported
        raise ConfigError(f"target = {target!r}: importing it raises {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"target = {target!r} is a {type(found).__name__}, not a function")
    return found
