"""What a run will need, told before it starts: parameters, memory, time, and whether this machine has them.

Both are estimates from counts: bytes of weights, gradients, optimiser, caches and activations; floating-point
operations over what this machine was just measured to do.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym import registry
from agentgym.errors import ConfigError
from agentgym.modeling.build import check_folder
from agentgym.rewards import composer
from agentgym_trainers.config import Config
from agentgym_trainers.objective.declare import Perception
from agentgym_trainers.reinforce import needs_initial

BASE = 0.6e9
"""Bytes of the process with torch and transformers imported, and an environment."""
DECODING = 8.0
"""How many times dearer a sampled token is than its share of a packed forward pass (small batches, bookkeeping)."""
TURNS = 3.0
"""Assumed turns of an episode where nothing is known of it."""
TURN_TOKENS = 24.0
"""Assumed tokens a turn of a compact episode adds, both sides."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Memory in bytes by part, time in seconds by phase. `fits` is the verdict, `verdict` the same in words."""

    parameters: int
    memory: dict[str, float]
    memory_total: float
    memory_available: float
    seconds: dict[str, float]
    seconds_total: float
    fits: bool
    verdict: str


def plan(config: Config) -> Plan:
    """Estimate the run. Builds no model: a hub folder is read for its shape alone."""
    shape = _shape(config)
    memory = _memory(config, shape)
    seconds = _seconds(config, shape["parameters"])
    total, available = sum(memory.values()), _available(config.model.device)
    fits = total <= available and (not config.model.device.startswith("cuda") or torch.cuda.is_available())
    return Plan(
        parameters=int(shape["parameters"]),
        memory=memory,
        memory_total=total,
        memory_available=available,
        seconds=seconds,
        seconds_total=sum(seconds.values()),
        fits=fits,
        verdict=_verdict(total, available, sum(seconds.values()), fits, config.model.device),
    )


def _shape(config: Config) -> dict[str, float]:
    m = config.model
    if m.path:
        return _read_shape(m.path)
    words = m.vocabulary if m.tokenizer == "bpe" else _words(config)
    kv = m.hidden // m.heads * m.kv_heads
    layer = 2 * m.hidden * m.hidden + 2 * m.hidden * kv + 9 * m.hidden * m.hidden + 2 * m.hidden
    return _named(words * m.hidden + m.layers * layer + m.hidden, m.hidden, m.layers, kv, words)


def _read_shape(path: str) -> dict[str, float]:
    found: Any = AutoConfig.from_pretrained(check_folder(Path(path)), local_files_only=True).get_text_config()
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(found).parameters())
    heads = getattr(found, "num_key_value_heads", None) or found.num_attention_heads
    size = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    return _named(count, found.hidden_size, found.num_hidden_layers, heads * size, found.vocab_size)


def _named(count: float, hidden: float, layers: float, kv: float, vocabulary: float) -> dict[str, float]:
    return {"parameters": count, "hidden": hidden, "layers": layers, "kv": kv, "vocabulary": vocabulary}


def _words(config: Config) -> int:
    env = registry.make(**config.env)
    if not hasattr(env, "vocabulary"):
        raise ConfigError(f"model.tokenizer = 'closed' needs {env.id} to have a vocabulary(); set it to 'bpe'")
    return len(env.vocabulary()) + 14


def _memory(config: Config, shape: dict[str, float]) -> dict[str, float]:
    """Bytes. Half precision brings float32 masters and their gradients with the optimiser's two moments."""
    size = 4 if config.model.dtype == "float32" else 2
    count, r = shape["parameters"], config.rollout
    rows = max(o.micro_tokens for o in (config.optim, config.sft.optim))
    passes = 2 if config.objective.find(Perception) else 1
    found = {
        "process": BASE,
        "weights": size * count,
        "gradients": size * count,
        "optimiser": (8 if size == 4 else 16) * count,
        "cache": 2 * size * r.slots * (r.max_length or 1024) * shape["layers"] * shape["kv"],
        "activations": size * rows * shape["hidden"] * shape["layers"] * 24 * passes,
        "logits": 4 * min(rows, 1024) * shape["vocabulary"] * 3,
    }
    if needs_initial(config, composer(config.reward).derived if config.reward else ()):
        found["reference"] = size * count
    if config.model.teacher:
        found["teacher"] = size * _read_shape(config.model.teacher)["parameters"]
    return found


def _seconds(config: Config, count: float) -> dict[str, float]:
    """A forward pass costs 2 operations per parameter and token, with its gradient 6."""
    speed = _operations_per_second(config.run.threads, config.model.device)
    w, s, r, e = config.warmup, config.sft, config.rollout, config.eval
    played = TURNS * TURN_TOKENS
    episodes = config.run.steps * r.tasks_per_step * r.group_size
    judged = 2 * e.episodes * e.attempts
    tokens = {
        "warmup": 6 * w.steps * w.batch * w.copies * sum(w.length) / 2,
        "sft": 6 * s.steps * s.batch * played,
        "rollout": 2 * DECODING * episodes * played,
        "learn": 6 * episodes * played * config.optim.epochs,
        "evaluation": 2 * DECODING * judged * played,
    }
    return {name: count * amount / speed for name, amount in tokens.items()}


def _operations_per_second(threads: int, device: str) -> float:
    """Of matrix products, in a tiny model's shapes on the CPU, in a large one's on a GPU; training reaches a third.

    A GPU that this machine does not show is measured as its CPU.
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    rows, wide = (4096, 2048) if on_gpu else (1024, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        x, w = (torch.randn(shape, device=device if on_gpu else "cpu") for shape in ((rows, wide), (wide, 3 * wide)))
        best = min(_timed(x, w) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return 0.33 * 20 * 2 * x.numel() * w.shape[1] / best


def _timed(x: torch.Tensor, w: torch.Tensor) -> float:
    started = time.perf_counter()
    for _ in range(20):
        found = x @ w
    found[0, 0].item()  # waits for a GPU
    return time.perf_counter() - started


def _available(device: str) -> float:
    """Bytes of memory that are free: of the device, or of the machine."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if "SC_PHYS_PAGES" in names else 8e9


def _verdict(total: float, available: float, seconds: float, fits: bool, device: str) -> str:
    needs = f"needs about {total / 1e9:.1f} GB and {max(seconds / 60, 0.1):.1f} minutes"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"{needs}, and a GPU that this machine does not show (model.device = {device!r})"
    if fits:
        return f"this machine can do it: {needs}, {available / 1e9:.1f} GB are free"
    return (
        f"this machine cannot do it: {needs}, and {available / 1e9:.1f} GB are free; lower rollout.slots or the model"
    )
