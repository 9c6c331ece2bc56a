"""Low-rank adapters: declared, put beside a model's linear layers, written, read back and merged.

The layers are those of the library peft, put in place: the model stays the same object of the same class, so engine
and learner read it as before. Adapters are float32 whatever the model is: a step of 1e-6 would vanish in bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentgym.errors import ConfigError, MissingExtra, ModelError

NAME = "default"
"""peft's name of the one set of adapters."""
WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
"""The file, and how its names begin, where peft looks for them."""


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters of `rank`, scaled by alpha / rank (2106.09685), beside the linear layers whose names end in `targets`
    (empty = every linear layer but the unembedding)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < float("inf"):
            raise ConfigError(f"model.lora.rank is at least 1 and alpha positive; got {self.rank}, {self.alpha}")


def add(model: Any, declared: Lora, *, seed: int = 0) -> None:
    """Put adapters in place; from now on they alone require gradients. They begin at zero effect.

    The first weights depend on `seed` alone. Raises `ConfigError` for targets that the model does not have, and
    `MissingExtra` without peft.
    """
    try:
        peft: Any = import_module("peft")
    except ModuleNotFoundError as error:
        raise MissingExtra("model.lora", "lora") from error
    config = peft.LoraConfig(
        r=declared.rank,
        lora_alpha=declared.alpha,
        target_modules=list(declared.targets) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets = {list(declared.targets)}: {error}") from error
    for p in _adapters(model).values():
        p.data = p.data.float()
    model.eval()


def adapted(model: Any) -> bool:
    """Whether `add` put adapters into this model."""
    return bool(_layers(model))


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as if there were no adapters: they are merged, one layer at a time. Each tied tensor comes once;
    the model is left as it is."""
    layers = _layers(model)
    for name, p in model.named_parameters():
        owner, _, last = name.replace(".base_layer.", ".").rpartition(".")
        if ".lora_" in name:
            continue
        merge = last == "weight" and owner in layers
        yield f"{owner}.{last}", _merged(layers[owner]) if merge else _whole(p.detach())


def save(model: Any, folder: Path) -> None:
    """Write the adapters alone, as peft reads them: `PeftModel.from_pretrained(base, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[NAME].save_pretrained(folder)
    save_file({k: _whole(p.detach()).contiguous() for k, p in _adapters(model).items()}, folder / WEIGHTS)


def load(model: Any, folder: Path) -> None:
    """Give the adapters of `model` the values that `save` wrote, bit for bit. `ModelError` where they do not fit."""
    held, here = load_file(folder / WEIGHTS), _adapters(model)
    if {k: v.shape for k, v in held.items()} != {k: p.shape for k, p in here.items()}:
        raise ModelError(f"the adapters in {folder} are not those of this model; keep model.path and model.lora")
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(held[name])


def twin(model: Any) -> Any:
    """A copy with adapters of its own that shares the base weights, which nothing moves. A model without adapters is
    copied whole."""
    shared = {id(p): p for name, p in model.named_parameters() if ".lora_" not in name} if adapted(model) else {}
    return copy.deepcopy(model, shared)


def _layers(model: Any) -> dict[str, Any]:
    """The modules that hold adapters, by the hub's name of the linear layer inside."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def _adapters(model: Any) -> dict[str, Tensor]:
    """By peft's names."""
    named = ((n, p) for n, p in model.named_parameters() if ".lora_" in n)
    return {PREFIX + name.replace(f".{NAME}.", "."): p for name, p in named}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """base + scale B A, summed in float32."""
    base, a, b = (_whole(x) for x in (layer.base_layer.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight))
    return (base.float() + layer.scaling[NAME] * (b @ a)).to(base.dtype)


def _whole(x: Tensor) -> Tensor:
    """A tensor that ranks hold in shards, put together; any other as it is."""
    gathered: Any = getattr(x, "full_tensor", None)
    return x if gathered is None else gathered()
