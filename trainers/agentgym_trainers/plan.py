"""What a run will need, told before it starts: parameters, memory, time, and whether this machine has them.

Both are estimates from counts: bytes of weights, gradients, optimiser, caches and activations; floating-point
operations over what this machine was just measured to do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym.errors import ConfigError
from agentgym.modeling import build
from agentgym.modeling.flops import measured
from agentgym.modeling.logprobs import LOGITS
from agentgym.modeling.lora import Lora
from agentgym.rewards import composer
from agentgym_trainers import language
from agentgym_trainers.config import Config
from agentgym_trainers.mixtures import make_env
from agentgym_trainers.objective.declare import Perception
from agentgym_trainers.reinforce import needs_initial

BASE = 0.6e9
"""Bytes of the process with torch and transformers imported, and an environment."""
DECODING = 4.0
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
    model = _model(config)
    memory, seconds = _memory(config, model), _seconds(config, model)
    total, available = sum(memory.values()), _available(config.model.device)
    fits = total <= available and (not config.model.device.startswith("cuda") or torch.cuda.is_available())
    return Plan(
        parameters=build.parameters(model) + _adapters(config.model.lora, model),
        memory=memory,
        memory_total=total,
        memory_available=available,
        seconds=seconds,
        seconds_total=sum(seconds.values()),
        fits=fits,
        verdict=_verdict(total, available, sum(seconds.values()), fits, config.model.device),
    )


def _model(config: Config) -> Any:
    """The model without its numbers, on the device "meta"."""
    m = config.model
    if m.path:
        return _read(m.path)
    words = m.vocabulary if m.tokenizer == "bpe" else _words(config)
    with torch.device("meta"):
        return build.tiny(words, hidden=m.hidden, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads)


def _read(path: str) -> Any:
    found: Any = AutoConfig.from_pretrained(build.check_folder(Path(path)), local_files_only=True).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found)


def _words(config: Config) -> int:
    env = make_env(config)
    if not hasattr(env, "vocabulary"):
        raise ConfigError(f"model.tokenizer = 'closed' needs {env.id} to have a vocabulary(); set it to 'bpe'")
    return len(env.vocabulary()) + 14


def _memory(config: Config, model: Any) -> dict[str, float]:
    """Bytes on each rank. What moves in half precision has float32 masters, their gradients and two moments; adapters
    are float32 themselves."""
    r, adapters = config.rollout, _adapters(config.model.lora, model)
    size = 4 if config.model.dtype == "float32" else 2
    base = size * build.parameters(model)
    moving, each = (adapters, 4) if adapters else (build.parameters(model), size)
    shards = int(os.environ.get("WORLD_SIZE", "1")) if config.optim.sharded else 1
    cache = size * r.slots * (r.max_length or language.MAX_LENGTH) * _cached(model)
    copied = 4 * adapters if adapters and r.engine == "torch" else base
    found = {
        "process": BASE,
        "weights": (base + 4 * adapters) / shards,
        "gradients": each * moving / shards,
        "optimiser": (8 if each == 4 else 16) * moving / shards,
        "cache": cache,
        **_passes(config, model, size),
    }
    if r.max_staleness or r.engine != "torch":
        found["engine"] = copied
    if config.run.processes == 2:
        found["worker"] = BASE + base + 4 * adapters + cache
    if r.behaviour == "recomputed":
        found["versions"] = each * moving * (r.max_staleness + 1) / shards
    declared = [d for d in (config.reward, *(part.reward for part in config.mixture)) if d]
    if needs_initial(config, [name for d in declared for name in composer(d).derived]):
        found["reference"] = 4 * adapters or base
    if config.model.teacher:
        found["teacher"] = size * build.parameters(_read(config.model.teacher))
    return found


def _adapters(declared: Lora | None, model: Any) -> int:
    """Parameters that adapters add."""
    head = model.get_output_embeddings()
    linear = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    held = [m for n, m in linear if declared and (not declared.targets or n.endswith(declared.targets))]
    return sum(declared.rank * (m.in_features + m.out_features) for m in held) if declared else 0


def _cached(model: Any) -> float:
    """Numbers that the engine keeps of a token: keys and values of every layer."""
    c = model.config.get_text_config()
    return 2.0 * c.num_hidden_layers * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * _head(c)


def _head(c: Any) -> int:
    size: int = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return size


def _passes(config: Config, model: Any, size: int) -> dict[str, float]:
    """Activations of a micro-batch that wait for the backward pass, and the logits of a chunk with their gradient."""
    c = model.config.get_text_config()
    rows = max(o.micro_tokens for o in (config.optim, config.sft.optim))
    queries, kv = c.num_attention_heads * _head(c), _cached(model) / 2 / c.num_hidden_layers
    layer = 5 * c.hidden_size + 7 * queries + 5 * kv + 4 * getattr(c, "intermediate_size", 4 * c.hidden_size)
    again = config.model.checkpointing
    kept = c.num_hidden_layers * c.hidden_size + layer if again else c.num_hidden_layers * layer
    passes = 2 if config.objective.find(Perception) else 1
    return {
        "activations": size * rows * kept * passes,
        "logits": 3 * 4 * min(rows * c.vocab_size, max(LOGITS, c.vocab_size)),
    }


def _seconds(config: Config, model: Any) -> dict[str, float]:
    """A forward pass costs 2 operations per parameter and token, its gradient 4: half of it where the base is frozen,
    and another 2 where layers are computed again."""
    count, m = build.parameters(model), config.model
    speed = _operations_per_second(config.run.threads, m.device)
    w, s, r, e = config.warmup, config.sft, config.rollout, config.eval
    played = TURNS * TURN_TOKENS
    episodes = config.run.steps * r.tasks_per_step * r.group_size
    judged = 2 * e.episodes * e.attempts
    learnt = (4 if m.lora else 6) + (2 if m.checkpointing else 0)
    tokens = {
        "warmup": learnt * w.steps * w.batch * w.copies * sum(w.length) / 2,
        "sft": learnt * s.steps * s.batch * played,
        "rollout": 2 * DECODING * episodes * played,
        "learn": learnt * episodes * played * config.optim.epochs,
        "evaluation": 2 * DECODING * judged * played,
    }
    return {name: count * amount / speed for name, amount in tokens.items()}


def _operations_per_second(threads: int, device: str) -> float:
    """Of matrix products, in a tiny model's shapes on the CPU, in a large one's on a GPU; training reaches half.

    The best of many short tries, so that what else the machine does hardly counts. A GPU that this machine does not
    show is measured as its CPU.
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    sides = (4096, 2048, 6144) if on_gpu else (1024, 128, 384)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return 0.5 * measured(device if on_gpu else "cpu", torch.float32, sides, repeats=50)
    finally:
        torch.set_num_threads(before)


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
        f"this machine cannot do it: {needs}, and {available / 1e9:.1f} GB are free; lower rollout.slots, "
        "optim.micro_tokens or the model, or set model.checkpointing or model.lora"
    )
