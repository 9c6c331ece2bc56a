"""Models: tiny ones made on the spot, any causal language model from a folder in hub format, and writing them back."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from agentgym.errors import ModelError
from agentgym.modeling import lora
from agentgym.modeling.attention import prepare

ADAPTER = "adapter"
"""The folder inside a saved model that holds its adapters apart. transformers would load any that lie beside it."""


def tiny(
    vocab_size: int,
    *,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    head_dim: int | None = None,
    max_length: int = 4096,
    rope_theta: float = 10_000.0,
    init: float = 0.02,
    seed: int = 0,
) -> Any:
    """A randomly initialised Qwen3-class model with tied embeddings, float32, on the CPU, in eval mode.

    `intermediate` defaults to 3 x hidden, `head_dim` to hidden / heads. The defaults give 0.6 M parameters at a
    vocabulary of 300. `init` is the standard deviation of the first weights. The weights depend on `seed` alone; the
    global random state is left as it was.
    """
    if heads % kv_heads:
        raise ModelError(f"{heads} heads cannot share {kv_heads} key/value heads; make one a multiple of the other")
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        intermediate_size=intermediate or 3 * hidden,
        max_position_embeddings=max_length,
        initializer_range=init,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    prepare(model)
    return model.eval()


def parameters(model: Any) -> int:
    """How many parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What an engine elsewhere takes over: tensors by the hub's names, each tied one once, adapters merged."""
    return iter(revert_weight_conversion(model, dict(lora.weights(model))).items())


def check_folder(path: str | Path) -> Path:
    """The folder, if it holds a model in hub format; else an error that says what is missing and the way out."""
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            f"no model folder {str(path)!r}; give a local folder in hub format (config.json, *.safetensors, tokenizer"
            " files), such as a checkpoint of a run or what `hf download NAME --local-dir DIR` wrote"
        )
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(f"{str(path)!r} is no model folder: config.json is missing (it holds {held})")
    return folder


def load(path: str | Path, *, device: str = "cpu", dtype: str = "auto") -> Any:
    """Any causal language model from a local folder in hub format, in eval mode. Never reaches for the network."""
    folder = check_folder(path)
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=kind)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load {str(path)!r} as a causal language model: {error}") from error
    prepare(model)
    return model.to(device).eval()


def save(model: Any, tokenizer: Any, path: str | Path) -> Path:
    """Write model (safetensors) and tokenizer in hub format. Atomic: `path` is the whole folder or not there.

    A model with adapters is written merged, as any library loads it, and the adapters beside it in `ADAPTER`. A folder
    already at `path` is replaced; a crash leaves the old one, or a `.old` one beside a whole new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with _quiet():
            model.save_pretrained(partial, state_dict=dict(lora.weights(model)) if lora.adapted(model) else None)
        if lora.adapted(model):
            lora.save(model, partial / ADAPTER)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for file in (f for f in partial.rglob("*") if f.is_file()):
            _sync(file)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would write over the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sync(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _replace(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a folder that was there is moved aside first and removed last."""
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)
