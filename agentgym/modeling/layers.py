"""The stack of decoder layers of a model: found, cut short, run again in the backward pass, compiled in part."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentgym.errors import ConfigError, ModelError


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, first to last; `ModelError` where the model shows no list of as many as its config has."""
    return getattr(*_place(model))


def _place(model: Any) -> tuple[nn.Module, str]:
    """Who holds the layers, and under which name."""
    depth, base = model.config.get_text_config().num_hidden_layers, model.base_model
    stacks = (n for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    owner, _, name = next(stacks, "").rpartition(".")
    if not name:
        raise ModelError(f"{type(model).__name__} shows no list of {depth} layers")
    return base.get_submodule(owner), name


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[None]:
    """The model without its layers after `count` (1 = the first); the final norm stays. `ModelError` outside 1..all."""
    depth = model.config.get_text_config().num_hidden_layers
    if not 1 <= count <= depth:
        raise ModelError(f"no layer {count} in a model of {depth} layers")
    holder, name = _place(model)
    whole = getattr(holder, name)
    setattr(holder, name, whole[:count])
    try:
        yield
    finally:
        setattr(holder, name, whole)


def checkpoint_layers(model: Any) -> None:
    """Keep only the input of each layer for the backward pass, which runs the layer again: a third more time.

    transformers' own switch is bound to train mode, which would bring dropout and is lost when an engine that shares
    the module sets eval mode. This one is bound to gradients: a pass without them, or with a cache, is as it was.
    """
    for layer in layers_of(model):
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], hidden: Tensor, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled() or options.get("past_key_values") is not None:
        return forward(hidden, *args, **options)
    return checkpoint(forward, hidden, *args, use_reentrant=False, preserve_rng_state=False, **options)


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Run norms and MLPs of the layers through torch.compile, in passes with gradients alone: an engine that shares the
    module decodes as before. A copy of the model compiles its own.

    Attention stays as it is: its blocks change shape with every batch, and a layer compiled around them took minutes to
    compile. `ConfigError` where the CPU has no C++ compiler.
    """
    tools = (os.environ.get("CXX"), "g++", "clang++", "cl")
    on_cpu = backend == "inductor" and next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(which(tool) for tool in tools if tool):
        raise ConfigError(
            "model.compile needs a C++ compiler on the CPU (g++, clang++ or $CXX); install one or drop it"
        )
    parts = (part for layer in layers_of(model) for part in layer.children() if not hasattr(part, "q_proj"))
    for part in parts:
        part.forward = _Learning(part.forward, backend)


class _Learning:
    """A forward pass, compiled where there are gradients. What was compiled is bound to one module's weights."""

    def __init__(self, plain: Callable[..., Any], backend: str) -> None:
        self.plain, self.backend = plain, backend
        self.compiled = torch.compile(plain, dynamic=True, backend=backend)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return (self.compiled if torch.is_grad_enabled() else self.plain)(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Learning:
        return _Learning(copy.deepcopy(self.plain, memo), self.backend)
