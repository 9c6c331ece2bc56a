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
from agentgym.modeling import build, lora, tokenizer
from agentgym.modeling.layers import checkpoint_layers, compile_layers
from agentgym.modeling.renderer import Renderer
from agentgym.types import WeightsVersion
from agentgym_trainers.config import Config
from agentgym_trainers.forward import Blank

MAX_LENGTH = 1024
"""Tokens that a sequence may have where rollout.max_length = 0."""


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
        """Write the model in hub format, and its adapters apart."""
        build.save(self.model, self.renderer.tokenizer, path)

    def frozen(self, path: Path) -> Any:
        """The policy as `save` wrote it to `path`, for reading alone. With adapters it costs no second base."""
        if not lora.adapted(self.model):
            like = next(self.model.parameters())
            dtype = str(like.dtype).removeprefix("torch.")
            return build.load(path, device=str(like.device), dtype=dtype).requires_grad_(False)
        twin = lora.twin(self.model)
        lora.load(twin, path / build.ADAPTER)
        return twin.requires_grad_(False)

    def close(self) -> None:
        self.engine.close()


def make(config: Config, env: Environment, checkpoint: Path | None = None, texts: Iterable[str] = ()) -> LanguageModel:
    """The model that the config describes, with its engine; see `parts`."""
    model, renderer = parts(config, env, checkpoint, texts)
    return LanguageModel(model, renderer, engine(config, model, renderer))


def parts(
    config: Config, env: Environment, checkpoint: Path | None = None, texts: Iterable[str] = ()
) -> tuple[Any, Renderer]:
    """The module that the config describes, with the weights of `checkpoint` where one is given, and its renderer.

    With adapters these are the adapters' own: the base is the config's, so nothing is rounded by merging and parting.
    `texts` train the tokenizer where the config asks for one of kind "bpe".
    """
    found = config.model
    start = Path(found.path) if found.path else None
    folder = checkpoint or start
    tokens = tokenizer.load(folder) if folder else _tokenizer(config, env, texts)
    model = _weights(config, start if found.lora else folder, len(tokens))
    if found.lora:
        lora.add(model, found.lora, seed=config.run.seed)
        if checkpoint:
            lora.load(model, checkpoint / build.ADAPTER)
    if found.compile:
        compile_layers(model)
    if found.checkpointing:
        checkpoint_layers(model)
    return model, Renderer(tokens, found.history, template=found.template or None)


def _weights(config: Config, folder: Path | None, vocabulary: int) -> Any:
    """The model of a folder, or one made here."""
    found = config.model
    if folder:
        return build.load(folder, device=found.device, dtype=found.dtype)
    shape = {name: getattr(found, name) for name in ("hidden", "layers", "heads", "kv_heads", "init")}
    return build.tiny(vocabulary, seed=config.run.seed, **shape).to(found.device)


def _tokenizer(config: Config, env: Environment, texts: Iterable[str]) -> Any:
    if config.model.tokenizer == "bpe":
        return tokenizer.train_bpe(texts, config.model.vocabulary)
    if not hasattr(env, "vocabulary"):
        raise ConfigError(
            f"model.tokenizer = 'closed' needs an environment with a method vocabulary(); {env.id} has none. Set "
            "model.tokenizer = 'bpe', or model.path to a model's folder"
        )
    return tokenizer.closed_vocabulary(env.vocabulary())


def engine(config: Config, model: Any, renderer: Renderer, *, shared: bool | None = None) -> Any:
    """What samples, of the class that rollout.engine names (`serving` is its door for a model made already).

    `shared` engines sample with `model` itself; others have weights of their own and copy them in `publish`. By default
    an engine shares where nothing moves while it samples: in turns with the learner, or, with the rollouts in another
    process, for evaluations alone.
    """
    r, run = config.rollout, config.run
    target = registry.load(r.engine, "policies")
    kind = getattr(target, "__self__", target)
    if not hasattr(kind, "serving"):
        raise ConfigError(f"rollout.engine = {r.engine!r} cannot serve a run's own model; 'torch' and 'vllm' can")
    registry.check_keywords("engine option", kind.serving, r.engine_options)
    return kind.serving(
        model,
        renderer,
        shared=(r.max_staleness == 0 or run.processes == 2) if shared is None else shared,
        slots=r.slots,
        max_length=r.max_length or MAX_LENGTH,
        sampling=config.sampling,
        seed=run.seed,
        deterministic=run.deterministic,
        threads=r.threads or run.threads or None,
        cores=r.cores,
        stale_caches=r.stale_caches,
        **r.engine_options,
    )
