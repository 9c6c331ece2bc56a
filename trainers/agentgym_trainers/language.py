"""The model of a run: one set of weights that the engine samples from and the learner moves, in place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from agentgym import registry
from agentgym.collate import collate
from agentgym.env import Environment
from agentgym.errors import ConfigError
from agentgym.modeling import build, tokenizer
from agentgym.modeling.renderer import Renderer
from agentgym.types import Sampling, WeightsVersion
from agentgym_trainers.config import Config
from agentgym_trainers.forward import Blank

ENGINE = "torch"
"""The policy of the catalogue that samples: its class takes a module and a renderer and shares the weights."""


class LanguageModel:
    """A `Trainable` with its engine. Sharing in place is sound because nothing is sampled while the learner moves."""

    def __init__(self, model: Any, renderer: Renderer, engine: Any) -> None:
        self.model, self.renderer, self.engine = model, renderer, engine

    def module(self) -> nn.Module:
        module: nn.Module = self.model
        return module

    @property
    def blank(self) -> Blank:
        """What a masked observation token becomes: padding, or the end mark; the template's marks stay."""
        tokens = self.renderer.tokenizer
        filler = tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
        return Blank(filler or 0, tuple(tokens.all_special_ids))

    collate = staticmethod(collate)

    async def publish(self, version: WeightsVersion) -> None:
        await self.engine.publish(version)

    def save(self, path: Path) -> None:
        """Write the model in hub format."""
        build.save(self.model, self.renderer.tokenizer, path)

    def close(self) -> None:
        self.engine.close()


def make(config: Config, env: Environment, checkpoint: Path | None = None, texts: Iterable[str] = ()) -> LanguageModel:
    """The model that the config describes, with the weights of `checkpoint` where one is given.

    `texts` train the tokenizer where the config asks for one of kind "bpe".
    """
    found = config.model
    folder = checkpoint or (Path(found.path) if found.path else None)
    if folder is None:
        tokens = _tokenizer(config, env, texts)
        shape = {name: getattr(found, name) for name in ("hidden", "layers", "heads", "kv_heads", "init")}
        model = build.tiny(len(tokens), seed=config.run.seed, **shape).to(found.device)
    else:
        tokens = tokenizer.load(folder)
        model = build.load(folder, device=found.device, dtype=found.dtype)
    renderer = Renderer(tokens, found.history, template=found.template or None)
    return LanguageModel(model, renderer, engine(config, model, renderer))


def _tokenizer(config: Config, env: Environment, texts: Iterable[str]) -> Any:
    if config.model.tokenizer == "bpe":
        return tokenizer.train_bpe(texts, config.model.vocabulary)
    if not hasattr(env, "vocabulary"):
        raise ConfigError(
            f"model.tokenizer = 'closed' needs an environment with a method vocabulary(); {env.id} has none. Set "
            "model.tokenizer = 'bpe', or model.path to a model's folder"
        )
    return tokenizer.closed_vocabulary(env.vocabulary())


def engine(config: Config, model: Any, renderer: Renderer) -> Any:
    """The catalogue names a way to load a checkpoint; the class behind it takes what is loaded already."""
    target = registry.load(ENGINE, "policies")
    rollout = config.rollout
    sizes = {"max_length": rollout.max_length} if rollout.max_length else {}
    return getattr(target, "__self__", target)(
        model,
        renderer,
        slots=rollout.slots,
        sampling=Sampling() if config.sampling is None else config.sampling,
        seed=config.run.seed,
        deterministic=config.run.deterministic,
        threads=config.run.threads or None,
        **sizes,
    )
